"""A run's folder through whole runs by the real scripts: what is kept, deleted, logged and saved when something fails."""

from __future__ import annotations

import json

import pytest

from tests.support.training_runs import final_state, make_packed_data, run_pretraining


@pytest.fixture
def folder(tmp_path):
    make_packed_data(tmp_path / "data")
    return tmp_path


def checkpoints(folder):
    """The run's checkpoints by optimizer step."""
    found = {}
    for path in sorted(folder.glob("workdir/*/*/iter-*-ckpt.pth")):
        found[json.loads(path.with_suffix(".json").read_text())["step"]] = path
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("workdir/*/*/iter-*")}


FLAGS = {"max_steps": 12, "save_interval": 3, "keep_checkpoints": 0, "val_samples": 0}


@pytest.fixture
def finished(folder):
    run_pretraining("train_ar.py", folder, **FLAGS)
    assert list(checkpoints(folder)) == [3, 6, 9, 12]
    return folder


@pytest.mark.parametrize(
    "mistake",
    [{"learning_rate": 1.0}, {"models_dir": "data/validation_0000000000.bin/models"}],
    ids=["other settings", "no room for the export"],
)
@pytest.mark.parametrize("rewind", ["to 3", "never"])
def test_a_refused_rewind_deletes_nothing(finished, mistake, rewind):
    resume = checkpoints(finished)[3] if rewind == "to 3" else "never"
    if resume == "never" and "learning_rate" in mistake:
        mistake = {"logger": "carrier_pigeon"}
    before = contents(finished)
    _, err = run_pretraining(
        "train_ar.py", finished, code=2, **FLAGS | {"resume": resume, "overwrite": "true"} | mistake
    )
    assert err.startswith("error: ")
    assert contents(finished) == before


def test_a_rewind_deletes_later_checkpoints_with_its_first_save(finished):
    """An end before that save loses nothing, and the run still is where it was taken back to."""
    before, state = contents(finished), final_state(finished)
    record = next(finished.glob("workdir/*/*/run.json"))
    # A folder in the way of the temporary file's final name: the first save fails.
    flags = FLAGS | {"resume": checkpoints(finished)[3], "save_interval": 5}
    (blocked := record.parent / "iter-000005-ckpt.pth").mkdir()
    run_pretraining("train_ar.py", finished, code=2, **flags)
    blocked.rmdir()
    assert contents(finished) == before
    out, _ = run_pretraining("train_ar.py", finished, **FLAGS | {"save_interval": 7})
    assert "resumed at step 3 of 12" in out
    assert list(checkpoints(finished)) == [3, 7, 12]
    assert all((final_state(finished)[name] == state[name]).all() for name in state)
    assert "checkpoints_valid_until" not in json.loads(record.read_text())
