"""The left-to-right product: log p = sum over j of log p(token j | prefix, the target's tokens before j, [MASK] behind).

It is not the bound, but the likelihood of one order of unmasking. Source: SMDM (arXiv 2410.18514), `nll_type=chain_rule`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lit_gpt.likelihood.plan import Estimator, MaskingPlan


@dataclass(frozen=True)
class ChainRule(Estimator):
    """In pass j the target's tokens from j on are masked, and token j is scored."""

    name = "chain_rule"
    is_bound = False

    def plan(self, length: int, *keys: int) -> MaskingPlan:
        """L passes, none of them random."""
        return MaskingPlan(
            torch.ones(length, length, dtype=torch.bool).triu(),
            torch.eye(length, dtype=torch.bool),
            lambda nll: (float(nll.sum()), 0.0),
        )

    def passes(self, length: int) -> int:
        """One for each token."""
        return length
