"""How many rows a device reads at once: candidates for the micro batch, and the largest one that fits into memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch

from lit_gpt.devices import is_out_of_memory
from lit_gpt.model.layers import Transformer
from lit_gpt.model.loss_terms import LossTerms

# Memory that a micro batch may fill on a CPU, of what the machine has; the rest is for weights, files and other programs.
_CPU_MEMORY_SHARE = 0.4
# Tokens in a CPU's micro batch beyond which nothing gets faster (its caches are long exceeded).
_CPU_MICRO_BATCH_TOKENS = 8192


def largest_that_fits(candidates: Iterable[int], attempt: Callable[[int], object]) -> int:
    """The last of ascending sizes for which `attempt` does not run out of memory.

    Raises:
        ValueError: not even the first fits.
    """
    best = 0
    for size in candidates:
        try:
            attempt(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            break
        best = size
    if not best:
        raise ValueError(
            "not even one sequence fits into memory: use --activation_checkpointing true or a smaller model"
        )
    return best


def sizes_to_try(model: Transformer, terms: LossTerms, device_rows: int, device: torch.device) -> list[int]:
    """Divisors of a device's rows, ascending, that are worth trying.

    On a GPU all of them (memory is found by trying); on a CPU the largest whose activations fit a share of the machine's
    memory by estimate, since running out of it would not raise but end the process, up to the size where speed levels
    off. It depends on the machine, not on its load, so that the same command makes the same choice.

    Args:
        model: for the sizes.
        terms: what the objective makes of a full row.
        device_rows: the device's rows of a step.
        device: where they are computed.
    """
    divisors = [size for size in range(1, device_rows + 1) if device_rows % size == 0]
    if device.type == "cuda":
        return divisors
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    fits = int(memory * _CPU_MEMORY_SHARE / processes / _activation_bytes(model, terms))
    limit = max(1, min(fits, _CPU_MICRO_BATCH_TOKENS // terms.input_ids.size(1)))
    return [max(size for size in divisors if size <= limit)]


def _activation_bytes(model: Transformer, terms: LossTerms) -> float:
    """Memory that a training step keeps per row, in float32: an estimate from above."""
    config, length = model.config, terms.input_ids.size(1)
    per_block = 16 * config.n_embd + 6 * config.intermediate_size
    blocks = 2 if model.checkpoint_blocks else config.n_layer
    # The embedding's output, the final norm and the loss's own rows come on top.
    per_token = per_block * blocks + (config.n_layer + 8) * config.n_embd
    # Where attention needs a mask, torch keeps one of numbers in every block.
    mask = (terms.visibility or model.visibility).mask_elements(length)
    return 4.0 * (per_token * length + mask * blocks)
