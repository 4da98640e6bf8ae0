"""A run's name, a shape by flags, and a finished run that gets more steps, by the real scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_gpt.checkpoints.torch_files import open_torch_file
from lit_gpt.training import schedule
from lit_gpt.training.run_folder import RunFolder
from tests.support.training_runs import (
    assert_same_run,
    differing_tensors,
    final_state,
    make_packed_data,
    read_losses,
    read_metrics,
    run_pretraining,
    run_pretraining_process,
    run_script_main,
    script_command,
)

FLAGS = {"name": "mine", "val_samples": 0, "log_interval": 1, "keep_checkpoints": 0}
# A schedule without a shape: then an extended run is one that had all its steps from the beginning.
FLAT = {"learning_rate": 1e-3, "min_lr": 1e-3, "warmup_steps": 0}


def record_of(folder: Path) -> dict:
    (path,) = folder.glob("workdir/*/*/run.json")
    return json.loads(path.read_text())


def test_a_name_is_the_folders_the_logs_and_the_exports(folder: Path):
    out, _ = run_pretraining("train_ar.py", folder, **FLAGS, max_steps=2)
    assert "run mine: " in out
    for path in ("workdir/scaling_debug/mine/run.json", "out/mine/version_0/metrics.csv", "models/mine.safetensors"):
        assert (folder / path).is_file(), path
    assert record_of(folder)["name"] == "mine"
    # A name is no setting: another run under it is told what differs.
    _, err = run_pretraining("train_mdm.py", folder, **FLAGS, max_steps=2, code=2)
    assert "kind: checkpoint arm, now mdm" in err and "start another run (--name, " in err


@pytest.mark.parametrize("name", ["a/b", "..", ".x", "-x", "", "a b", "x" * 101])
def test_what_is_no_name_is_refused(folder: Path, name: str):
    _, err = run_pretraining("train_ar.py", folder, **FLAGS | {"name": name}, max_steps=2, code=2)
    assert err.startswith("error: --name ") and err.count("\n") == 1


def test_a_name_may_be_of_any_script_as_long_as_a_file_can_have_it(folder: Path):
    run_pretraining("train_ar.py", folder, **FLAGS | {"name": "训" * 66}, max_steps=1)
    _, err = run_pretraining("train_ar.py", folder, **FLAGS | {"name": "训" * 86}, max_steps=1, code=2)
    assert err.startswith("error: --name ") and "258 bytes in a file's name, at most 200: shorten it" in err


def test_a_shape_by_flags_needs_no_size_and_is_said(folder: Path):
    flags = {
        "data_dir": folder / "data",
        "n_layer": 1,
        "n_embd": 32,
        "vocab_size": 64,
        "block_size": 32,
        "max_steps": 1,
    }
    flags |= {"batch_size": 4, "val_samples": 0, "compile": "off"}
    out, _ = run_script_main(script_command("pretrain/train_mdm.py", **flags), folder)
    assert "model: 1 layers, width 32, 1 heads of 32, MLP 128, context 32, vocabulary 64" in out
    assert (folder / "workdir/scaling_debug" / record_of(folder)["name"]).is_dir()
    del flags["n_layer"]
    _, err = run_script_main(script_command("pretrain/train_mdm.py", **flags), folder, code=2)
    assert "--model 170, or a shape of your own by --n_layer and --n_embd" in err


def test_an_extended_run_is_the_longer_run_where_the_schedule_is_flat(folder: Path, tmp_path_factory):
    flags = FLAGS | FLAT | {"ssl_ratio": 0.3}
    whole = tmp_path_factory.mktemp("whole")
    make_packed_data(whole / "data")
    run_pretraining("train_mdm_rl.py", whole, **flags, max_steps=9)
    run_pretraining("train_mdm_rl.py", folder, **flags, max_steps=5)
    out, _ = run_pretraining("train_mdm_rl.py", folder, **flags, max_steps=9)
    assert "resumed at step 5 of 9" in out
    assert "extended: the run had ended at step 5; from 0.001 the learning rate rises again within 0 steps" in out
    assert_same_run(whole, folder)
    record = record_of(folder)
    assert record["finished"] and record["settings"]["max_steps"] == 9 and record["settings"]["extended_from"] == 5
    again, _ = run_pretraining("train_mdm_rl.py", folder, **flags, max_steps=9)
    assert "is finished" in again


def test_every_process_knows_of_the_extension(folder: Path):
    """Else their learning rates, and so the copies of the model, would differ."""
    flags = FLAGS | {"warmup_steps": 3, "strategy": "fsdp"}
    run_pretraining("train_mdm.py", folder, **FLAGS | {"warmup_steps": 3}, max_steps=4)
    out, _ = run_pretraining_process("train_mdm.py", folder, **flags, max_steps=8, devices=2)
    assert "extended: the run had ended at step 4" in out
    one = final_state(folder)
    start = next(folder.glob("workdir/*/*/iter-000004-ckpt.pth"))
    run_pretraining("train_mdm.py", folder, **FLAGS | {"warmup_steps": 3}, max_steps=8, resume=start)
    other = final_state(folder)
    for name in (name for name in one if name.startswith("model.")):
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_an_interrupted_extension_goes_on_bit_for_bit(folder: Path, tmp_path_factory):
    """With warmup and cosine; the export is replaced, a second extension begins at the new end."""
    flags = FLAGS | {"save_interval": 3, "warmup_steps": 4}
    whole = tmp_path_factory.mktemp("whole")
    make_packed_data(whole / "data")
    for place in (whole, folder):
        run_pretraining("train_mdm.py", place, **flags, max_steps=6)
    first = load_file(folder / "models/mine.safetensors")
    run_pretraining("train_mdm.py", whole, **flags, max_steps=15)
    run_pretraining("train_mdm.py", folder, **flags, max_steps=15)
    expected = [schedule.learning_rate(step, 15, 4, 3e-3, 3e-4, 6) for step in range(7, 16)]
    rates = {int(row["step"]): float(row["learning_rate"]) for row in read_metrics(folder)}
    assert [rates[step] for step in range(7, 16)] == expected
    assert expected[0] < 1.1e-3 and expected[-1] == pytest.approx(3e-4) and max(expected) > 1.8e-3
    (middle,) = folder.glob("workdir/*/*/iter-000009-ckpt.pth")
    out, _ = run_pretraining("train_mdm.py", folder, **flags, max_steps=15, resume=middle)
    assert "resumed at step 9 of 15" in out and "extended: " not in out
    assert_same_run(whole, folder)
    assert any((first[name] != tensor).any() for name, tensor in load_file(folder / "models/mine.safetensors").items())
    run_pretraining("train_mdm.py", folder, **flags, max_steps=18)
    assert record_of(folder)["settings"]["extended_from"] == 15
    assert list(read_losses(folder)) == list(range(1, 19))


def test_what_was_finished_stays_when_it_is_extended(folder: Path):
    """The export is the longer run's in the end; the shorter run's last checkpoint is there however few are kept."""
    flags = FLAGS | {"save_interval": 1, "keep_checkpoints": 1}
    run_pretraining("train_mdm.py", folder, **flags, max_steps=3)
    first = load_file(folder / "models/mine.safetensors")
    out, _ = run_pretraining("train_mdm.py", folder, **flags, max_steps=6)
    run_dir = Path("workdir/scaling_debug/mine")
    kept = run_dir / "iter-000003-ckpt.pth"
    assert f"models/mine.safetensors will be replaced at the end; the model of step 3 stays in {kept}" in out
    out, _ = run_pretraining("train_mdm.py", folder, **flags, max_steps=8)
    assert f"the model of step 6 stays in {run_dir / 'iter-000006-ckpt.pth'}" in out
    found = sorted(path.name for path in (folder / run_dir).glob("*.pth"))
    assert found == [f"iter-00000{step}-ckpt.pth" for step in (3, 6, 7, 8)]
    weights = open_torch_file(folder / kept)["model"]
    assert all(torch.equal(weights[name].float(), tensor) for name, tensor in first.items())


def test_only_a_finished_run_is_extended_and_only_its_length(folder: Path):
    run_pretraining("train_ar.py", folder, **FLAGS, max_steps=6, save_interval=3)
    state = final_state(folder)
    for change in ({"max_steps": 9, "learning_rate": 1e-3}, {"max_steps": 4}):
        _, err = run_pretraining("train_ar.py", folder, **FLAGS | change, code=2)
        assert err.startswith("error: cannot resume ") and next(reversed(change)) in err
    (middle,) = folder.glob("workdir/*/*/iter-000003-ckpt.pth")
    _, err = run_pretraining("train_ar.py", folder, **FLAGS, max_steps=9, resume=middle, code=2)
    assert "max_steps: checkpoint 6, now 9" in err
    assert differing_tensors(state, final_state(folder)) == [] and record_of(folder)["finished"]


def test_an_extension_that_did_not_begin_leaves_the_run_as_it_was(folder: Path, monkeypatch):
    """Killed before its first save, and then not wanted: the record is again that of the shorter run."""
    run_pretraining("train_mdm.py", folder, **FLAGS, max_steps=3)
    before = record_of(folder)

    def killed(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "restore", killed)
        with pytest.raises(MemoryError):
            run_pretraining("train_mdm.py", folder, **FLAGS, max_steps=20)
    assert record_of(folder)["settings"]["max_steps"] == 20 and not record_of(folder)["finished"]
    run_pretraining("train_mdm.py", folder, **FLAGS, max_steps=3)
    after = record_of(folder)
    assert after["finished"] and after["settings"] == before["settings"] and after["result"] == before["result"]


def test_a_longer_run_under_the_published_name_is_told_of_the_shorter(folder: Path):
    flags = {"val_samples": 0, "keep_checkpoints": 0} | FLAT
    run_pretraining("train_ar.py", folder, **flags, max_steps=4)
    (shorter,) = folder.glob("workdir/*/*")
    out, _ = run_pretraining("train_ar.py", folder, **flags, max_steps=8, resume="auto")
    line = f"{shorter.relative_to(folder)} is a finished run of these settings with fewer steps: --resume "
    assert line in out and "resumed" not in out
    out, _ = run_pretraining("train_ar.py", folder, **flags, max_steps=12, resume=shorter.relative_to(folder))
    assert "resumed at step 4 of 12" in out and "extended: the run had ended at step 4" in out
    assert len(list(folder.glob("workdir/*/*"))) == 3 and json.loads((shorter / "run.json").read_text())["finished"]


def test_a_warmup_that_is_longer_than_the_run_is_said(folder: Path):
    flags = FLAGS | {"max_steps": 4, "learning_rate": 1e-3}
    out, _ = run_pretraining("train_ar.py", folder, **flags | {"warmup_steps": 10})
    assert "the warmup of 10 steps is not over when the run ends: the learning rate gets no higher than 0.0004; " in out
    out, _ = run_pretraining("train_ar.py", folder, **flags | {"warmup_steps": 2, "name": "other"})
    assert "is not over" not in out
