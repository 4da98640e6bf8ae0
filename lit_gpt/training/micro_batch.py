"""How many rows a device reads at once: on a CPU by estimate, on a GPU from the memory that small micro batches take."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from lit_gpt.model.layers import Transformer
from lit_gpt.model.loss_terms import LossTerms

TOO_LARGE = "not even one sequence fits into memory: use --activation_checkpointing true or a smaller model"
# Memory that a micro batch may fill on a CPU, of what the machine has; the rest is for weights, files and other programs.
_CPU_MEMORY_SHARE = 0.4
# Tokens in a CPU's micro batch beyond which nothing gets faster (its caches are long exceeded).
_CPU_MICRO_BATCH_TOKENS = 8192
# Of the memory that a GPU has for us: tensors leave gaps between them, and collectives and libraries take buffers of
# their own. Ours; a guess from the safe side, since a wrong one costs a new compilation.
_GPU_MEMORY_SHARE = 0.9


class MemoryReading(NamedTuple):
    """Memory of a device, in bytes."""

    peak: int
    """The most that tensors filled since the last reading."""
    available: int
    """What they may fill: what they have, and what is free."""


def read_memory(device: torch.device) -> MemoryReading | None:
    """What tensors filled at most since the last reading; None on a CPU, where nobody counts it."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    reading = MemoryReading(torch.cuda.max_memory_allocated(device), free + torch.cuda.memory_reserved(device))
    torch.cuda.reset_peak_memory_stats(device)
    return reading


def size_by_measurement(measure: Callable[[int], MemoryReading | None], device_rows: int, reserved: int) -> int:
    """The largest micro batch that should fit, on the line through the peaks of one row and of two.

    The loss's logits grow up to a bound only (`kernels.chunk_elements`), so the line errs on the safe side.

    Args:
        measure: makes two micro batches of so many rows, the second on top of the first one's gradients, and reads the
            memory; None if it did not suffice.
        device_rows: the device's rows of a step.
        reserved: bytes that training will need besides, the same for any micro batch.

    Raises:
        ValueError: not even one row fits.
    """
    one = measure(1)
    if one is None:
        raise ValueError(TOO_LARGE)
    two = measure(2) if device_rows > 1 else None
    if two is None:
        return 1
    per_row = max(1, two.peak - one.peak)
    fixed = one.peak - per_row + reserved
    fits = int(_GPU_MEMORY_SHARE * two.available - fixed) // per_row
    return largest_divisor(device_rows, fits)


def optimizer_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Memory of AdamW's two moments for this process's share of the parameters."""
    total = 0
    for parameter in parameters:
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        total += 2 * own.numel() * own.element_size()
    return total


def size_by_estimate(model: Transformer, terms: LossTerms, device_rows: int) -> int:
    """The largest micro batch whose activations fit a share of the machine's memory, up to where speed levels off.

    Estimated, since a CPU that runs out of memory would not raise but end the process. It depends on the machine, not
    on its load, so that the same command makes the same choice.

    Args:
        model: for the sizes.
        terms: what the objective makes of a full row.
        device_rows: the device's rows of a step.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    fits = int(memory * _CPU_MEMORY_SHARE / processes / _activation_bytes(model, terms))
    return largest_divisor(device_rows, min(fits, _CPU_MICRO_BATCH_TOKENS // terms.input_ids.size(1)))


def largest_divisor(device_rows: int, limit: int) -> int:
    """The largest divisor of a device's rows that is at most `limit`, and at least 1."""
    return next(size for size in range(max(1, min(limit, device_rows)), 0, -1) if device_rows % size == 0)


def _activation_bytes(model: Transformer, terms: LossTerms) -> float:
    """Memory that a training step keeps per row, in float32: an estimate from above."""
    config, length = model.config, terms.input_ids.size(1)
    per_block = 16 * config.n_embd + 6 * config.intermediate_size
    blocks = 2 if model.checkpoint_blocks is True else config.n_layer
    # The embedding's output, the final norm and the loss's own rows come on top.
    per_token = per_block * blocks + (config.n_layer + 8) * config.n_embd
    # Where attention needs a mask, torch keeps one of numbers in every block.
    mask = (terms.visibility or model.visibility).mask_elements(length)
    return 4.0 * (per_token * length + mask * blocks)
