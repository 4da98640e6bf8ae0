"""Stages are done once per setting; scripts' failures and interrupts arrive as one line."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from lit_gpt.cli import Interrupted
from lit_gpt.pipeline import Stage, run_script


def script(folder: Path, body: str) -> str:
    path = folder / "script.py"
    path.write_text(body)
    return str(path)


def test_a_stage_is_done_once_per_setting(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    stage = Stage.open(folder, {"size": 1})
    assert stage.result is None
    (folder / "half.txt").write_text("half done")
    assert Stage.open(folder, {"size": 1}).result is None  # not finished: goes on with what there is
    assert (folder / "half.txt").exists()
    assert stage.finish({"loss": 2.5}) == stage.result == {"loss": 2.5}
    assert Stage.open(folder, {"size": 1}).result == {"loss": 2.5}
    assert Stage.open(folder, {"size": 2}).result is None
    assert not (folder / "half.txt").exists()


def test_a_stage_leaves_foreign_files_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds files of something else"):
        Stage.open(tmp_path, {})
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_lines_arrive_in_order(tmp_path: Path) -> None:
    lines: list[str] = []
    body = "import sys\nfor i in range(3):\n    print('line', i, sys.argv[1])\nprint('last', file=sys.stderr)\n"
    run_script([script(tmp_path, body), "x"], lines.append)
    assert lines == ["line 0 x", "line 1 x", "line 2 x", "last"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("import sys\nprint('error: no data in X', file=sys.stderr)\nsys.exit(2)", r"^script\.py: no data in X$"),
        ("print('working')\n1 / 0", r"^script\.py: ended with code 1: .*ZeroDivisionError"),
    ],
)
def test_a_failure_is_one_line(tmp_path: Path, body: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        run_script([script(tmp_path, body)], lambda line: None)
    assert "\n" not in str(caught.value)


def test_an_interrupt_lets_the_script_save(tmp_path: Path) -> None:
    body = (
        "import signal, sys, time\n"
        "def stop(*_):\n    print('saved')\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\nprint('ready')\ntime.sleep(60)\n"
    )
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        if line == "ready":
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    started = time.monotonic()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="goes on from there") as caught:
        run_script([script(tmp_path, body)], on_line)
    assert caught.value.code == 130 and lines == ["ready", "saved"] and time.monotonic() - started < 30
    assert signal.getsignal(signal.SIGINT) is before
