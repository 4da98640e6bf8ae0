"""The bound as a sum over numbers of masked tokens, without a random draw where the budget allows.

With 2^L - 1 <= budget every mask is evaluated. Otherwise one pass masks everything, which gives the term k = L and a first
guess a_i of every token's cross-entropy; the other n passes take k from 1 to L - 1 systematically with density
q_k ~ sqrt((1/k) (1 - k/L)), the spread of a mean of k tokens, and

    nll = sum_k g_k mean(a) + (1/n) sum_j (1/q_{k_j}) mean_{i in M_j} (CE_i(M_j) - g_{k_j} a_i),    g_L = 1.

The masks, in the order of k, are cut from a chain of random permutations: neighbouring passes, whose k are alike, partition
the target, so that every token is scored about as often at every level, and by symmetry each mask is uniform among those
of its size. The estimate is unbiased for any g. Its standard error compares successive scorings of the same token.

R rows (masks), L tokens of the target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.likelihood.plan import Estimator, MaskingPlan
from lit_gpt.randomness import Stream, uniform

# g_k, the control variate: what a token's cross-entropy is expected to be when k of L tokens are masked, as a share of what
# it is when all are, on a line from k = 0 to k = L. Any numbers leave the estimate unbiased; measured on a trained model of
# 1M parameters, this line had less variance than constant shares of 0 and 0.7 at 4 to 20 tokens, and about that of a
# constant 1.
_SHARE_AT_NONE, _SHARE_AT_ALL = 0.6, 1.0


@dataclass(frozen=True)
class ExactBound(Estimator):
    """The bound with as few random numbers as the budget allows."""

    budget: int = 128
    """Forward passes that may be spent on a target."""

    name = "exact"
    passes_parameter = "budget"

    def __post_init__(self) -> None:
        if self.budget < 2:
            raise ValueError(f"budget is {self.budget}: at least 2 forward passes are needed")

    def passes(self, length: int) -> int:
        """All masks but the empty one, or the budget."""
        return min(self.budget, 2 ** min(length, 62) - 1)

    def plan(self, length: int, *keys: int) -> MaskingPlan:
        """All masks, or the mask of everything and then random ones in the order of their sizes."""
        if length < 63 and 2**length - 1 <= self.budget:
            return _all_masks(length)
        shift = float(uniform(*keys, int(Stream.LIKELIHOOD), torch.tensor(-2)))
        sizes, weights = systematic_sizes(length, self.budget - 1, shift)
        drawn = permutation_masks(length, sizes, *keys)
        masks = torch.cat((torch.ones(1, length, dtype=torch.bool), drawn))
        share = _SHARE_AT_NONE + (_SHARE_AT_ALL - _SHARE_AT_NONE) * torch.arange(1, length + 1).double() / length
        coefficients = weights / sizes

        def reduce(nll: Tensor) -> tuple[float, float]:
            first = nll[0]
            residual = (nll[1:] - share[sizes - 1, None] * first) * drawn
            value = share.sum() * first.mean() + (coefficients * residual.sum(1)).sum()
            return float(value), _standard_error(residual, drawn, coefficients)

        return MaskingPlan(masks, masks, reduce)


def systematic_sizes(length: int, count: int, shift: float) -> tuple[Tensor, Tensor]:
    """Numbers of masked tokens by systematic sampling, in rising order, and their weights.

    Args:
        length: L, at least 2.
        count: n.
        shift: in [0, 1), the one random number.

    Returns:
        (n,) int64 in [1, L - 1], k_j at the quantile (j + shift) / n; and (n,) float64 1 / (n q_{k_j}), whose sum over
        f(k_j) estimates the sum of f(k).
    """
    sizes = torch.arange(1, length, dtype=torch.float64)
    density = ((1 / sizes) * (1 - sizes / length)).sqrt()
    density /= density.sum()
    points = (torch.arange(count, dtype=torch.float64) + shift) / count
    index = torch.searchsorted(density.cumsum(0), points, right=True).clamp(max=length - 2)
    return index + 1, 1 / (count * density[index])


def permutation_masks(length: int, sizes: Tensor, *keys: int) -> Tensor:
    """Masks of given sizes, cut one after the other from a chain of random permutations of the target.

    A mask that a permutation's end leaves unfinished takes the rest from the next one, leaving out what it has.

    Args:
        length: L.
        sizes: (R,) int64 in [1, L].
        *keys: what the permutations are a function of; a longer target orders its first tokens alike.

    Returns:
        (R, L) bool.
    """
    masks = torch.zeros(len(sizes), length, dtype=torch.bool)
    remaining: list[int] = []
    for row, size in enumerate(sizes.tolist()):
        chosen, remaining = remaining[:size], remaining[size:]
        if len(chosen) < size:
            order = uniform(*keys, int(Stream.LIKELIHOOD), -3, row, torch.arange(length)).argsort().tolist()
            taken = set(chosen)
            fresh = [token for token in order if token not in taken]
            missing = size - len(chosen)
            chosen, remaining = chosen + fresh[:missing], fresh[missing:] + [token for token in order if token in taken]
        masks[row, chosen] = True
    return masks


def _all_masks(length: int) -> MaskingPlan:
    """Every mask but the empty one, weighted so that the sum is the bound: 1 / (L C(L-1, k-1)) for one of k tokens."""
    numbers = torch.arange(1, 2**length)
    masks = (numbers[:, None] >> torch.arange(length)) & 1 == 1
    by_size = torch.tensor([0.0] + [1 / (length * math.comb(length - 1, k - 1)) for k in range(1, length + 1)]).double()
    weights = by_size[masks.sum(1)]
    return MaskingPlan(masks, masks, lambda nll: (float((weights * nll.sum(1)).sum()), 0.0))


def _standard_error(residual: Tensor, masks: Tensor, coefficients: Tensor) -> float:
    """Standard error of sum_j c_j sum_{i in M_j} residual_ij, from differences between a token's successive scorings.

    Args:
        residual: (n, L) float64, 0 where not scored.
        masks: (n, L) bool.
        coefficients: (n,) float64.
    """
    last = torch.full((masks.size(1),), math.nan, dtype=torch.float64)
    squares, pairs = 0.0, 0
    for row, mask in zip(residual, masks, strict=True):
        again = mask & ~last.isnan()
        squares += float((row - last)[again].square().sum() / 2)
        pairs += int(again.sum())
        last = torch.where(mask, row, last)
    if not pairs:
        return math.nan
    total = float((coefficients.square() * masks.sum(1)).sum())
    return math.sqrt(squares / pairs * total)
