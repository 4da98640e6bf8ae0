"""Which precision a machine gets: bfloat16 where the hardware multiplies it, not where torch emulates it."""

from __future__ import annotations

import pytest
import torch

from lit_gpt import devices
from lit_gpt.checkpoints.loaded import compute_dtype


@pytest.mark.parametrize(
    ("native", "precision", "dtype"), [(True, "bf16-mixed", "bfloat16"), (False, "32-true", "float32")]
)
def test_emulated_bfloat16_does_not_count(monkeypatch, native, precision, dtype):
    """Torch says yes for a GPU such as a V100, too, unless it is asked about the hardware."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert devices.has_native_bf16("cuda") is native
    assert devices.default_precision("cuda") == precision
    assert compute_dtype("auto", torch.device("cuda")) == dtype
    assert compute_dtype("bfloat16", torch.device("cuda")) == "bfloat16", "asked for, it is used"


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_a_cpu_trains_in_bfloat16_with_either_extension(monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert devices.default_precision("cpu") == ("bf16-mixed" if avx512 or amx else "32-true")
    assert compute_dtype("auto", torch.device("cpu")) == "float32", "evaluations on CPUs are in float32"
