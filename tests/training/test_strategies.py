"""How processes share a model: which strategy is taken, and that its numbers are those of one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lit_gpt import devices
from lit_gpt.training import strategies
from tests.support.training_runs import make_packed_data, read_losses, run_pretraining
from tests.support.watched_training import watch


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
    assert strategies.strategy_name(asked, processes, parameters) == taken


# In a step of four micro batches on each device, for three blocks and the rest of the model; and the loss's sum, in float64.
SENT = {
    ("ddp", "bf16-mixed"): {"allreduce float32": 1},
    ("fsdp", "32-true"): {"allgather_base float32": 4, "reduce_scatter_base float32": 4},
    ("fsdp", "bf16-mixed"): {
        "allgather_base bfloat16": 3, "allgather_base float32": 1, "reduce_scatter_base float32": 4,
    },
}  # fmt: skip
# FSDP2 rounds the blocks' norms to bfloat16 besides, and the gradients of what it has gathered.
TOLERANCE = {("ddp", "bf16-mixed"): 1e-6, ("fsdp", "32-true"): 1e-6, ("fsdp", "bf16-mixed"): 2e-3}


@pytest.mark.parametrize(("strategy", "precision"), SENT)
def test_two_processes_send_what_they_must_and_have_the_losses_of_one(tmp_path: Path, strategy: str, precision: str):
    """Fabric's own precision rounds the weights of the loss to bfloat16 under DDP: 7e-4 of it here."""
    flags = {"max_steps": 3, "log_interval": 1, "val_samples": 0, "micro_batch_size": 1, "n_layer": 3}
    flags["precision"] = precision
    make_packed_data(tmp_path / "one" / "data")
    run_pretraining("train_mdm.py", tmp_path / "one", **flags)
    found = watch("train_mdm.py", tmp_path / "two", **flags, devices=2, strategy=strategy)
    # In the first steps the processes agree on whether the memory sufficed, and DDP lays its buckets out anew.
    assert found["collectives"][-1] == {**SENT[strategy, precision], "allreduce float64": 1}
    for name in ("metric/train_loss", "metric/grad_norm"):
        one, two = (read_losses(tmp_path / folder, name) for folder in ("one", "two"))
        assert two == pytest.approx(one, rel=TOLERANCE[strategy, precision])


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_are_expandable_unless_the_user_says_otherwise(monkeypatch, name):
    monkeypatch.setattr(os, "environ", {})
    devices.use_expandable_segments()
    assert os.environ == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setattr(os, "environ", {name: "max_split_size_mb:64"})
    devices.use_expandable_segments()
    assert os.environ == {name: "max_split_size_mb:64"}
