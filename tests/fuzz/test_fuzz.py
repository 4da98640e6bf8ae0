"""A short run of the fuzzer over every kind of files, so that it stays in order; the long one is `tests/fuzz/run.py`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fuzz.workers import Limits, run_limited

ROOT = Path(__file__).resolve().parents[2]


def test_no_damaged_file_ends_in_more_than_a_line() -> None:
    command = [sys.executable, "-W", "ignore", "tests/fuzz/run.py", "--inputs", "60", "--seed", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 inputs, 0 faults" in done.stdout


def raise_of(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (lambda: None, "accepted"),
        (lambda: raise_of(ValueError("a line")), "refused"),
        (lambda: raise_of(ValueError("two\nlines")), "line"),
        (lambda: raise_of(ValueError()), "line"),
        (lambda: raise_of(TypeError("a fault")), "traceback"),
        (lambda: raise_of(AssertionError("accepted: nan")), "traceback"),
        (lambda: len(bytearray(1 << 40)), "memory"),
        (lambda: time.sleep(60), "hang"),
    ],
)
def test_the_fuzzer_sees_every_kind_of_fault(work, kind: str) -> None:
    assert run_limited(work, Limits(seconds=3)).kind == kind
