"""What an operator sees of a run: speed, the share of the device's peak, waiting for data, memory. Training's only clock."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from lit_gpt.config import Config
from lit_gpt.model.flops import forward_flops
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.model.visibility import Visibility

Step = TypeVar("Step")
"""What a reader hands over for a step."""


def training_flops(config: Config, terms: LossTerms, visibility: Visibility, scored: int) -> float:
    """FLOPs of training on a batch: three times those of the forward pass; what is computed again is not counted.

    Args:
        config: the model.
        terms: the batch.
        visibility: which of its columns attend to which.
        scored: positions on which the head runs.
    """
    rows, length = terms.input_ids.shape
    return 3.0 * forward_flops(config, rows * length, rows * visibility.pairs(length), scored)


class MicroBatchWork(NamedTuple):
    """What a device does in a micro batch."""

    samples: int
    tokens: int
    flops: float


@dataclass
class _Interval:
    """What a device did since the last line of the log."""

    micro_batches: int = 0
    work: MicroBatchWork = MicroBatchWork(0, 0, 0.0)
    steps: int = 0
    data_wait_s: float = 0.0
    """For which its steps were waited."""


@dataclass
class SpeedMonitor:
    """Counts what training does between two lines of the log, and its rates; the time of validation and saving is left out."""

    world_size: int
    """Devices."""
    peak_flops: float | None = None
    """Of one device, in the precision in use; None where unknown (CPUs)."""
    validation_s: float = 0.0
    """Seconds spent in validation so far."""
    saving_s: float = 0.0
    """Seconds for which training waited for checkpoints so far."""
    _start: float = field(default_factory=time.perf_counter)
    _train_s: float = 0.0
    _interval: _Interval = field(default_factory=_Interval)

    def elapsed_s(self) -> float:
        """Seconds since the start, validation and saving included."""
        return time.perf_counter() - self._start

    def add_validation(self, seconds: float) -> None:
        """Count seconds as validation's."""
        self.validation_s += seconds

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Count what is done in this context as saving."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.saving_s += time.perf_counter() - started

    def saving_line(self) -> str:
        """What saving has cost, for the console."""
        total = self.elapsed_s()
        return f"saving took {self.saving_s:.1f} s of {total:.1f} s ({self.saving_s / max(total, 1e-9):.1%})"

    def add_micro_batch(self, work: MicroBatchWork) -> None:
        """Count what this device did in a micro batch; the other devices do as much."""
        self._interval.micro_batches += 1
        samples, tokens, flops = self._interval.work
        self._interval.work = MicroBatchWork(samples + work.samples, tokens + work.tokens, flops + work.flops)

    def waited(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same steps; the time until each of them is there counts as waiting for data."""
        started = time.perf_counter()
        for step in steps:
            self._interval.data_wait_s += time.perf_counter() - started
            self._interval.steps += 1
            yield step
            started = time.perf_counter()

    def rates(self) -> dict[str, float]:
        """Metrics since the last call, under the published names."""
        total = self.elapsed_s()
        train = total - self.validation_s - self.saving_s
        span = max(train - self._train_s, 1e-9)
        interval = self._interval
        batches_per_s = interval.micro_batches / span
        samples_per_s, tokens_per_s, flops_per_s = (done * self.world_size / span for done in interval.work)
        self._train_s, self._interval = train, _Interval()
        metrics = {
            "time/train": train,
            "time/val": self.validation_s,
            "time/save": self.saving_s,
            "time/total": total,
            "data/wait_ms": 1000 * interval.data_wait_s / max(interval.steps, 1),
            "data/wait_share": interval.data_wait_s / span,
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


def format_seconds(seconds: float) -> str:
    """A duration in the two units that fit: `48 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = round(seconds)
    for (larger, name), (smaller, rest) in itertools.pairwise(_UNITS):
        if whole >= larger:
            return f"{whole // larger} {name} {whole % larger // smaller} {rest}"
    return f"{whole} s"


_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))

RATE_COLUMNS = (
    "time/train",
    "time/val",
    "time/save",
    "time/total",
    "data/wait_ms",
    "data/wait_share",
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


def peak_memory(device: torch.device) -> int:
    """The most memory so far, in bytes: on a GPU what tensors filled, on a CPU what this process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage's maximum: a process inherits its parent's.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, which has no /proc
