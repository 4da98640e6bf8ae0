"""Damages files of every kind that users bring, and reads each as the scripts do: none may end in more than one line.

    python tests/fuzz/run.py --inputs 10000                      # about ten minutes on two cores
    python tests/fuzz/run.py --inputs 500 --only exports --seed 3

Each input is read in a process of its own with limits on time and memory. A fault is a traceback, a message of several
lines, a hang, an allocation out of proportion, a process that dies, or a result that is accepted and not finite. Equal
faults are shown once; --keep FOLDER keeps the first input of each. The exit status is 1 if there was any.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fuzz.readers import FILE_KINDS, FileKind  # noqa: E402 (the root must be found first)
from tests.fuzz.workers import Limits, Outcome, run_limited  # noqa: E402


def main() -> int:
    """Parse, damage, read, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000, help="damaged inputs, shared among the kinds of files")
    parser.add_argument("--seed", type=int, default=1, help="decides the damages")
    parser.add_argument("--only", choices=sorted(FILE_KINDS), help="one kind of files")
    parser.add_argument("--keep", type=Path, help="where the first input of each fault is kept")
    flags = parser.parse_args()
    kinds = [flags.only] if flags.only else sorted(FILE_KINDS)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(kinds):
            count = flags.inputs * (number + 1) // len(kinds) - flags.inputs * number // len(kinds)
            failed += fuzz_kind(name, FILE_KINDS[name], Path(folder) / name, count, flags.seed, flags.keep)
    print(f"{flags.inputs} inputs, {failed} faults")
    return int(failed > 0)


def fuzz_kind(name: str, kind: FileKind, folder: Path, count: int, seed: int, keep: Path | None = None) -> int:
    """Read so many damaged inputs of a kind; returns how many were faults, and prints a line for each different one."""
    started = time.monotonic()
    whole = folder / "whole"
    whole.mkdir(parents=True)
    kind.make(whole)
    first = run_limited(lambda: kind.read(whole), Limits())
    assert first.kind == "accepted", f"{name}: the undamaged input is {first.kind}: {first.text}"
    outcomes: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for number in range(count):
        chance = random.Random(f"{seed} {name} {number}")
        damaged = folder / "damaged"
        shutil.copytree(whole, damaged)
        kind.damage(damaged, chance)
        outcome = run_limited(lambda: kind.read(folder / "damaged"), Limits())
        outcomes[outcome.kind] += 1
        if outcome.failed:
            faults[outcome.place] += 1
            if faults[outcome.place] == 1:
                _show(name, number, outcome)
                if keep:
                    shutil.copytree(damaged, keep / f"{name}-{seed}-{number}", dirs_exist_ok=True)
        shutil.rmtree(damaged)
    print(f"{name}: {count} inputs in {time.monotonic() - started:.0f} s: {dict(outcomes)}", flush=True)
    return sum(faults.values())


def _show(name: str, number: int, outcome: Outcome) -> None:
    tail = "\n    ".join(outcome.text.splitlines()[-9:])
    print(f"FAULT {name} input {number}: {outcome.place[:200]}\n    {tail}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
