"""The micro batch: what is tried, and that memory is estimated from what the model is given to read."""

from __future__ import annotations

import pytest
import torch

from lit_gpt.config import Config
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.model.visibility import Visibility
from lit_gpt.training import micro_batch

CPU = torch.device("cpu")


def terms(columns: int, visibility: Visibility | None = None) -> LossTerms:
    ids = torch.zeros(1, columns, dtype=torch.int64)
    return LossTerms(ids, ids, torch.ones(1, columns), torch.ones(1, columns, dtype=torch.bool), visibility=visibility)


def model() -> TransEncoder:
    with torch.device("meta"):
        return TransEncoder(Config.from_name(170))


def sizes(
    columns: int, memory: float, monkeypatch: pytest.MonkeyPatch, visibility: Visibility | None = None
) -> list[int]:
    """What is tried for 48 rows on a CPU with so many bytes."""
    monkeypatch.setattr(micro_batch.os, "sysconf", lambda name: memory**0.5)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    return micro_batch.sizes_to_try(model(), terms(columns, visibility), 48, CPU)


def test_a_gpu_tries_every_divisor():
    assert micro_batch.sizes_to_try(model(), terms(8), 12, torch.device("cuda")) == [1, 2, 3, 4, 6, 12]


def test_a_cpu_takes_the_largest_divisor_within_its_memory(monkeypatch: pytest.MonkeyPatch):
    assert sizes(64, 1e15, monkeypatch) == [48]
    # 8192 tokens are enough for any CPU.
    assert sizes(1024, 1e15, monkeypatch) == [8]
    assert sizes(1024, 1e3, monkeypatch) == [1]


def test_more_columns_and_a_mask_take_more_memory(monkeypatch: pytest.MonkeyPatch):
    memory = 20e9
    plain, wide = sizes(256, memory, monkeypatch), sizes(512, memory, monkeypatch)
    assert plain[0] > wide[0] >= 1
    blocks = Visibility(rule=lambda query, key: key // 4 <= query // 4)
    row = micro_batch._activation_bytes(model(), terms(512))
    masked = micro_batch._activation_bytes(model(), terms(512, blocks))
    # A number of four bytes for every pair in every block.
    assert masked - row == 4 * 512 * 512 * model().config.n_layer
    assert micro_batch._activation_bytes(model(), terms(512, Visibility(causal=True))) == row
