"""Memory that does not suffice: training goes on with a smaller micro batch, and its numbers are those of that one.

Out of memory is played by a model that raises torch's error in the middle of a backward pass, and a GPU's memory by
readings that grow with the rows; the rest is real, on CPU processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_gpt.config import Config
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.layers import Block
from lit_gpt.training import micro_batch
from lit_gpt.training.micro_batch import MemoryReading
from lit_gpt.training.objectives import MaskedDiffusion
from lit_gpt.training.pretraining import PretrainingRecipe, pretrain
from lit_gpt.training.settings import PretrainConfig
from tests.support.training_runs import (
    ROOT,
    SHAPE,
    final_state,
    make_packed_data,
    one_thread_environment,
    read_losses,
    run_pretraining,
)


class Hungry(TransEncoder):
    """Runs out of memory, halfway through a backward pass."""

    largest = 10**9
    """Rows that it has the memory for."""
    short_pass: int | None = None
    """The backward pass, counted from 0, in which the memory is gone whatever the rows."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.passes = 0
        self.rows_since_reading = 0
        self.transformer.h[0].register_forward_hook(self.watch)

    def watch(self, block: Block, arguments: Any, output: Tensor) -> None:
        if not output.requires_grad:
            return
        self.rows_since_reading = max(self.rows_since_reading, output.size(0))
        short = output.size(0) > self.largest or self.passes == self.short_pass
        self.passes += 1

        def fail(gradient: Tensor) -> None:
            raise torch.OutOfMemoryError("played")

        if short:
            output.register_hook(fail)


def run(folder: str, flags: dict[str, Any], hungry: dict[str, Any], rows_of_memory: list[int] | None) -> None:
    """Train in this process, which may start others: `rows_of_memory` by process, where a GPU's memory is played."""
    base = {**SHAPE, "data_dir": f"{folder}/data", "out_dir": f"{folder}/workdir", "log_dir": f"{folder}/out"}
    config = PretrainConfig(
        **{**base, "models_dir": f"{folder}/models", "accelerator": "cpu", "log_interval": 1, **flags}
    )
    models: list[Hungry] = []

    class Model(Hungry):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            models.append(self)

    for name, value in hungry.items():
        setattr(Model, name, value)

    def played_memory(device: torch.device) -> MemoryReading:
        rows, models[0].rows_since_reading = models[0].rows_since_reading, 0
        assert rows_of_memory is not None
        # Nine tenths are for us; the reserve is the optimizer's.
        reserve = micro_batch.optimizer_bytes(models[0].parameters())
        own = rows_of_memory[int(os.environ.get("LOCAL_RANK", "0"))]
        return MemoryReading(1000 + 500 * rows, int((1000 + 500 * own + reserve) / 0.9) + 1)

    if rows_of_memory is not None:
        micro_batch.read_memory = played_memory
    recipe = PretrainingRecipe(
        "train_mdm",
        Model,
        lambda shape: MaskedDiffusion(shape.block_size, shape.mask_id, config.seed, config.batch_size),
    )
    pretrain(recipe, config)


