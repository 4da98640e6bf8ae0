"""A few faults of the harness, whole; a hundred are `tests/faults/run.py`."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.faults import kinds
from tests.faults.one_fault import read_output
from tests.faults.run import plan
from tests.faults.setups import SETUPS
from tests.support.training_runs import ROOT


@pytest.mark.slow  # a minute: each fault is three starts of a process
def test_runs_go_on_after_faults():
    command = [sys.executable, "tests/faults/run.py", "--faults", "4", "--seed", "2", "--setup", "one"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 faults in" in done.stdout and "PROBLEM" not in done.stdout


def test_every_twenty_faults_hold_every_kind():
    planned = [plan(1, number) for number in range(40)]
    assert planned == [plan(1, number) for number in range(40)], "the seed decides them"
    for block in (planned[:20], planned[20:]):
        assert {name: sum(kind == name for kind, _ in block) for name in kinds.KINDS} == {
            name: kind.share for name, kind in kinds.KINDS.items()
        }
    assert all(setup != "one" for kind, setup in planned if kind == "stop")


def test_what_a_run_may_print():
    lines = ["warning: a checkpoint is skipped\n", "error: no data\n"]
    assert read_output(lines) == (["error: no data"], [])
    assert read_output(["warning: step 2 is lost: [third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error\n"])[1]
    trace = ["Traceback (most recent call last):\n", '  File "a.py", line 1\n', "ValueError: no\n"]
    assert read_output([*lines, *trace])[1] == [line.rstrip() for line in trace]
    report = [
        "Traceback (most recent call last):\n",
        '  File "torch/distributed/run.py", line 1\n',
        "ChildFailedError\n",
    ]
    launcher = SETUPS["torchrun"].launcher
    assert read_output([*lines, *report], launcher) == (["error: no data"], [])
    assert read_output([*trace, *lines, *report], launcher)[1], "a process's own is not the launcher's"


def test_damage_is_repeatable_and_known(tmp_path):
    folder = tmp_path / "workdir" / "debug" / "run"
    folder.mkdir(parents=True)
    assert kinds.damage(tmp_path, random.Random(1)) is None
    for seed in range(20):
        for name in ("iter-000008-ckpt.pth", "iter-000008-ckpt.json", "run.json"):
            (folder / name).write_bytes(bytes(range(200)))
        what, file, whole = kinds.damage(tmp_path, random.Random(seed))
        assert whole == bytes(range(200)) != file.read_bytes() and file.name in what
