"""The sampler `threshold`: a step reveals every position of whose token the model is sure enough.

B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_gpt.sampling.algorithm import Algorithm, DenoisingStep, Predictions, ranks


@dataclass(frozen=True)
class Threshold(Algorithm):
    """Positions whose tokens have at least the confidence `threshold` are revealed, and always the best one.

    Source: confidence-aware parallel decoding, Fast-dLLM (Wu et al. 2025, arXiv 2505.22618).
    """

    threshold: float

    def revealed(self, step: DenoisingStep, candidates: Tensor, predictions: Predictions) -> Tensor:
        """Those above the threshold; all at the last step."""
        best = ranks(predictions.confidence, candidates) == 0
        return candidates & ((predictions.confidence >= self.threshold) | best | step.last)
