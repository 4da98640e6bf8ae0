"""The micro batch: chosen from the memory that small ones take, or estimated from what the model is given to read."""

from __future__ import annotations

import pytest
import torch

from lit_gpt.config import Config
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.model.visibility import Visibility
from lit_gpt.training import micro_batch
from lit_gpt.training.micro_batch import MemoryReading


def terms(columns: int, visibility: Visibility | None = None) -> LossTerms:
    ids = torch.zeros(1, columns, dtype=torch.int64)
    return LossTerms(ids, ids, torch.ones(1, columns), torch.ones(1, columns, dtype=torch.bool), visibility=visibility)


def model() -> TransEncoder:
    with torch.device("meta"):
        return TransEncoder(Config.from_name(170))


def sizes(columns: int, memory: float, monkeypatch: pytest.MonkeyPatch, visibility: Visibility | None = None) -> int:
    """What is taken for 48 rows on a CPU with so many bytes."""
    monkeypatch.setattr(micro_batch.os, "sysconf", lambda name: memory**0.5)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    return micro_batch.size_by_estimate(model(), terms(columns, visibility), 48)


def test_a_gpu_takes_the_largest_divisor_that_two_small_sizes_promise():
    """700 bytes whatever the rows, 100 a row, 1000 of the optimizer; 0.9 of 5000 bytes hold 28 rows of them."""
    measured = []

    def measure(rows: int) -> MemoryReading:
        measured.append(rows)
        return MemoryReading(peak=700 + 100 * rows, available=5000)

    assert micro_batch.size_by_measurement(measure, 48, 1000) == 24
    assert micro_batch.size_by_measurement(measure, 7, 1000) == 7
    assert micro_batch.size_by_measurement(measure, 1, 1000) == 1
    assert micro_batch.size_by_measurement(measure, 48, 3700) == 1
    assert micro_batch.size_by_measurement(measure, 48, 4500) == 1
    assert set(measured) == {1, 2}


def test_memory_that_ends_while_measuring():
    one = MemoryReading(peak=900, available=1000)
    assert micro_batch.size_by_measurement(lambda rows: one if rows == 1 else None, 8, 0) == 1
    with pytest.raises(ValueError, match="not even one sequence fits into memory"):
        micro_batch.size_by_measurement(lambda rows: None, 8, 0)


def test_the_optimizer_holds_two_moments_of_every_parameter():
    """What AdamW allocates in its first step, but for the steps' numbers."""
    parameters = [torch.nn.Parameter(torch.zeros(3, 5)), torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert micro_batch.optimizer_bytes(parameters) == sum(value.numel() * value.element_size() for value in states)


def test_nobody_counts_a_cpus_memory():
    assert micro_batch.read_memory(torch.device("cpu")) is None


def test_a_cpu_takes_the_largest_divisor_within_its_memory(monkeypatch: pytest.MonkeyPatch):
    assert sizes(64, 1e15, monkeypatch) == 48
    # 8192 tokens are enough for any CPU.
    assert sizes(1024, 1e15, monkeypatch) == 8
    assert sizes(1024, 1e3, monkeypatch) == 1


def test_more_columns_and_a_mask_take_more_memory(monkeypatch: pytest.MonkeyPatch):
    memory = 20e9
    plain, wide = sizes(256, memory, monkeypatch), sizes(512, memory, monkeypatch)
    assert plain > wide >= 1
    blocks = Visibility(rule=lambda query, key: key // 4 <= query // 4)
    row = micro_batch._activation_bytes(model(), terms(512))
    masked = micro_batch._activation_bytes(model(), terms(512, blocks))
    # A number of four bytes for every pair in every block.
    assert masked - row == 4 * 512 * 512 * model().config.n_layer
    assert micro_batch._activation_bytes(model(), terms(512, Visibility(causal=True))) == row
