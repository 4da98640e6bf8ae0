"""Speed of a run: tokens, samples and FLOPs per second, and the share of the device's peak. The only clock of training."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from lit_gpt.config import Config
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.model.visibility import Visibility


def training_flops(config: Config, terms: LossTerms, visibility: Visibility, scored: int) -> float:
    """FLOPs of training on a batch: 6 per weight and token that uses it, 12 C per layer and pair of tokens in attention.

    Without recomputation, as Chowdhery et al. 2022 (arXiv 2204.02311, appendix B) count; but only pairs that are visible
    and rows of the head that are scored.

    Args:
        config: the model.
        terms: the batch.
        visibility: which of its columns attend to which.
        scored: positions on which the head runs.
    """
    rows, length = terms.input_ids.shape
    head = config.padded_vocab_size * config.n_embd * scored
    attention = 12 * config.n_layer * config.n_embd * rows * visibility.pairs(length)
    return 6.0 * (config.non_embedding_params * rows * length + head) + attention


class MicroBatchWork(NamedTuple):
    """What a device did in a micro batch."""

    samples: int
    tokens: int
    flops: float


@dataclass
class SpeedMonitor:
    """Counts what training does between two lines of the log, and its rates; validation's time is left out."""

    world_size: int
    """Devices."""
    peak_flops: float | None = None
    """Of one device, in the precision in use; None where unknown (CPUs)."""
    validation_s: float = 0.0
    """Seconds spent in validation so far."""
    _start: float = field(default_factory=time.perf_counter)
    _train_s: float = 0.0
    _done: tuple[float, ...] = (0, 0, 0, 0)

    def elapsed_s(self) -> float:
        """Seconds since the start, validation included."""
        return time.perf_counter() - self._start

    def add_validation(self, seconds: float) -> None:
        """Count seconds as validation's."""
        self.validation_s += seconds

    def add_micro_batch(self, samples: int, tokens: int, flops: float) -> None:
        """Count what this device did in a micro batch; the other devices do as much."""
        batches, *done = self._done
        new = (samples, tokens, flops)
        self._done = (batches + 1, *(old + one * self.world_size for old, one in zip(done, new, strict=True)))

    def rates(self) -> dict[str, float]:
        """Metrics since the last call, under the published names."""
        total = self.elapsed_s()
        train = total - self.validation_s
        span = max(train - self._train_s, 1e-9)
        batches_per_s, samples_per_s, tokens_per_s, flops_per_s = (done / span for done in self._done)
        self._train_s, self._done = train, (0, 0, 0, 0)
        metrics = {
            "time/train": train,
            "time/val": self.validation_s,
            "time/total": total,
            "throughput/batches_per_sec": batches_per_s * self.world_size,
            "throughput/samples_per_sec": samples_per_s,
            "throughput/tokens_per_sec": tokens_per_s,
            "throughput/flops_per_sec": flops_per_s,
            "throughput/device/batches_per_sec": batches_per_s,
            "throughput/device/samples_per_sec": samples_per_s / self.world_size,
            "throughput/device/tokens_per_sec": tokens_per_s / self.world_size,
            "throughput/device/flops_per_sec": flops_per_s / self.world_size,
        }
        if self.peak_flops:
            metrics["throughput/device/mfu"] = flops_per_s / self.world_size / self.peak_flops
        return metrics


RATE_COLUMNS = (
    "time/train",
    "time/val",
    "time/total",
    "throughput/batches_per_sec",
    "throughput/samples_per_sec",
    "throughput/tokens_per_sec",
    "throughput/flops_per_sec",
    "throughput/device/batches_per_sec",
    "throughput/device/samples_per_sec",
    "throughput/device/tokens_per_sec",
    "throughput/device/flops_per_sec",
    "throughput/device/mfu",
)


# bfloat16 without sparsity, from NVIDIA's data sheets. Lightning knows neither name of an H200, and counts sparsity for NVL.
_HOPPER_SXM_PEAK, _HOPPER_NVL_PEAK = 989.4e12, 835.5e12


def peak_flops(device: torch.device, precision: str) -> float | None:
    """A GPU's published peak in this precision, without sparsity; None where Lightning's table does not know it."""
    if device.type != "cuda":
        return None
    from lightning_fabric.utilities.throughput import get_available_flops

    bf16, name = precision.startswith("bf16"), torch.cuda.get_device_name(device)
    if "H200" in name or "H100 NVL" in name:
        peak = _HOPPER_NVL_PEAK if "NVL" in name else _HOPPER_SXM_PEAK
        # TF32, in which training multiplies float32 on GPUs, has half the rate.
        return peak if bf16 else peak / 2
    try:
        value = get_available_flops(device, torch.bfloat16 if bf16 else torch.float32)
    except (RuntimeError, KeyError):
        return None
    return float(value) if value else None
