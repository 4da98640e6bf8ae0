"""Damages what users bring, and reads it as the scripts do: nothing may end in more than one line.

    nice python tests/fuzz/run.py --inputs 10000                 # minutes on two cores
    python tests/fuzz/run.py --inputs 500 --only exports --seed 3

Inputs are files of every kind, command lines and configuration files of every script, `--model_args`, and requests to the
page's server. Each is read in a process of its own with limits on time and memory. A fault is a traceback, a message of
several lines, a hang, an allocation out of proportion, a process that dies, or a result that is accepted and not finite.
Equal faults are shown once; --keep FOLDER keeps the first input of each. The exit status is 1 if there was any.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fuzz.commands import COMMAND_KINDS  # noqa: E402 (the root must be found first)
from tests.fuzz.model_args import MODEL_ARGS_KINDS  # noqa: E402
from tests.fuzz.readers import FILE_KINDS  # noqa: E402
from tests.fuzz.shards import SHARD_KINDS  # noqa: E402
from tests.fuzz.web_requests import REQUEST_KINDS  # noqa: E402
from tests.fuzz.workers import Limits, Outcome, run_limited  # noqa: E402

KINDS = {**FILE_KINDS, **SHARD_KINDS, **COMMAND_KINDS, **MODEL_ARGS_KINDS, **REQUEST_KINDS}
# Inputs that one process reads one after the other.
_SHARE = 25


def main() -> int:
    """Parse, damage, read, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000, help="damaged inputs, shared among the kinds")
    parser.add_argument("--seed", type=int, default=1, help="decides the damages")
    parser.add_argument("--only", choices=sorted(KINDS), help="one kind")
    parser.add_argument("--keep", type=Path, help="where the first input of each fault is kept")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="inputs read at once")
    flags = parser.parse_args()
    kinds = [flags.only] if flags.only else sorted(KINDS)
    for name in kinds:
        KINDS[name].load()
    faults: Counter[str] = Counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(flags.processes, multiprocessing.get_context("fork")) as pool,
    ):
        for number, name in enumerate(kinds):
            first = flags.inputs * number // len(kinds)
            count = flags.inputs * (number + 1) // len(kinds) - first
            started = time.monotonic()
            whole = Path(folder) / name / "whole"
            pool.submit(make_whole, name, whole).result()
            shares = [range(start, min(start + _SHARE, count)) for start in range(0, count, _SHARE)]
            futures = [pool.submit(fuzz, name, whole, numbers, flags.seed) for numbers in shares]
            outcomes: Counter[str] = Counter()
            for future in futures:
                for input_number, outcome in future.result():
                    outcomes[outcome.kind] += 1
                    if outcome.failed:
                        faults[outcome.place] += 1
                        if faults[outcome.place] == 1:
                            _show(name, input_number, outcome)
                            if flags.keep:
                                damage(
                                    name,
                                    whole,
                                    input_number,
                                    flags.seed,
                                    flags.keep / f"{name}-{flags.seed}-{input_number}",
                                )
            print(f"{name}: {count} inputs in {time.monotonic() - started:.0f} s: {dict(outcomes)}", flush=True)
    print(f"{flags.inputs} inputs, {sum(faults.values())} faults")
    return int(bool(faults))


def make_whole(name: str, folder: Path) -> None:
    """Write undamaged files of a kind, and read them."""
    kind = KINDS[name]
    folder.mkdir(parents=True)
    kind.make(folder)
    outcome = run_limited(lambda: kind.read(folder), Limits())
    assert outcome.kind == "accepted", f"{name}: the undamaged input is {outcome.kind}: {outcome.text}"


def damage(name: str, whole: Path, number: int, seed: int, folder: Path) -> None:
    """Write a damaged input; its number decides the damage."""
    shutil.copytree(whole, folder)
    KINDS[name].damage(folder, random.Random(f"{seed} {name} {number}"))


def fuzz(name: str, whole: Path, numbers: range, seed: int) -> list[tuple[int, Outcome]]:
    """Read damaged inputs of a kind; what came of each."""
    kind, outcomes = KINDS[name], []
    for number in numbers:
        folder = whole.with_name(f"damaged-{number}")
        damage(name, whole, number, seed, folder)
        outcomes.append((number, run_limited(lambda: kind.read(whole.with_name(f"damaged-{number}")), Limits())))  # noqa: B023
        shutil.rmtree(folder)
    return outcomes


def _show(name: str, number: int, outcome: Outcome) -> None:
    tail = "\n    ".join(outcome.text.splitlines()[-9:])
    print(f"FAULT {name} input {number}: {outcome.place[:200]}\n    {tail}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