def run_apart(folder: Path, rows_of_memory: list[int] | None = None, hungry: Any = None, **flags: Any) -> str:
    """`run` in processes of its own; what it printed."""
    make_packed_data(folder / "data")
    # A file, because a second process is started by the first one's command line.
    script = folder / "train.py"
    arguments = json.dumps([str(folder), {"max_steps": 6, **flags}, hungry or {}, rows_of_memory])
    script.write_text(
        "import json\nfrom lit_gpt import cli\nfrom tests.training.test_out_of_memory import run\n"
        f"cli.run(lambda: run(*json.loads({arguments!r})))\n"
    )
    environment = {**one_thread_environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(folder: Path) -> list[dict[int, float]]:
    return [read_losses(folder, name) for name in ("metric/train_loss", "metric/grad_norm", "total_tokens")]


@pytest.mark.parametrize(("devices", "strategy"), [(1, "fsdp"), (2, "ddp")])
def test_a_pass_that_runs_out_of_memory_leaves_nothing_behind(tmp_path: Path, devices: int, strategy: str):
    """Before the first step and within it: the curve is that of the micro batch that the run ends with."""
    rows = 8 // devices
    placed = {"devices": str(devices), "strategy": strategy}
    run_apart(tmp_path / "small", **placed, micro_batch_size=rows // 4)
    curves = metrics(tmp_path / "small")
    assert len(curves[1]) == 6 and min(curves[1].values()) > 0
    # All rows do not fit from the start.
    out = run_apart(tmp_path / "start", hungry={"largest": rows // 4}, **placed, micro_batch_size=rows)
    assert f"a micro batch of {rows} does not fit into memory: going on with {rows // 2}" in out
    assert metrics(tmp_path / "start") == curves
    # Pass 0 is the rehearsal; the second of the first step's two passes fails, with gradients from the first.
    out = run_apart(tmp_path / "step", hungry={"short_pass": 2}, **placed, micro_batch_size=rows // 2)
    assert out.index("device: ") < out.index(f"a micro batch of {rows // 2} does not fit")
    assert metrics(tmp_path / "step") == curves


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_least_memory_decides_for_all_processes(tmp_path: Path, strategy: str):
    out = run_apart(tmp_path, rows_of_memory=[20, 3], devices="2", strategy=strategy, batch_size=24)
    assert "micro batch 3, " in out and "does not fit" not in out
    assert min(metrics(tmp_path)[1].values()) > 0


def test_one_row_that_does_not_fit_is_one_line(tmp_path: Path):
    with pytest.raises(AssertionError, match="error: not even one sequence fits into memory"):
        run_apart(tmp_path, hungry={"largest": 0}, devices="1", strategy="fsdp")


def test_only_the_chosen_micro_batch_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the number of sizes that could be: torch compiles a function eight times and then no more."""
    compiled_rows = set()

    def compile_played(block: Block, **settings: Any) -> None:
        def call(x: Tensor, *arguments: Any) -> Tensor:
            compiled_rows.add(x.size(0))
            return Block._call_impl(block, x, *arguments)

        block._compiled_call_impl = call

    monkeypatch.setattr(Block, "compile", compile_played)
    monkeypatch.setattr(micro_batch, "read_memory", micro_batch.read_memory)
    make_packed_data(tmp_path / "data")
    run(str(tmp_path), {"max_steps": 2, "batch_size": 60, "compile": "on", "val_samples": 0}, {}, [17])
    assert compiled_rows == {15}


def test_a_loss_without_a_gradient_ends_the_run(tmp_path: Path):
    """Weights that are all zero pass every gradient through a zero."""
    from safetensors.torch import save_file

    make_packed_data(tmp_path / "data")
    run_pretraining("train_mdm.py", tmp_path, max_steps=1, val_samples=0)
    state = {name: value for name, value in final_state(tmp_path).items() if name.startswith("model.")}
    save_file({name[6:]: torch.zeros_like(value) for name, value in state.items()}, tmp_path / "zero.safetensors")
    _, err = run_pretraining(
        "train_mdm.py", tmp_path, code=2, max_steps=5, init_from="zero.safetensors", out_dir="zero"
    )
    assert err.count("\n") == 1 and "gradient norm 0.0: no weight would learn, stopped before the update" in err


def test_a_step_without_a_scored_position_goes_on(tmp_path: Path):
    """One short row a step, masked at a rate near zero now and then: nothing is scored, and that is no fault."""
    make_packed_data(tmp_path / "data")
    run_pretraining("train_mdm.py", tmp_path, max_steps=60, batch_size=1, block_size=2, log_interval=1, val_samples=0)
    losses, norms = metrics(tmp_path)[:2]
    nothing = [step for step, loss in losses.items() if loss == 0]
    assert nothing and all(norms[step] == 0 for step in nothing) and len(losses) == 60
