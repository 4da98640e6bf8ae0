"""Recipes of training an MDM at a fixed budget: what each changes of the published one, as flags of `pretrain/train_mdm.py`.

Every recipe reads the same number of tokens with the same model, so it costs the same FLOPs (6 N D); what is compared is
the bound at full length. Measured in docs/results/mdm_recipes.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SHORT_ROWS = ((8, 0.25), (4, 0.5), (2, 0.75))
"""Rows are read in so many pieces up to so much of the run, then whole; ours, the first that was tried."""


@dataclass(frozen=True)
class StepBudget:
    """A budget as the steps of a batch, with what the published recipe takes for them."""

    steps: int
    """Optimizer steps."""
    batch_size: int
    """Sequences of a step."""
    block_size: int
    """Tokens of a sequence."""
    learning_rate: float
    """Peak."""


@dataclass(frozen=True)
class MdmRecipe:
    """How an MDM is trained; the defaults are the published recipe."""

    what: str
    """In words, for tables."""
    loss_weight: str = "elbo"
    """As `--loss_weight`."""
    pieces: tuple[tuple[int, float], ...] = ()
    """(pieces of a row, share of the run up to which), as `--row_lengths` in steps and tokens."""
    batch_share: int = 1
    """The batch is divided by this, and the steps are multiplied by it."""
    rate_factor: float = 1.0
    """Of the learning rate."""
    weight_decay: float = 0.1
    """As `--weight_decay`."""

    def flags(self, budget: StepBudget) -> dict[str, Any]:
        """Flags of the training script; those that are the script's own defaults are left out."""
        batch_size = max(1, budget.batch_size // self.batch_share)
        steps = budget.steps * budget.batch_size // batch_size
        rate = budget.learning_rate * self.rate_factor
        found: dict[str, Any] = {
            "batch_size": batch_size,
            "learning_rate": rate,
            "max_steps": steps,
            "warmup_steps": max(1, min(100, steps // 10)),
            "min_lr": rate / 10,
        }
        if self.loss_weight != "elbo":
            found["loss_weight"] = self.loss_weight
        # A block that does not divide by the pieces, or a run without a step for them, goes without; of few steps the last
        # length for a step is taken, which is the longest.
        lengths = {
            int(share * steps): budget.block_size // pieces
            for pieces, share in self.pieces
            if budget.block_size % pieces == 0 and int(share * steps)
        }
        if lengths:
            found["row_lengths"] = ",".join(f"{length}:{step}" for step, length in lengths.items())
        if self.weight_decay != MdmRecipe.weight_decay:
            found["weight_decay"] = self.weight_decay
        return found


RECIPES = {
    "published": MdmRecipe("the published recipe: CE / p, whole rows"),
    "cross_entropy": MdmRecipe("mean CE of masked tokens", "cross_entropy"),
    "short_rows": MdmRecipe("short rows first", pieces=_SHORT_ROWS),
    "short_cross_entropy": MdmRecipe("short rows first, mean CE", "cross_entropy", _SHORT_ROWS),
    "best": MdmRecipe("short rows first, mean CE, half the batch and twice the steps", "cross_entropy", _SHORT_ROWS, 2),
}
"""By the names that the study's pages and `--recipe` of the quickstart use."""
