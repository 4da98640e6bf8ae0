"""The speedrun: which training reaches the fewest bits per byte of a held-out text at a fixed budget.

    python benchmarks/speedrun.py --budget 1.55e13               the quickstart's budget: 3 minutes an entry on two cores
    python benchmarks/speedrun.py --budget 1e15 --entries [arm,mdm-best]
    python benchmarks/speedrun.py --minutes 3                    at a fixed training time on this machine
    python benchmarks/speedrun.py --budget 1e11 --out quick      all entries in seconds each
    python benchmarks/speedrun.py --budget 1.55e13 --name mine --script my_train.py --script_flags '{"learning_rate": 0.004}'
    python benchmarks/speedrun.py --table true                   write the table of docs/speedrun.md from the file of lines

Prints one line of JSON an entry and adds it to --lines. The rules, and how to enter: docs/speedrun.md. What is finished is
not done again; after Ctrl-C the same command goes on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Flags:
    """Flags of the speedrun."""

    budget: float | None = None
    """FLOPs of training, 6 N D, as 1e15. This or --minutes."""
    minutes: float | None = None
    """Training time on this machine, validation and saving not counted; the FLOPs are then what the time allows."""
    entries: list[str] = field(default_factory=list)
    """Which of the registered entries; all by default."""
    seed: int = 3407
    """Of weights, data order and noise."""
    n_layer: int = 4
    """Blocks of the entries' models."""
    n_embd: int = 128
    """Their width, a multiple of 32."""
    block_size: int = 128
    """Tokens of a row, in training and in validation."""
    name: str | None = None
    """Of an entry of your own."""
    script: str = "pretrain/train_mdm.py"
    """Its training script, which takes the flags of those in pretrain/."""
    script_flags: dict[str, int | float | str] = field(default_factory=dict)
    """Its flags, as JSON; they replace the published recipe's."""
    text: str = str(ROOT / "data" / "tinyshakespeare" / "input.txt")
    """The text, of which the last tenth is held out. Another text is another speedrun."""
    out: str = "workdir/speedrun"
    """Folder of the runs."""
    lines: str | None = None
    """File of JSON lines; by default lines.jsonl in --out. The repository's is docs/results/speedrun.jsonl."""
    table: bool = False
    """Write the table of docs/speedrun.md from docs/results/speedrun.jsonl; nothing is trained."""


def main() -> None:
    """Run entries, print their lines; or write the table."""
    flags = parse(Flags, None, __doc__)
    if flags.table:
        from lit_gpt.studies import speedrun

        page = ROOT / "docs" / "speedrun.md"
        speedrun.write_table(page, speedrun.add_lines(ROOT / "docs" / "results" / "speedrun.jsonl", []))
        print(page.relative_to(ROOT))
        return
    if (flags.budget is None) == (flags.minutes is None):
        raise ValueError("give either --budget (FLOPs) or --minutes, not " + ("both" if flags.budget else "neither"))
    if flags.script_flags and not flags.name:
        raise ValueError("--script_flags are those of an entry of your own: give its --name")
    amount = flags.minutes if flags.budget is None else flags.budget
    if amount is None or not 0 < amount < float("inf"):
        raise ValueError(f"--budget or --minutes {amount}: expected more than 0")

    from rich.console import Console

    from lit_gpt.pipeline import Pipeline
    from lit_gpt.studies import speedrun
    from lit_gpt.studies.text_corpus import packed_text
    from lit_gpt.studies.trained_models import ModelShape

    if unknown := [name for name in flags.entries if name not in speedrun.ENTRIES]:
        raise ValueError(f"--entries {', '.join(unknown)}: expected some of {', '.join(speedrun.ENTRIES)}")
    chosen = [speedrun.ENTRIES[name] for name in flags.entries or speedrun.ENTRIES]
    if flags.name:
        extra = tuple(flags.script_flags.items())
        chosen = [speedrun.SpeedrunEntry(flags.name, flags.script, extra=extra)]
    # The lines of JSON alone go to stdout.
    pipeline = Pipeline(Path(flags.out), Console(highlight=False, stderr=True), lambda line: "error: " not in line)
    packed = packed_text(pipeline, Path(flags.text), speedrun.VOCAB_SIZE, flags.block_size, 3)
    model = (ModelShape(flags.block_size, flags.n_layer, flags.n_embd), flags.seed)
    budget = speedrun.SpeedrunBudget(flags.budget, flags.minutes)
    for entry in chosen:
        line = speedrun.run_entry(pipeline, packed, entry, budget, model)
        print(json.dumps(line), flush=True)
        speedrun.add_lines(Path(flags.lines or Path(flags.out) / "lines.jsonl"), [line])


if __name__ == "__main__":
    run(main)
