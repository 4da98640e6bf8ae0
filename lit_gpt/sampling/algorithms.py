"""Which masked positions a denoising step reveals: one small function per paper.

`origin` decides before the model is read, so that only what it reveals is computed; the others rank the model's own
certainty. None of them waits for the device. May import nothing of the package.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """What the model thinks of a step's masked positions."""

    mask: Tensor
    """(B, T) bool: the positions that may be revealed."""
    confidence: Tensor
    """(B, T) float64: the probability of each position's token; -1 elsewhere."""
    entropy: Tensor | None
    """(B, T) float32: of each position's distribution, nats; infinite elsewhere; None for all but `entropy`."""
    count: Tensor
    """(B,) int64: how many positions `greedy` reveals, and the others at least: one, and all at the last step."""
    care: float
    """The algorithm's own parameter."""


Algorithm = Callable[[Candidates], Tensor]
"""Candidates to (B, T) bool, a subset of their mask."""


def origin(candidates: Candidates) -> Tensor:
    """All: they were drawn before the model was read, each masked position by itself with probability 1 - s / t.

    Source: SMDM's `origin` (arXiv 2410.18514).
    """
    return candidates.mask


def greedy(candidates: Candidates) -> Tensor:
    """Of a row's n masked positions the int(n (1 - s / t)) whose tokens have the highest confidence.

    The published code counts and ranks over the whole batch; here each row has its own count and ranks.
    Source: SMDM's `greddy` (arXiv 2410.18514), after MaskGIT (Chang et al. 2022, arXiv 2202.04200).
    """
    return candidates.mask & (_rank(candidates.confidence) < candidates.count[:, None])


def greedy_count(masked: NDArray[np.int64], fraction: NDArray[np.float32]) -> NDArray[np.int64]:
    """How many positions `greedy` reveals in each row, (B,), of how many masked ones, given 1 - s / t, (B,)."""
    # float32, like the published count: what int() cuts off must be the same.
    return (masked.astype(np.float32) * fraction).astype(np.int64)


def threshold(candidates: Candidates) -> Tensor:
    """Every position whose token has at least the confidence `care`, and always the best one.

    Source: confidence-aware parallel decoding, Fast-dLLM (Wu et al. 2025, arXiv 2505.22618).
    """
    enough = candidates.confidence >= candidates.care
    return candidates.mask & (enough | (_rank(candidates.confidence) < candidates.count[:, None]))


def entropy(candidates: Candidates) -> Tensor:
    """The most positions, most certain first, whose entropies but for the largest sum to at most `care` nats.

    The sum bounds the information that the positions share, so that their tokens, drawn independently, are nearly drawn
    jointly. Always at least one. Source: EB-Sampler (Ben-Hamu et al. 2025, arXiv 2505.24857).
    """
    assert candidates.entropy is not None
    # A broken model's NaNs are revealed like any other: sampling goes on to its end, where it is refused.
    sorted_entropy, order = candidates.entropy.nan_to_num(nan=0.0, posinf=torch.inf).sort(dim=1, stable=True)
    # In rising order the largest of the first n is the n-th: what the others sum to is the sum before it.
    finite = sorted_entropy.nan_to_num(posinf=0.0)
    before = finite.double().cumsum(1) - finite
    inside = (before <= candidates.care) & sorted_entropy.isfinite()
    inside = inside | (torch.arange(order.size(1), device=order.device) < candidates.count[:, None])
    return candidates.mask & torch.zeros_like(inside).scatter(1, order, inside)


ALGORITHMS: dict[str, Algorithm] = {"origin": origin, "greedy": greedy, "threshold": threshold, "entropy": entropy}
"""By name."""


def _rank(confidence: Tensor) -> Tensor:
    """Each position's place in its row, 0 for the highest confidence, earlier positions first among equals."""
    order = confidence.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(confidence.size(1), device=confidence.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)
