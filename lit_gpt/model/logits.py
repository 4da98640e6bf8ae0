"""Logits at chosen positions of a batch: the form in which likelihoods and samplers use a model.

Whole rows go through the blocks, the chosen positions alone through the last block and the head, in chunks, so that no
tensor of batch times length times vocabulary is ever built. Classifier-free guidance is a function around such a function,
and a table of probabilities can take a model's place in a test.

B rows, T tokens, N chosen positions, W columns, C width, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_gpt.model import kernels
from lit_gpt.model.layers import Transformer


@dataclass(frozen=True)
class LogitsBatch:
    """The input of one forward pass, and the positions whose logits are wanted."""

    input_ids: Tensor
    """(B, T) int64, padded with any token."""
    key_mask: Tensor | None
    """(B, T) bool, False at padding; None where nothing is padded."""
    prompt_mask: Tensor
    """(B, T) bool, True at what guidance hides."""
    indices: Tensor
    """(N,) int64: the wanted positions, as indices into the flattened (B * T)."""
    positions: Tensor | None = None
    """(B, T) int64: each token's place in its row; None where all rows begin in the first column."""
    unconditional: bool = False
    """Whether the prompt is hidden, as in the second pass of classifier-free guidance."""
    recompute: Tensor | None = None
    """(B, T) bool: the positions whose keys and values a model with a cache computes again; None for all of them."""
    max_per_row: int | None = None
    """The largest number of positions of a row in `recompute`, or without it in `indices`; None: count them, which waits
    for the device."""


_PARTIAL_SHARE = 0.7
"""Share of a row's positions up to which the last block is computed for them alone. Time of a forward pass for 50, 70 and
90 % of the positions over that for all, on one core: 0.93, 0.95 and 1.01 at size 6, 0.97, 0.99 and 1.03 at size 170."""

_CPU_CHUNK_ELEMENTS = 2 * 2**20
"""Logits of a chunk on a CPU, 8 MB of float32 that stay in its caches: log-softmax of 2048 rows of 32000 took 39 ms in chunks
of 64 rows, 68 in chunks of 256, on one core. Training's chunks are larger, because each costs a pass over a gradient."""

LogitsFn = Callable[[LogitsBatch], Iterator[Tensor]]
"""A batch to the logits (n, V) at its `indices`, in order, in chunks."""


def model_logits(model: Transformer) -> LogitsFn:
    """A model as a function of batches."""

    def logits(batch: LogitsBatch) -> Iterator[Tensor]:
        rows, length = batch.input_ids.shape
        visibility = model.visibility.padded(batch.key_mask)
        # A causal model would need a mask there, which the fast kernels do not take.
        if not visibility.causal:
            wanted = torch.zeros(rows * length, dtype=torch.bool, device=batch.indices.device)
            wanted = wanted.index_fill(0, batch.indices, True).view(rows, length)
            columns, places = selected_columns(wanted, batch.max_per_row)
            # The last block computes the wanted positions alone; where they are most of the row, that saves nothing.
            if columns.size(1) <= length * _PARTIAL_SHARE:
                hidden = model.hidden_states(batch.input_ids, batch.positions, visibility, columns=columns)
                return logits_in_chunks(model, hidden[batch.indices // length, places.flatten()[batch.indices]])
        hidden = model.hidden_states(batch.input_ids, batch.positions, visibility)
        return logits_in_chunks(model, hidden.flatten(0, 1)[batch.indices])

    return logits


def selected_columns(selection: Tensor, max_per_row: int | None = None) -> tuple[Tensor, Tensor]:
    """The selected columns of each row, and the place of every column among those of its row.

    Args:
        selection: (B, T) bool.
        max_per_row: the largest number of columns of a row; None: count, which waits for the device.

    Returns:
        (B, W) int64 with W the largest number of a row: a row with fewer repeats its last column (one with none has the
        last of all), which computes the same numbers twice; and (B, T) int64, of use where the selection is True.
    """
    counts = selection.sum(1, keepdim=True)
    # Selected columns come first, in their order.
    order = (~selection).to(torch.int8).argsort(dim=1, stable=True)
    width = max(1, int(counts.max()) if max_per_row is None else max_per_row)
    place = torch.arange(width, device=selection.device).expand(len(selection), -1)
    columns = order.gather(1, torch.minimum(place, (counts - 1).clamp(min=0)))
    columns = torch.where(counts > 0, columns, selection.size(1) - 1)
    return columns, selection.cumsum(1) - 1


def logits_in_chunks(model: Transformer, hidden: Tensor) -> Iterator[Tensor]:
    """The head's logits of (N, C) rows, (n, V) float32 at a time."""
    elements = _CPU_CHUNK_ELEMENTS if hidden.device.type == "cpu" else kernels.chunk_elements(hidden.device)
    rows = max(1, elements // model.lm_head.weight.size(0))
    for part in hidden.split(rows):
        yield model.lm_head(part).float()


def guided(logits_fn: LogitsFn, cfg_scale: float, mask_id: int) -> LogitsFn:
    """Classifier-free guidance: un + (cfg_scale + 1) (cond - un), where `un` has [MASK] in the prompt's place.

    Args:
        logits_fn: the model.
        cfg_scale: w; 0 returns `logits_fn` itself.
        mask_id: id of [MASK].

    Source: Ho & Salimans 2022 (arXiv 2207.12598); unsupervised form: SMDM (arXiv 2410.18514), section 4.
    """
    if not cfg_scale:
        return logits_fn

    def with_guidance(batch: LogitsBatch) -> Iterator[Tensor]:
        hidden = batch.input_ids.masked_fill(batch.prompt_mask, mask_id)
        unconditional = replace(batch, input_ids=hidden, unconditional=True)
        for cond, uncond in zip(logits_fn(batch), logits_fn(unconditional), strict=True):
            yield uncond + (cfg_scale + 1) * (cond - uncond)

    return with_guidance
