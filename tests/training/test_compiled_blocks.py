"""Blocks that torch.compile made, in several processes: their losses are the eager ones', and nothing is compiled twice."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests.support.gpus import DEVICES
from tests.support.training_runs import make_packed_data, read_losses, read_metrics, run_pretraining
from tests.support.watched_training import watch

# On CPUs only the order of sums differs; GPUs round float32 products to TF32 in training (relative 5e-4 each).
TOLERANCE = {"cpu": 1e-6, "cuda": 5e-3}
# The blocks, which share their code; on GPUs the softmax of the loss besides.
GRAPHS = {"cpu": 1, "cuda": 2}


# Compiling takes a minute and more where nothing is cached.
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_blocks_have_the_eager_losses_and_a_cut_group_compiles_nothing(
    tmp_path: Path, device: str, strategy: str
):
    """Half of the groups are cut to a random length, which would be another graph each; they run eagerly."""
    flags = {"max_steps": 12, "log_interval": 1, "val_samples": 0, "n_layer": 3, "ssl_ratio": 0.5}
    flags["accelerator"] = device
    make_packed_data(tmp_path / "eager" / "data")
    run_pretraining("train_mdm_rl.py", tmp_path / "eager", **flags, devices=1)
    count = 2 if device == "cpu" else min(2, torch.cuda.device_count())
    found = watch("train_mdm_rl.py", tmp_path / "compiled", **flags, compile="on", devices=count, strategy=strategy)
    assert found["graphs"] == GRAPHS[device]
    for name in ("metric/train_loss", "metric/grad_norm"):
        eager, compiled = (read_losses(tmp_path / folder, name) for folder in ("eager", "compiled"))
        assert len(eager) == 12
        assert compiled == pytest.approx(eager, rel=TOLERANCE[device])
    # There were full steps, and cut ones of several lengths.
    totals = [int(row["total_tokens"]) for row in read_metrics(tmp_path / "compiled") if row["total_tokens"]]
    tokens = {after - before for before, after in itertools.pairwise([0, *totals])}
    assert max(tokens) == 8 * 32 and len(tokens) > 2
