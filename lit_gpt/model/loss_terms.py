"""What a training batch gives to a model's loss, as one value.

B rows, T columns (an objective may put more columns into a row than the row has tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
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
    scored: Tensor | None = None
    """(N,) int64: where `weights.flatten()` is not 0, ascending; None has the model look, for which a GPU's host waits."""

    def prepared_for(self, device: torch.device) -> LossTerms:
        """With `scored`, and where the device is a GPU in memory that it reads by itself; call it on the host's tensors."""
        terms = self._replace(scored=self.weights.flatten().nonzero().squeeze(1))
        return terms._moved(lambda tensor: tensor.contiguous().pin_memory()) if device.type == "cuda" else terms

    def to(self, device: torch.device) -> LossTerms:
        """On a device; the host does not wait for what was prepared for it."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def _moved(self, move: Callable[[Tensor], Tensor]) -> LossTerms:
        """The same with every tensor moved."""
        moved: dict[str, Any] = {name: move(field) for name, field in self._asdict().items() if torch.is_tensor(field)}
        visibility = self.visibility
        if visibility is not None and visibility.key_mask is not None:
            moved["visibility"] = visibility.padded(move(visibility.key_mask))
        return self._replace(**moved)
