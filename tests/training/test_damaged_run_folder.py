"""A run folder whose small files are damaged: each is named in one line, or passed over."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lit_gpt.checkpoints import run_files, run_record, saving
from lit_gpt.training import strategies
from lit_gpt.training.loggers import MetricsCsv
from tests.checkpoints.test_saving import make_state, save


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"log_path": "x"}, "run.json is damaged: it has no run_id; delete it"),
        ({"run_id": 3, "log_path": "x"}, "it has no run_id"),
        ({"run_id": "a", "log_path": None}, "it has no log_path"),
        ({"run_id": "a", "log_path": "x", "result": [1]}, "it has no result"),
        ([], "holds a JSON list.*; delete it, and the run goes on under a new id"),
    ],
    ids=str,
)
def test_a_record_without_its_parts_is_named(tmp_path: Path, record: Any, message: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as raised:
        run_record.read_run_record(tmp_path, ("run_id", "log_path"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [b"time,loss\n1,2\n", b"\xff\xfe\x00\n", b"step,loss\n\x00,1\n", b'step,"' + b"x" * 200_000 + b'"\n1,2\n'],
    ids=["columns", "bytes", "nul", "field"],
)
def test_a_log_of_something_else_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    if content.startswith(b"step,loss"):  # a row that is no row is passed over
        MetricsCsv(path, ["step", "loss"], 4)
        return
    with pytest.raises(ValueError, match="metrics.csv is not the log of a run .*: move it away") as raised:
        MetricsCsv(path, ["step", "loss"], 4)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == content


def test_an_older_log_goes_on_with_the_columns_of_today(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,old\n1,2\n\u00b2,3\n9,4\n,\n")
    MetricsCsv(path, ["step", "loss"], 4).log_metrics({"loss": 0.5}, 5)
    assert path.read_text().splitlines() == ["step,loss", "1,", "5,0.5"]


@pytest.mark.parametrize(
    "change",
    [
        {"step": True}, {"step": -1}, {"step": 2**80}, {"iter_num": 1.5}, {"record": []}, {"format": [1]},
        {"record": {"settings": [1]}}, {"record": {"run": 3}}, {"record": {"run": {"world_size": "2"}}},
        {"record": {"run": {"micro_batch_size": 0}}}, {"successor": 3}, {"successor": {}}, {"sha256": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_broken_marker_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    fabric = strategies.start_fabric("cpu", "1", 1, "auto", "32-true")
    path = save(fabric, tmp_path, make_state(fabric, steps=1))
    marker = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**marker, **change}))
    lines: list[str] = []
    assert run_files.newest_complete(tmp_path, lines.append) is None
    assert len(lines) == 1 and str(path) in lines[0] and "\n" not in lines[0] and len(lines[0]) < 400
    assert "marker" in lines[0] or "record is damaged" in lines[0]
    path.with_suffix(".json").unlink()
    os.mkfifo(path.with_suffix(".json"))
    assert run_files.newest_complete(tmp_path, lines.append) is None
    assert "no regular file" in lines[1]


def test_a_marker_of_another_step_is_refused(tmp_path: Path) -> None:
    fabric = strategies.start_fabric("cpu", "1", 1, "auto", "32-true")
    state = make_state(fabric, steps=2)
    path = save(fabric, tmp_path, state)
    marker = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**marker, "step": 1}))
    found = run_files.open_checkpoint(path)
    with pytest.raises(ValueError, match="is of step 2, its marker says 1: one is damaged"):
        saving.load_checkpoint(fabric, found, state)
