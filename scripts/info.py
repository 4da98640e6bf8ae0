"""Say what a file or folder is: checkpoint, run folder, weights, packed data, manifest or tokenizer.

    python scripts/info.py workdir/scaling_debug/mdm-6M-0.1
    python scripts/info.py models/mdm-6M-0.1e18.safetensors --json

Prints kind, size, settings, tokens and hash within seconds (it reads the whole file once, for the hash); `--json`
prints the same as JSON.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import fail, parse, run


@dataclass
class Flags:
    """Flags of the information."""

    path: str = ""
    """The file or folder; it may also be given without a flag."""
    json: bool = False
    """Print JSON instead of a table."""


def main() -> None:
    """Parse, look, print."""
    flags = parse(Flags, _arguments(sys.argv[1:]), __doc__)
    if not flags.path:
        fail("which file or folder? python scripts/info.py PATH")

    from lit_gpt.ui.info import info_as_json, path_info
    from lit_gpt.ui.info_table import print_info

    info = path_info(flags.path)
    print(info_as_json(info)) if flags.json else print_info(info)


def _arguments(argv: list[str]) -> list[str]:
    """A bare path as `--path PATH`, also behind `--json`."""
    result = []
    for before, argument in zip(["", *argv], argv, strict=False):
        is_value = before in ("--path", "--config") or (before == "--json" and argument in ("true", "false"))
        result += [argument] if argument.startswith("-") or is_value else ["--path", argument]
    return result


if __name__ == "__main__":
    run(main)
