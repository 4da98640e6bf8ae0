"""How processes share a model: which strategy is taken, and that its numbers are those of one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lit_gpt import devices
from lit_gpt.training import strategies
from tests.support.training_runs import make_packed_data, read_losses, run_pretraining, run_pretraining_process


@pytest.mark.parametrize(
    ("asked", "processes", "parameters", "taken"),
    [
        ("auto", 1, 2 * 10**9, "auto"),
        ("auto", 2, 999_999_999, "ddp"),
        ("auto", 16, 10**9, "fsdp"),
        ("ddp", 16, 10**9, "ddp"),
        ("hybrid", 16, 10, "hybrid"),
    ],
)
def test_a_models_size_decides_whether_it_is_sharded(asked, processes, parameters, taken):
    assert strategies._strategy_name(asked, processes, parameters) == taken


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_in_bfloat16_have_the_losses_of_one(tmp_path: Path, strategy: str):
    """Fabric's own precision rounds the weights of the loss to bfloat16 under DDP: 7e-4 of it here."""
    flags = {"max_steps": 3, "log_interval": 1, "val_samples": 0, "precision": "bf16-mixed", "micro_batch_size": 4}
    curves = []
    for folder, processes in ((tmp_path / "one", 1), (tmp_path / "two", 2)):
        make_packed_data(folder / "data")
        start = run_pretraining if processes == 1 else run_pretraining_process
        start("train_mdm.py", folder, **flags, devices=processes, strategy=strategy if processes > 1 else "auto")
        curves.append([read_losses(folder), read_losses(folder, "metric/grad_norm")])
    one, two = curves
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    assert two[1] == pytest.approx(one[1], rel=1e-4)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_are_expandable_unless_the_user_says_otherwise(monkeypatch, name):
    monkeypatch.setattr(os, "environ", {})
    devices.use_expandable_segments()
    assert os.environ == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setattr(os, "environ", {name: "max_split_size_mb:64"})
    devices.use_expandable_segments()
    assert os.environ == {name: "max_split_size_mb:64"}
