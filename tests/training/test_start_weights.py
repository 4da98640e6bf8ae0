"""The weights that training starts from: the same numbers on any processes, made without a whole model on each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.checkpoints.export import WeightsRecord, export_weights
from lit_gpt.checkpoints.weights import state_hash
from lit_gpt.config import Config
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.layers import Transformer, rope_tables
from lit_gpt.training import prepared_model, strategies
from tests.support.training_runs import ROOT, make_packed_data, read_losses, run_pretraining, run_python

CONFIG = Config("small", 2, 2, 32, 48, 2, block_size=16, vocab_size=100, rope_table_dtype="float32")

CHILD = """
import json, sys
import torch
from torch.distributed.tensor import DTensor
from lit_gpt.checkpoints.weights import state_hash
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.training import strategies
from tests.training.test_start_weights import CONFIG

strategy, precision = sys.argv[1:]
torch.set_num_threads(1)
with torch.device("meta"):
    module = TransEncoder(CONFIG)
fabric = strategies.start_fabric("cpu", "2", 1, strategy, precision)
generator = torch.get_rng_state()
model = strategies.set_up_model(fabric, module)
held = [0]

def value(name):
    own = (one.to_local() if isinstance(one, DTensor) else one for one in module.parameters())
    held.append(sum(one.numel() for one in own))
    return module.initial_weight(7, name)

strategies.fill_weights(module, value)
whole = {
    name: one.full_tensor() if isinstance(one, DTensor) else one.detach() for name, one in module.named_parameters()
}
tables = {"cos": module.rope_cos, "sin": module.rope_sin}
found = {
    "weights": state_hash(whole), "tables": state_hash(tables), "held": max(held), "of": module.parameter_count,
    "global generator moved": not torch.equal(generator, torch.get_rng_state()),
}
for rank in range(2):
    fabric.barrier()
    if rank == fabric.global_rank:
        print(json.dumps(found), flush=True)
"""


@pytest.mark.parametrize(("strategy", "precision"), [("ddp", "32-true"), ("fsdp", "32-true"), ("fsdp", "bf16-true")])
def test_two_processes_start_from_the_numbers_of_one(tmp_path: Path, strategy: str, precision: str):
    """Bit for bit; under FSDP2 each holds half of the model from the first number on."""
    (tmp_path / "child.py").write_text(CHILD)
    done = run_python(ROOT, tmp_path / "child.py", strategy, precision)
    assert "Parameter initialization incomplete" not in done.stderr  # Fabric's, which would have drawn on its own
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    model = TransEncoder(CONFIG)
    model.init_weights(7)
    cos, sin = rope_tables(CONFIG)
    for found in map(json.loads, done.stdout.splitlines()):
        assert found.pop("held") <= model.parameter_count * (1.0 if strategy == "ddp" else 0.51)
        assert found == {
            "weights": state_hash(model.state_dict(), dtype),
            "tables": state_hash({"cos": cos, "sin": sin}, dtype),
            "of": model.parameter_count,
            "global generator moved": False,
        }
    assert len(done.stdout.splitlines()) == 2


def watch_start(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`state_hash` of the model of every run from now on, when it was filled."""
    real, hashes = strategies.fill_weights, []

    def watched(module: Transformer, value: Any) -> None:
        real(module, value)
        hashes.append(state_hash(module.state_dict()))

    monkeypatch.setattr(prepared_model.strategies, "fill_weights", watched)
    return hashes


def test_a_run_starts_from_the_drawn_or_the_given_weights(tmp_path, monkeypatch):
    hashes = watch_start(monkeypatch)
    make_packed_data(tmp_path / "data")
    run_pretraining("train_mdm.py", tmp_path, max_steps=1, seed=11)
    model = TransEncoder(Config.from_name(6, n_layer=2, n_head=2, n_embd=32, intermediate_size=64, n_query_groups=2,
                                          vocab_size=64, block_size=32))  # fmt: skip
    model.init_weights(11)
    assert hashes == [state_hash(model.state_dict())]
    model.init_weights(12)
    record = WeightsRecord("mdm", model.config)
    path = export_weights(tmp_path / "given", "given", model.state_dict(), record)
    run_pretraining("train_mdm.py", tmp_path, max_steps=1, seed=11, init_from=path, resume="never", overwrite=True)
    assert hashes[1:] == [state_hash(model.state_dict())]


def test_a_resumed_run_draws_nothing(tmp_path, monkeypatch):
    make_packed_data(tmp_path / "data")
    flags = {"max_steps": 4, "save_interval": 2, "keep_checkpoints": 0, "log_interval": 1}
    run_pretraining("train_mdm.py", tmp_path, **flags)
    unbroken = read_losses(tmp_path)
    (half,) = (path for path in tmp_path.glob("workdir/*/*/iter-*.pth") if torch.load(path)["step_count"] == 2)
    monkeypatch.setattr(Transformer, "initial_weight", lambda *_: pytest.fail("drew weights"))
    run_pretraining("train_mdm.py", tmp_path, **flags, resume=half)
    assert read_losses(tmp_path) == unbroken
    assert len(unbroken) == 4
