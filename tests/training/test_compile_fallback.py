"""A machine whose compiler does not work: training goes on without it, blocks and loss alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.model import kernels
from tests.support.training_runs import make_packed_data, read_losses, run_pretraining


@pytest.fixture
def broken_compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A C++ compiler that is not there, nothing compiled earlier, and a loss that is compiled as on a GPU."""
    from torch._inductor import config

    choose = kernels.choose

    def choose_for_gpu(kernel: str, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> str:
        return choose("torch", torch.device("cuda"), dtype, compiled)

    monkeypatch.setattr(kernels, "choose", choose_for_gpu)
    monkeypatch.setattr(kernels, "_compile_loss", False)
    kernels._compiled_softmax_gradient.cache_clear()
    torch.compiler.reset()
    with config.patch({"cpp.cxx": ("/nowhere/c++",), "force_disable_caches": True}):
        yield
    kernels._compiled_softmax_gradient.cache_clear()
    torch.compiler.reset()


@pytest.mark.parametrize("script", ["train_ar.py", "train_mdm.py"])
def test_a_compiler_that_fails_is_gone_without(broken_compiler: None, tmp_path: Path, script: str):
    make_packed_data(tmp_path / "data")
    # Long enough for `auto` to compile.
    flags = {"max_steps": 200, "compile": "auto", "log_interval": 100, "val_samples": 0}
    out, _ = run_pretraining(script, tmp_path, **flags)
    assert out.count("torch.compile does not work here") == 1
    assert "rms_norm, rotary and swiglu torch; linear + cross-entropy torch" in out
    assert len(read_losses(tmp_path)) == 3
