"""The bound by Monte Carlo over times t: mean over draws i of (sum over masked tokens of CE) / p_i.

Here p = (1 - eps) t + eps is the masking probability, and t_i = (u + i / n) mod 1 are low-discrepancy times with one random
number u. Source: SMDM (arXiv 2410.18514), `nll_type=mc`; there n is the forward batch, here it is all draws, so that the
batch size is a matter of speed alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.likelihood.plan import Estimator, MaskingPlan
from lit_gpt.randomness import Stream, uniform


@dataclass(frozen=True)
class MonteCarlo(Estimator):
    """The published estimator of the bound."""

    mc_num: int = 1024
    """Draws n."""
    eps: float = 0.0
    """Smallest masking probability; the published evaluation has 0, training 1e-3."""

    name = "mc"
    passes_parameter = "mc_num"

    def __post_init__(self) -> None:
        if self.mc_num < 1:
            raise ValueError(f"mc_num is {self.mc_num}: at least 1 draw is needed")

    def plan(self, length: int, *keys: int) -> MaskingPlan:
        """One random mask for each time; a longer target's first tokens are masked alike.

        The standard error compares neighbours in t (collapsed strata: Cochran, Sampling Techniques, 1977, section
        5A.12), so it does not count what the even spread of the times takes away.
        """
        draws, position = self.mc_num, torch.arange(length)
        shift = float(uniform(*keys, int(Stream.LIKELIHOOD), torch.tensor(-1)))
        times = ((torch.arange(draws, dtype=torch.float64) + shift) / draws) % 1.0
        p_mask = (1 - self.eps) * times + self.eps
        masks = uniform(*keys, int(Stream.LIKELIHOOD), torch.arange(draws)[:, None], position) < p_mask[:, None]

        def reduce(nll: Tensor) -> tuple[float, float]:
            values = nll.sum(1) / p_mask.clamp(min=torch.finfo(torch.float64).tiny)
            pairs = values[: draws // 2 * 2].view(-1, 2)
            spread = (pairs[:, 0] - pairs[:, 1]).square().sum() * (draws / max(1, 2 * len(pairs)))
            return float(values.mean()), float(spread.sqrt() / draws) if len(pairs) else math.nan

        return MaskingPlan(masks, masks, reduce)

    def passes(self, length: int) -> int:
        """One for each draw."""
        return self.mc_num

    def description(self) -> str:
        """The draws; `eps` is the caller's convention and not printed."""
        return f"mc, mc_num {self.mc_num}"
