"""The sampler `entropy`: a step reveals as many positions as share little information (EB-Sampler).

B rows, T tokens, n positions, K vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.sampling.algorithm import Algorithm, DenoisingStep, Predictions


@dataclass(frozen=True)
class Entropy(Algorithm):
    """The most positions are revealed, in rising order of entropy, whose entropies but for the largest sum to at most
    `entropy_bound` nats; always at least one.

    The sum bounds the information that the positions share, so that their tokens, sampled independently, are nearly
    sampled jointly. Source: EB-Sampler (Ben-Hamu et al. 2025, arXiv 2505.24857).
    """

    entropy_bound: float

    @property
    def measure(self) -> Callable[[Tensor], Tensor]:
        """Entropies."""
        return entropies

    def revealed(self, step: DenoisingStep, candidates: Tensor, predictions: Predictions) -> Tensor:
        """Those of the lowest entropy; all at the last step."""
        assert predictions.measure is not None
        # A broken model's NaNs are revealed like any other: its logits are refused elsewhere.
        entropy = predictions.measure.nan_to_num(nan=0.0).masked_fill(~candidates, torch.inf)
        in_order, order = entropy.sort(dim=1, stable=True)
        # In rising order the largest of the first n is the n-th: what the others sum to is the sum before it.
        finite = in_order.nan_to_num(posinf=0.0)
        before = finite.double().cumsum(1) - finite
        first = torch.arange(order.size(1), device=order.device) == 0
        chosen = (before <= self.entropy_bound) | first | step.last
        return candidates & torch.zeros_like(chosen).scatter(1, order, chosen)


def entropies(log_p: Tensor) -> Tensor:
    """The entropy of each distribution, nats, (n,) float32, of log-probabilities (n, K)."""
    return -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(1).float()
