"""Likelihoods as the published evaluation computes them: one request at a time, copies of it as the batch, all logits.

The plain side of `likelihood.py`'s comparisons: every pass runs the head on every position, a batch is 16 copies of one
request, and the greedy check decodes each target to its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_gpt.checkpoints.loaded import load_model
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.layers import Transformer

BATCH = 16
Pair = tuple[list[int], list[int]]


def build_model(name: str) -> Transformer:
    """A checkpoint's model; `size 6` is an untrained one with the published vocabulary."""
    if name != "size 6":
        return load_model(name, kind="mdm", device="cpu").model
    model = TransEncoder.from_name(6).eval()
    model.init_weights(1)
    return model


def timed_requests(name: str, processor_time: bool = False) -> Callable[[str, list[Pair]], tuple[float, list[Any]]]:
    """The published procedures on a model, torch as it comes: seconds and results of some requests.

    With `processor_time` it has one thread, and the seconds are those in which that ran.

    What is asked for is `mc`, `chain_rule` or `lambada` (chain rule and greedy check).
    """
    model, generator = build_model(name), torch.Generator().manual_seed(1)
    clock = time.process_time if processor_time else time.perf_counter
    if processor_time:
        torch.set_num_threads(1)

    def work(what: str, prefix: list[int], target: list[int]) -> Any:
        if what == "mc":
            return mc(model, prefix, target, 128, generator)
        value = chain_rule(model, prefix, target)
        return (value, greedy(model, prefix, target)) if what == "lambada" else value

    def run(what: str, pairs: list[Pair]) -> tuple[float, list[Any]]:
        start = clock()
        values = [work(what, *pair) for pair in pairs]
        return clock() - start, values

    return run


@torch.no_grad()
def mc(model: Transformer, prefix: list[int], target: list[int], draws: int, generator: torch.Generator) -> float:
    """The bound by Monte Carlo, t low-discrepancy within each batch of 16."""
    rows, labels, length = _copies(prefix, target, BATCH)
    total = 0.0
    for _ in range(draws // BATCH):
        shift = torch.rand((), generator=generator)
        t = (shift + torch.arange(BATCH) / BATCH) % 1.0
        mask = torch.rand(BATCH, len(target), generator=generator) < t[:, None]
        noisy = rows.clone()
        noisy[:, -length:] = torch.where(mask, model.config.mask_id, labels)
        logits = model(noisy)[:, -length:]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(
            BATCH, -1
        )
        total += float(((nll * mask).sum(1) / t).sum())
    return total / (draws // BATCH * BATCH)


@torch.no_grad()
def chain_rule(model: Transformer, prefix: list[int], target: list[int]) -> float:
    """The left-to-right product: L inputs in batches of 16, their logits kept until all are there."""
    rows, labels, length = _copies(prefix, target, len(target))
    rows[:, -length:] = torch.where(torch.ones(length, length).triu() == 1, model.config.mask_id, labels)
    logits = torch.cat([model(part) for part in rows.split(BATCH)])[:, -length:]
    log_p = logits.log_softmax(-1).gather(2, labels[..., None]).squeeze(2)
    return -float(log_p.diagonal().sum())


@torch.no_grad()
def greedy(model: Transformer, prefix: list[int], target: list[int]) -> bool:
    """Fix the most confident position, one pass each, until the target is whole; then compare."""
    rows, labels, length = _copies(prefix, [model.config.mask_id] * len(target), 1)
    for _ in target:
        mask = rows[0] == model.config.mask_id
        probability, best = model(rows)[0, mask].softmax(-1).max(-1)
        position = mask.nonzero()[probability.argmax(), 0]
        rows[0, position] = best[probability.argmax()]
    return rows[0, -length:].tolist() == target


def _copies(prefix: list[int], target: list[int], count: int) -> tuple[Tensor, Tensor, int]:
    """Rows (count, T), their targets (count, L), and L."""
    rows = torch.tensor([prefix + target]).repeat(count, 1)
    return rows, rows[:, len(prefix) :].clone(), len(target)
