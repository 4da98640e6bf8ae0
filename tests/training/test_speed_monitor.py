"""Speed: FLOPs of a batch counted product by product, and rates between two lines of the log."""

from __future__ import annotations

import time

import pytest
import torch

from lit_gpt.config import Config
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.model.visibility import Visibility
from lit_gpt.training.speed_monitor import (
    RATE_COLUMNS,
    MicroBatchWork,
    SpeedMonitor,
    format_seconds,
    peak_flops,
    peak_memory,
    training_flops,
)
from tests.support.gpus import DEVICES

TINY = Config("tiny", 3, 4, 32, 64, 2, block_size=64, vocab_size=100)
ROWS, LENGTH, SCORED = 2, 10, 7


def products(visible_pairs: int) -> int:
    """FLOPs of the forward pass, 2 per multiplication, product by product."""
    tokens, width, size = ROWS * LENGTH, TINY.n_embd, TINY.head_size
    qkv = tokens * width * (TINY.n_head + 2 * TINY.n_query_groups) * size
    mlp = 3 * tokens * width * TINY.intermediate_size
    # Per head and pair: a dot product for the score and a multiple of the value.
    attention = 2 * TINY.n_head * size * visible_pairs
    block = qkv + tokens * width * width + mlp + attention
    return 2 * (TINY.n_layer * block + SCORED * width * TINY.padded_vocab_size)


@pytest.mark.parametrize(
    ("visibility", "pairs"),
    [
        (Visibility(), 100),
        (Visibility(causal=True), 55),
        (Visibility(rule=lambda query, key: key // 5 == query // 5), 50),
    ],
    ids=["full", "causal", "blocks"],
)
def test_flops_are_three_times_those_of_the_forward_pass(visibility: Visibility, pairs: int):
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    terms = LossTerms(ids, ids, torch.ones(ROWS, LENGTH), torch.ones(ROWS, LENGTH, dtype=torch.bool))
    found = training_flops(TINY, terms, visibility, SCORED)
    # The norms' weights are parameters as well; they are what little is left.
    norms = 6 * ROWS * LENGTH * TINY.n_embd * (2 * TINY.n_layer + 1)
    assert found == 3 * products(ROWS * pairs) + norms


def test_rates_are_of_what_was_done_since_the_last_call():
    monitor = SpeedMonitor(world_size=4, peak_flops=1e9)
    monitor.rates()
    for samples, tokens in ((3, 30), (2, 20)):
        monitor.add_micro_batch(MicroBatchWork(samples, tokens, 1000.0))
        time.sleep(0.02)
        rates = monitor.rates()
        assert set(rates) == set(RATE_COLUMNS)
        span = 4 * samples / rates["throughput/samples_per_sec"]
        assert span >= 0.02
        assert rates["throughput/tokens_per_sec"] == pytest.approx(4 * tokens / span)
        assert rates["throughput/batches_per_sec"] == pytest.approx(4 / span)
        assert rates["throughput/device/flops_per_sec"] == pytest.approx(1000 / span)
        assert rates["throughput/device/mfu"] == pytest.approx(1000 / span / 1e9)
    assert monitor.rates()["throughput/tokens_per_sec"] == 0


def test_validation_is_no_training_time():
    monitor = SpeedMonitor(world_size=1)
    monitor.add_validation(100.0)
    rates = monitor.rates()
    assert rates["time/val"] == 100 and rates["time/train"] == pytest.approx(rates["time/total"] - 100)


def test_waiting_for_data_is_what_the_reader_takes_and_not_the_step():
    def slow_reader():
        for step in range(3):
            time.sleep(0.02)
            yield step

    monitor, begun, seen = SpeedMonitor(world_size=1), time.perf_counter(), []
    for step in monitor.waited(slow_reader()):
        seen.append(step)
        time.sleep(0.04)
    took = time.perf_counter() - begun
    rates = monitor.rates()
    assert seen == [0, 1, 2]
    assert 20 <= rates["data/wait_ms"] <= 1000 * (took - 3 * 0.04) / 3
    assert rates["data/wait_share"] == pytest.approx(3 * rates["data/wait_ms"] / 1000 / rates["time/train"], rel=1e-6)
    assert monitor.rates()["data/wait_ms"] == 0


@pytest.mark.parametrize("device", DEVICES)
def test_the_peak_of_memory_stays_after_the_tensor_is_gone(device: str):
    before, size = peak_memory(torch.device(device)), 2**28
    torch.ones(before + size, dtype=torch.uint8, device=device)
    assert before + size <= peak_memory(torch.device(device)) <= 2 * before + 1.1 * size


@pytest.mark.parametrize(
    ("name", "dense_bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA Abacus", None),
    ],
)
def test_the_peak_of_a_gpu_is_without_sparsity(name: str, dense_bf16: float | None, monkeypatch: pytest.MonkeyPatch):
    """By the names that the driver gives; half of it for float32, whose products training rounds to TF32."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(device, "bf16-mixed") == dense_bf16
    if dense_bf16 and "H200" in name:
        assert peak_flops(device, "32-true") == dense_bf16 / 2
    assert peak_flops(torch.device("cpu"), "32-true") is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"), (59.4, "59 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"),
        (3 * 86400 + 14500, "3 d 4 h"),
    ],
)  # fmt: skip
def test_a_duration_has_the_units_that_fit(seconds: float, words: str) -> None:
    assert format_seconds(seconds) == words
