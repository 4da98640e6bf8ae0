"""Keys and values kept between the denoising steps of a block: the prefix and dual caches of Fast-dLLM.

An MDM sees every token from every other, so no key or value is final while anything is masked; keeping those of the
tokens that a block's steps do not change is an approximation, which ends with the next full reading. With a full reading
at every step nothing is approximated. Source: Wu et al. 2025 (arXiv 2505.22618). May import layers and reading.

B rows, T tokens, W tokens of a partial reading, G query groups, D head size, C width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lit_gpt.model.layers import LayerCache, Transformer
from lit_gpt.model.logits import LogitsBatch, LogitsFn, logits_in_chunks, selected_columns


class RowCache(LayerCache):
    """One layer's keys and values of whole rows, of which some columns are written anew."""

    columns: Tensor | None = None
    """(B, W) int64: where the next tokens stand; None for all T."""

    def append(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write (B, G, W, D) at the columns; returns all keys and values."""
        if self.columns is None:
            self.k, self.v = k, v
        else:
            place = self.columns[:, None, :, None].expand_as(k)
            self.k.scatter_(2, place, k)
            self.v.scatter_(2, place, v)
        return self.k, self.v


def block_cached(model: Transformer) -> LogitsFn:
    """A model that reads whole rows where a batch has no `recompute`, else those positions alone, with what it kept.

    Guidance's two passes keep their own keys and values.
    """
    kept: dict[bool, list[RowCache]] = {}

    def logits(batch: LogitsBatch) -> Iterator[Tensor]:
        if batch.recompute is None:
            empty = torch.empty(0)
            caches = kept[batch.unconditional] = [RowCache(empty, empty) for _ in model.transformer.h]
            hidden = model.hidden_states(batch.input_ids, _positions(batch), batch.key_mask, list(caches))
            return logits_in_chunks(model, hidden.flatten(0, 1)[batch.indices])
        caches = kept[batch.unconditional]
        columns, places = selected_columns(batch.recompute, batch.max_per_row)
        for cache in caches:
            cache.columns = columns
        input_ids, positions = batch.input_ids.gather(1, columns), _positions(batch).gather(1, columns)
        hidden = model.hidden_states(input_ids, positions, batch.key_mask, list(caches))
        row, column = batch.indices // batch.input_ids.size(1), batch.indices % batch.input_ids.size(1)
        return logits_in_chunks(model, hidden[row, places[row, column]])

    return logits


def _positions(batch: LogitsBatch) -> Tensor:
    if batch.positions is not None:
        return batch.positions
    return torch.arange(batch.input_ids.size(1), device=batch.input_ids.device).expand_as(batch.input_ids)
