"""Hurts real training runs at random moments: each must go on by itself, or say in one line why not, and end the same.

    python tests/faults/run.py --faults 100 --seed 1             # 40 to 60 minutes on two cores
    python tests/faults/run.py --only 37 --seed 1                # one of them again
    python tests/faults/run.py --faults 20 --kind disk --setup torchrun

A fault: a process is killed, stopped or sent SIGTERM, the disk is filled, or a file of the run is damaged, while it starts,
trains, validates, saves or exports. The same command is then started again until the run is finished. Checked: nothing on
standard error but warnings and one line that says why it ended; no process and no temporary file is left behind; weights,
optimizer, losses and files are those of a run that nothing happened to, bit for bit. Two faults are tried at a time.
Equal problems are shown once, with the command to repeat them; --keep FOLDER keeps what such runs left. The exit status is 1
if there was any.
"""

from __future__ import annotations

import argparse
import functools
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.faults.kinds import KINDS  # noqa: E402 (the root must be found first)
from tests.faults.one_fault import Finished, Report, run_unbroken, try_fault  # noqa: E402
from tests.faults.setups import SETUPS, end_all  # noqa: E402


def main() -> int:
    """Parse, plan, try, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=1, help="decides kinds, setups and moments")
    parser.add_argument("--only", type=int, help="the number of one of them")
    parser.add_argument("--kind", choices=sorted(KINDS), help="one kind of faults")
    parser.add_argument("--setup", choices=sorted(SETUPS), help="one way of starting a run")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    parser.add_argument("--minutes", type=float, default=1e6, help="after these, no other fault begins")
    parser.add_argument("--keep", type=Path, help="where the runs that show a problem are kept")
    flags = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    numbers = [flags.only] if flags.only is not None else list(range(flags.faults))
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder), flags, len(numbers))
        pool = ThreadPoolExecutor(flags.jobs)
        try:
            for number in numbers:
                pool.submit(trial.run, number, *plan(flags.seed, number, flags.kind, flags.setup))
            pool.shutdown()
        finally:  # Ctrl-C: what has not begun does not, and no run is left behind
            pool.shutdown(wait=False, cancel_futures=True)
            end_all(folder)
    return trial.report()


def plan(seed: int, number: int, kind: str | None = None, setup: str | None = None) -> tuple[str, str]:
    """The kind of a fault and the run that it hurts: every 20 faults hold each kind as often as it says."""
    block = [name for name, one in sorted(KINDS.items()) for _ in range(one.share)]
    random.Random(f"{seed} kinds {number // len(block)}").shuffle(block)
    kind = kind or block[number % len(block)]
    return kind, setup or random.Random(f"{seed} setup {number}").choice(KINDS[kind].setups or sorted(SETUPS))


class Trial:
    """Faults one by one, from several threads, and what came out."""

    def __init__(self, folder: Path, flags: argparse.Namespace, count: int) -> None:
        self.folder, self.seed, self.count, self.keep = folder, flags.seed, count, flags.keep
        self.seconds = flags.minutes * 60
        self.began = time.monotonic()
        self.outcomes: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self._told = threading.Lock()
        self._starting = {name: threading.Lock() for name in SETUPS}

    def run(self, number: int, kind: str, setup: str) -> None:
        """Try a fault, and print a line."""
        began = time.monotonic()
        if began - self.began > self.seconds:
            return
        folder = self.folder / str(number)
        try:
            report = try_fault(kind, setup, f"{self.seed} {number} {kind} {setup}", folder, self.unbroken(setup))
        except Exception as error:  # of the harness: the other faults go on
            report = Report(problems=[f"the harness failed: {type(error).__name__}: {error}"])
        with self._told:
            self.tell(number, f"--kind {kind} --setup {setup}", report, time.monotonic() - began)
        if self.keep and report.problems:
            shutil.copytree(folder, self.keep / f"{self.seed}-{number}", dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def unbroken(self, setup: str) -> Finished:
        """The run of a setup that nothing happens to, made once."""
        with self._starting[setup]:
            return self._unbroken(setup)

    @functools.cache  # noqa: B019 (there is one trial)
    def _unbroken(self, setup: str) -> Finished:
        folder = self.folder / f"unbroken-{setup}"
        folder.mkdir()
        return run_unbroken(setup, folder)

    def tell(self, number: int, name: str, report: Report, seconds: float) -> None:
        """A line for a fault; the whole of a problem the first time."""
        result = "PROBLEM" if report.problems else ("refused once" if len(report.ends) > 2 else "resumed")
        self.outcomes[result] += 1
        done = sum(self.outcomes.values())
        left = (time.monotonic() - self.began) / done * (self.count - done) / 60
        print(
            f"[{done}/{self.count}, {left:.0f} min left] fault {number} ({name}) {report.what}: {result} in {seconds:.0f} s",
            flush=True,
        )
        for end in report.ends:
            print(f"    start: {end}", flush=True)
        for problem in report.problems:
            kind = re.sub(r"[0-9a-f]*\d[0-9a-f]*", "#", problem)
            self.problems[kind] += 1
            if self.problems[kind] == 1:
                shown = "\n    ".join(problem.splitlines()[:40])
                print(f"  PROBLEM {shown}", flush=True)
        if report.problems:
            print(f"  again: python tests/faults/run.py --seed {self.seed} --only {number} {name}", flush=True)

    def report(self) -> int:
        """The last lines; returns the exit status."""
        for kind, count in self.problems.most_common():
            print(f"{count} x {kind.splitlines()[0]}")
        minutes = (time.monotonic() - self.began) / 60
        done = sum(self.outcomes.values())
        print(f"{done} faults in {minutes:.0f} minutes, {self.count - done} not begun: {dict(self.outcomes)}")
        return int(bool(self.problems))


if __name__ == "__main__":
    sys.exit(main())
