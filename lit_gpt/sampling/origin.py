"""The sampler `origin`: every masked position is revealed by chance, whatever the model thinks of it.

That is the reverse of the forward process, so that with many steps the law of the text is the model's own. What is
revealed is known before the model is asked, which computes nothing else.

B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.sampling.algorithm import Algorithm, DenoisingStep, Predictions

# What a random number is for. Published samples depend on them.
_REVEAL, _REMASK = -1, -2


@dataclass(frozen=True)
class Origin(Algorithm):
    """A masked position is revealed with probability 1 - s / t (SMDM's `origin`, arXiv 2410.18514).

    With remasking (ReMDM-cap: Wang et al. 2025, arXiv 2503.00307) a revealed position is masked again with probability
    sigma = min(remask, s / (1 - t)), and a masked one is revealed with probability ((1 - s) - (1 - sigma) (1 - t)) / t,
    which leaves the share of masked positions at every time what it was.
    """

    remask: float

    @property
    def remasks(self) -> bool:
        """Whether there is anything to mask again."""
        return self.remask > 0

    def remasked(self, step: DenoisingStep) -> Tensor:
        """Revealed positions, each by itself with probability sigma."""
        return step.unmasked & (step.uniforms(_REMASK) < self._sigma(step)[:, None])

    def candidates(self, step: DenoisingStep) -> Tensor:
        """Masked positions, each by itself."""
        t, s = step.t, step.s
        # The published expression to the last bit.
        probability = 1 - s / t
        if self.remasks:
            with_remasking = ((1 - s) - (1 - self._sigma(step)) * (1 - t)) / t
            probability = torch.where(s > 0, with_remasking, 1.0)
        return step.masked & (step.uniforms(_REVEAL) < probability[:, None])

    def revealed(self, step: DenoisingStep, candidates: Tensor, predictions: Predictions) -> Tensor:
        """All of them."""
        return candidates

    def _sigma(self, step: DenoisingStep) -> Tensor:
        """(B,) float32."""
        # Nothing is revealed yet at time 1.
        return torch.where(step.t < 1, step.s / (1 - step.t), 0.0).clamp(max=self.remask)
