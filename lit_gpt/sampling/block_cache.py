"""Keys and values kept between the denoising steps of a block: the prefix and dual caches of Fast-dLLM.

An MDM sees every token from every other, so no key or value is final while anything is masked; keeping those of the
tokens that a block's steps do not change is an approximation, which ends with the next full reading. With a full reading
at every step nothing is approximated. Source: Wu et al. 2025 (arXiv 2505.22618).

B rows, T tokens, W tokens of a partial reading, G query groups, D head size, C width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lit_gpt.model.layers import Transformer
from lit_gpt.model.logits import LogitsBatch, LogitsFn, logits_in_chunks, selected_columns


class BlockCache:
    """Keys and values of whole rows, of which some columns are computed again; see `layers.KeyValueCache`.

    Attributes:
        recomputed: (B, W) int64, the columns in which the next tokens stand; None for all T.
    """

    def __init__(self) -> None:
        self.recomputed: Tensor | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def total_columns(self, new_tokens: int) -> int:
        """T, whatever part of it is computed again."""
        return self._layers[0][0].size(2) if self._layers else new_tokens

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, G, W, D) at the columns; returns all keys and values."""
        if self.recomputed is None:
            self._layers[layer] = k, v
        else:
            index = self.recomputed[:, None, :, None].expand_as(k)
            for kept, new in zip(self._layers[layer], (k, v), strict=True):
                kept.scatter_(2, index, new)
        return self._layers[layer]


def block_cached(model: Transformer) -> LogitsFn:
    """A model that reads whole rows where a batch has no `recompute`, else those positions alone, with what it kept.

    The two passes of classifier-free guidance keep their own keys and values.
    """
    kept: dict[bool, BlockCache] = {}

    def logits(batch: LogitsBatch) -> Iterator[Tensor]:
        visibility = model.visibility.padded(batch.key_mask)
        if batch.recompute is None:
            cache = kept[batch.unconditional] = BlockCache()
            hidden = model.hidden_states(batch.input_ids, _positions(batch), visibility, cache)
            return logits_in_chunks(model, hidden.flatten(0, 1)[batch.indices])
        cache = kept[batch.unconditional]
        columns, places = selected_columns(batch.recompute, batch.max_per_row)
        cache.recomputed = columns
        input_ids, positions = batch.input_ids.gather(1, columns), _positions(batch).gather(1, columns)
        hidden = model.hidden_states(input_ids, positions, visibility, cache)
        row, column = batch.indices // batch.input_ids.size(1), batch.indices % batch.input_ids.size(1)
        return logits_in_chunks(model, hidden[row, places[row, column]])

    return logits


def _positions(batch: LogitsBatch) -> Tensor:
    if batch.positions is not None:
        return batch.positions
    return torch.arange(batch.input_ids.size(1), device=batch.input_ids.device).expand_as(batch.input_ids)
