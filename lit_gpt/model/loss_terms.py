"""What a training batch gives to a model's loss, as one value.

B rows, T columns (an objective may put more columns into a row than the row has tokens).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lit_gpt.model.visibility import Visibility


class LossTerms(NamedTuple):
    """What the model reads, what it predicts, and the weight of every prediction.

    A NamedTuple, because Fabric refuses frozen dataclasses among the arguments of a forward method.
    """

    input_ids: Tensor
    """(B, T) int64: what the model reads."""
    targets: Tensor
    """(B, T) int64: what each column should predict."""
    weights: Tensor
    """(B, T) float32: the loss is the sum of weights * cross-entropies; 0 where nothing is scored."""
    in_denominator: Tensor
    """(B, T) bool: the target tokens that the loss's denominator counts."""
    positions: Tensor | None = None
    """(B, T) int64: each column's position; None means 0, 1, ..."""
    visibility: Visibility | None = None
    """Which columns each column attends to; None means the model's own rule."""
