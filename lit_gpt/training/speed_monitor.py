"""Speed of a run: tokens, samples and FLOPs per second, and the share of the device's peak. The only clock of training.

May import config only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from lit_gpt.config import Config


def flops_per_token(config: Config, head_share: float) -> float:
    """FLOPs of training on one token: 6 per parameter that is used, and 12 L T C for attention (Chowdhery et al. 2022).

    Args:
        config: the model.
        head_share: share of positions on which the head runs: 1 for an ARM, 0.5 on average for masked diffusion.
    """
    head = config.padded_vocab_size * config.n_embd * head_share
    attention = 12 * config.n_layer * config.block_size * config.n_embd
    return 6 * (config.non_embedding_params + head) + attention


@dataclass
class SpeedMonitor:
    """Rates between two looks, with validation's time left out."""

    world_size: int
    """Devices."""
    flops_per_token: float
    """For the utilisation."""
    peak_flops: float | None = None
    """Of one device, in the precision in use; None where unknown (CPUs)."""
    validation_s: float = 0.0
    """Seconds spent in validation so far."""
    _start: float = field(default_factory=time.perf_counter)
    _seen: tuple[float, int, int, int] = (0.0, 0, 0, 0)

    def elapsed_s(self) -> float:
        """Seconds since the start, validation included."""
        return time.perf_counter() - self._start

    def add_validation(self, seconds: float) -> None:
        """Count seconds as validation's."""
        self.validation_s += seconds

    def rates(self, micro_batches: int, samples: int, tokens: int) -> dict[str, float]:
        """Metrics since the last call, under the published names.

        Args:
            micro_batches: done since the start, on one device.
            samples: since the start, over all devices.
            tokens: likewise.
        """
        total = self.elapsed_s()
        train = total - self.validation_s
        before = self._seen
        self._seen = (train, micro_batches, samples, tokens)
        span = max(train - before[0], 1e-9)
        batches_per_s, samples_per_s, tokens_per_s = (
            (now - then) / span for now, then in zip(self._seen[1:], before[1:], strict=True)
        )
        flops_per_s = tokens_per_s * self.flops_per_token
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


def peak_flops(device: torch.device, precision: str) -> float | None:
    """A GPU's published peak in this precision, from Lightning's table; None where it knows none."""
    if device.type != "cuda":
        return None
    from lightning_fabric.utilities.throughput import get_available_flops

    dtype = (
        torch.bfloat16
        if precision.startswith("bf16")
        else torch.float16
        if precision.startswith("16")
        else torch.float32
    )
    try:
        value = get_available_flops(device, dtype)
    except (RuntimeError, KeyError):
        return None
    return float(value) if value else None
