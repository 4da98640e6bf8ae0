"""Training on either device by the same command: the micro batch is found, and a run goes on where it was not begun."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.gpus import DEVICES
from tests.support.training_runs import make_packed_data, read_losses, run_pretraining

# GPUs round float32 products to TF32 in training (relative 5e-4 each); CPUs do not.
TOLERANCE = {"cpu": 1e-5, "cuda": 5e-3}


def assert_close(one: dict[int, float], other: dict[int, float], tolerance: float) -> None:
    assert one.keys() == other.keys()
    assert max(abs(one[step] / other[step] - 1) for step in one) <= tolerance


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_micro_batch_that_is_found_changes_no_number(tmp_path: Path, device: str, strategy: str):
    """On a GPU it is found from the memory of two small ones."""
    curves = []
    for size in (0, 2):
        folder = tmp_path / str(size)
        make_packed_data(folder / "data")
        flags = {"max_steps": 8, "log_interval": 1, "devices": 1, "strategy": strategy, "accelerator": device}
        out, _ = run_pretraining("train_mdm.py", folder, **flags, **({"micro_batch_size": size} if size else {}))
        assert f"device: 1 x {device}" in out and f"micro batch {size or 8}," in out
        assert min(read_losses(folder, "metric/grad_norm").values()) > 0
        curves.append(read_losses(folder))
    assert_close(*curves, TOLERANCE[device])


@pytest.mark.parametrize("second", DEVICES)
@pytest.mark.parametrize("first", DEVICES)
def test_a_run_goes_on_on_another_device(tmp_path: Path, first: str, second: str):
    make_packed_data(tmp_path / "data")
    flags = {"max_steps": 10, "save_interval": 5, "keep_checkpoints": 0, "log_interval": 1, "devices": 1}
    run_pretraining("train_mdm.py", tmp_path, **flags, accelerator=first)
    unbroken = read_losses(tmp_path)
    paths = tmp_path.glob("workdir/*/*/iter-*-ckpt.pth")
    (middle,) = (path for path in paths if json.loads(path.with_suffix(".json").read_text())["step"] == 5)
    flags |= {"overwrite": "true", "resume": middle}
    out, _ = run_pretraining("train_mdm.py", tmp_path, **flags, accelerator=second)
    assert "resumed at step 5 of 10" in out and f"device: 1 x {second}" in out
    tolerance = 0 if first == second == "cpu" else TOLERANCE["cuda"]
    assert_close(read_losses(tmp_path), unbroken, tolerance)
