"""What an evaluation costs before it is paid: passes, tokens and FLOPs, counted from texts and settings alone.

A pass is one reading of one row, whatever its batch. Decisions: masks that a plan repeats count once, as they are computed
once; rows that different requests share, and what ends early, are not foreseen, so that the numbers are upper bounds but
for the spread of the random masks, and for rows that are read along with others of their batch: a sampler with more steps
than a row has masks, and rows that are done before the others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lit_gpt.checkpoints.loaded import LoadedModel
from lit_gpt.likelihood.loglikelihood import LikelihoodRequest, LikelihoodSettings, masking_plan
from lit_gpt.model.flops import forward_flops
from lit_gpt.sampling.settings import Sampling


@dataclass(frozen=True)
class Work:
    """What some requests cost; sums are taken with +."""

    requests: int = 0
    passes: int = 0
    tokens: int = 0
    """That the blocks read, padding left out."""
    flops: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.requests + other.requests,
            self.passes + other.passes,
            self.tokens + other.tokens,
            self.flops + other.flops,
        )


def total_work(works: Sequence[Work]) -> Work:
    """The sum."""
    return sum(works, Work())


def likelihood_work(model: LoadedModel, request: LikelihoodRequest, settings: LikelihoodSettings) -> Work:
    """The cost of a likelihood, without the greedy check.

    Args:
        model: an ARM or an MDM.
        request: its target is not empty.
        settings: of an MDM's estimate.
    """
    length, visibility = len(request.prefix) + len(request.target), model.model.visibility
    passes, scored = 1, len(request.target)
    if model.kind == "arm":
        length -= 1
    else:
        passes, scored = _passes_of_plan(settings, len(request.target))
        length = max(length, settings.pad_to)
    return _as_work(model, (passes, passes * length, passes * visibility.pairs(length), scored), settings.cfg_scale)


def greedy_check_passes(request: LikelihoodRequest) -> int:
    """Passes of the greedy check at most: one for each token of the target, the first of which most plans have anyway."""
    return len(request.target)


def sampling_work(model: LoadedModel, prompt: int, length: int, sampling: Sampling) -> Work:
    """The cost of completing a row, at most: no end token comes early.

    Args:
        model: an ARM or an MDM.
        prompt: tokens of the prompt.
        length: tokens of the finished row, prompt included.
        sampling: how.
    """
    if prompt >= length:
        return Work(1)
    if model.kind == "arm":
        return _as_work(model, _autoregressive_readings(prompt, length, sampling.use_cache), 0.0)
    return _as_work(model, _denoising_readings(prompt, length, sampling), sampling.cfg_scale)


_Readings = tuple[int, int, int, int]
"""Passes, tokens, visible pairs, positions whose logits are computed."""


def _as_work(model: LoadedModel, readings: _Readings, cfg_scale: float) -> Work:
    """Readings of one request, twice with guidance."""
    passes, tokens, pairs, scored = (count * (2 if cfg_scale else 1) for count in readings)
    return Work(1, passes, tokens, forward_flops(model.model.config, tokens, pairs, scored))


@functools.lru_cache(maxsize=4096)
def _passes_of_plan(settings: LikelihoodSettings, target: int) -> tuple[int, int]:
    """Distinct rows of an estimate of so many tokens, and the positions that are scored in them.

    Which masks are drawn depends on the prefix as well; how many of them differ hardly does.
    """
    plan = masking_plan(settings, LikelihoodRequest((), (0,) * target))
    masks, inverse = torch.unique(plan.masks, dim=0, return_inverse=True)
    scored = torch.zeros_like(masks, dtype=torch.int64).index_add_(0, inverse, plan.scored.long())
    return len(masks), int((scored > 0).sum())


@functools.lru_cache(maxsize=4096)
def _autoregressive_readings(prompt: int, length: int, use_cache: bool) -> _Readings:
    new = length - prompt
    if use_cache:
        return new, length - 1, (length - 1) * length // 2, new
    read = range(prompt, length)
    return new, sum(read), sum(tokens * (tokens + 1) // 2 for tokens in read), sum(read)


@functools.lru_cache(maxsize=4096)
def _denoising_readings(prompt: int, length: int, sampling: Sampling) -> _Readings:
    """Block by block, each in its share of the steps; a step that reveals nothing is not computed."""
    free = length - prompt
    block_length = min(sampling.block_length or free, free)
    steps = -(-sampling.row_steps(free) // -(-free // block_length))
    found = [0, 0, 0, 0]
    for start in range(0, free, block_length):
        block = min(block_length, free - start)
        # Positions that are masked again need steps of their own; `origin`'s rows of a batch reveal something in different
        # steps, and each is read in all of these.
        passes = steps if sampling.remask or sampling.algorithm == "origin" else min(steps, block)
        whole = passes
        if sampling.cache != "none":
            whole = -(-passes // sampling.refresh) if sampling.refresh else 1
        columns = block if sampling.cache == "dual" else free - start
        tokens = whole * length + (passes - whole) * columns
        # `origin` asks only for what it reveals, the others for all that is masked.
        scored = block if sampling.algorithm == "origin" else block * (passes + 1) // 2
        for place, count in enumerate((passes, tokens, tokens * length, scored)):
            found[place] += count
    passes, tokens, pairs, scored = found
    return passes, tokens, pairs, scored
