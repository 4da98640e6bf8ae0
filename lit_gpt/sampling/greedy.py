"""The sampler `greedy`: a step reveals a fixed share of the masked positions, those with the most probable tokens.

B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_gpt.sampling.algorithm import Algorithm, DenoisingStep, Predictions, ranks


@dataclass(frozen=True)
class Greedy(Algorithm):
    """Of a row's n masked positions the int(n (1 - s / t)) whose tokens have the highest confidence are revealed.

    The published code counts and ranks over the whole batch; here each row has its own count and ranks.
    Source: SMDM's `greddy` (arXiv 2410.18514), after MaskGIT (Chang et al. 2022, arXiv 2202.04200).
    """

    def candidates(self, step: DenoisingStep) -> Tensor:
        """All masked positions of the rows that reveal anything."""
        return step.masked & (_count(step) > 0)[:, None]

    def revealed(self, step: DenoisingStep, candidates: Tensor, predictions: Predictions) -> Tensor:
        """Those of the highest confidence."""
        return candidates & (ranks(predictions.confidence, candidates) < _count(step)[:, None])


def _count(step: DenoisingStep) -> Tensor:
    """How many positions each row reveals, (B,) int64."""
    # float32, like the published count: what int() cuts off must be the same.
    return (step.masked.sum(1).float() * (1 - step.s / step.t)).long()
