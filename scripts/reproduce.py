"""One command for each claim of the paper: the published settings, and ours beside the published number.

    python scripts/reproduce.py zero_shot|gsm8k|reverse|mt_bench|fineweb|speed|scaling
    python scripts/reproduce.py gsm8k --processes 8                                                on eight GPUs
    python scripts/reproduce.py gsm8k --dry_run                                                    only what it costs
    python scripts/reproduce.py gsm8k --checkpoint models/mine.safetensors --limit 16              a look

A checkpoint comes from --checkpoint, else by its released name from models/, else from the hub (nieshen/SMDM). A number is
compared within what sampling error allows; published numbers that are not known here (data/published_results.json) are said
to be so. Writes out/reproduce/{claim}.json (numbers, commands, hashes, versions, cost) and {claim}.md, the same as one row
of a Markdown table. What is finished is not done again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run
from lit_gpt.evaluation.settings import ReproduceFlags


def main(argv: Sequence[str] | None = None) -> None:
    """Test one claim."""
    words = list(sys.argv[1:] if argv is None else argv)
    claim = words.pop(0) if words and not words[0].startswith("-") else ""

    flags = parse(ReproduceFlags, words, __doc__)
    for name in ("limit", "processes"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")

    from lit_gpt.evaluation.reproduction import reproduce

    reproduce(claim, flags)


if __name__ == "__main__":
    run(main)
