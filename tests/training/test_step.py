"""A training step: the host asks the device for nothing, and no update happens on numbers that are not finite."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_gpt.training import loop
from lit_gpt.training.step_guard import StepGuard
from tests.support.far_device import makes_the_host_wait
from tests.support.training_runs import make_packed_data, run_pretraining, run_pretraining_process


class CountWaits(TorchDispatchMode):
    """Notes the operations of this thread for which the host of a GPU would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if makes_the_host_wait(func, args):
            self.waits.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("script", ["train_ar.py", "train_mdm.py", "train_mdm_rl.py"])
def test_a_step_asks_the_device_for_nothing(tmp_path, monkeypatch, script):
    """Of the steps of two intervals, whatever their lengths and masks, none waits; the log is read between them."""
    real, waits = loop._Trainer._train_step, []

    def counted(*args: Any) -> Any:
        with CountWaits() as mode:
            result = real(*args)
        waits.append(mode.waits)
        return result

    monkeypatch.setattr(loop._Trainer, "_train_step", counted)
    make_packed_data(tmp_path / "data")
    extra = {"ssl_ratio": 0.5} if script == "train_mdm_rl.py" else {}
    run_pretraining(script, tmp_path, max_steps=20, micro_batch_size=4, **extra)
    assert waits == [[]] * 20


def guarded_step(gradient: float, guard: StepGuard, optimizer: torch.optim.Optimizer, step: int) -> None:
    (weight,) = optimizer.param_groups[0]["params"]
    weight.grad = torch.full_like(weight, gradient)
    guard.judge(step, torch.tensor(0.5, dtype=torch.float64), weight.grad.norm())
    optimizer.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_from_a_bad_step_on_nothing_moves_until_the_host_has_looked(bad):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, guard = torch.optim.AdamW([weight], fused=True), StepGuard(torch.device("cpu"))
    optimizer.found_inf = guard.skip
    guarded_step(1.0, guard, optimizer, 1)
    newest, failed = guard.read()
    assert newest == (1, 0.5, pytest.approx(3**0.5)) and failed is None
    before = [weight.detach().clone(), *(value.clone() for value in optimizer.state[weight].values())]
    assert not torch.equal(weight, torch.ones(3))
    for step, gradient in ((2, bad), (3, 1.0), (4, bad)):
        guarded_step(gradient, guard, optimizer, step)
    after = [weight, *optimizer.state[weight].values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    newest, failed = guard.read()
    assert newest.step == 4 and failed is not None and failed.step == 2


@pytest.mark.parametrize("flags", [{}, {"devices": 2, "strategy": "ddp"}, {"devices": 2, "strategy": "fsdp"}])
def test_a_step_that_is_not_finite_is_named_at_the_next_line_of_the_log(tmp_path, flags):
    """At this rate the second step overflows; the log's tenth step says so, and no checkpoint holds what came of it."""
    make_packed_data(tmp_path / "data")
    start = run_pretraining_process if flags else run_pretraining
    settings = {"max_steps": 30, "learning_rate": 1e30, "grad_clip": 0, "warmup_steps": 0, "save_interval": 1000}
    out, err = start("train_mdm.py", tmp_path, code=2, **settings, **flags)
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    step = int(re.search(r"error: step (\d+): loss", line)[1])
    assert 1 < step <= 10 and "not finite, stopped before the update; there is no checkpoint yet" in line
    assert "step 10:" not in out and "Traceback" not in err
    assert not list(tmp_path.glob("workdir/*/*/iter-*"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here")
def test_a_step_on_a_gpu_makes_the_host_wait_for_nothing(tmp_path, monkeypatch):
    real, steps = loop._Trainer._train_step, []

    def watched(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error" if steps else "default")  # the first step's allocations may wait
        try:
            real(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        steps.append(args)

    monkeypatch.setattr(loop._Trainer, "_train_step", watched)
    make_packed_data(tmp_path / "data")
    run_pretraining("train_mdm.py", tmp_path, max_steps=12)
    assert len(steps) == 12
