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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import fail, parse, run


@dataclass
class Flags:
    """What to describe, and how."""

    path: str = ""
    """The file or folder; it may also be given without a flag."""
    json: bool = False
    """Print JSON instead of a table."""


def main() -> None:
    """Parse, describe, print."""
    flags = parse(Flags, _arguments(sys.argv[1:]), __doc__)
    if not flags.path:
        fail("which file or folder? python scripts/info.py PATH")

    from lit_gpt.ui.info import describe, to_json

    described = describe(flags.path)
    print(to_json(described)) if flags.json else _show(described)


def _arguments(argv: list[str]) -> list[str]:
    """A bare path as `--path PATH`, also behind `--json`."""
    result = []
    for before, argument in zip(["", *argv], argv, strict=False):
        is_value = before in ("--path", "--config") or (before == "--json" and argument in ("true", "false"))
        result += [argument] if argument.startswith("-") or is_value else ["--path", argument]
    return result


def _show(described: dict[str, Any]) -> None:
    """A table of names and values, then the checkpoints."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=not sys.stdout.isatty())
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in described.items():
        if name != "checkpoints" and value not in (None, {}, []):
            table.add_row(name, _text(name, value))
    console.print(table)
    for entry in described.get("checkpoints", []):
        step = f"step {entry['step']}, " if "step" in entry else ""
        console.print(
            f"  {entry['file']}: {step}{_size(entry['size'])}, {entry['state']}", markup=False, highlight=False
        )


def _text(name: str, value: Any) -> Any:
    """A value as a person reads it."""
    from rich.text import Text

    if isinstance(value, dict):
        return Text("\n".join(f"{key}: {_text(str(key), item)}".replace("\n", "\n  ") for key, item in value.items()))
    if name == "size" and isinstance(value, int):
        return Text(f"{_size(value)} ({value:,} bytes)")
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, int) and name in (
        "tokens",
        "parameters",
        "non-embedding parameters",
        "tokens without padding",
    ):
        return Text(f"{value:,}")
    if isinstance(value, list):
        return Text(", ".join(str(item) for item in value))
    return Text(str(value))


def _size(count: int) -> str:
    """Bytes in the unit that fits."""
    amount = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError


if __name__ == "__main__":
    run(main)
