"""How likelihoods and samplers see a model: a batch of rows in, logits at chosen positions out.

Decisions: whole rows go through the blocks, chosen positions alone through the head, in chunks, so that no batch times
length times vocabulary is ever built; guidance is a function around such a function; a toy distribution can stand for a
model in every test. May import kernels and layers only.

B rows, T tokens, N chosen positions, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_gpt.model import kernels
from lit_gpt.model.layers import Transformer


@dataclass(frozen=True)
class ReadBatch:
    """What the model reads at once, and where its logits are wanted."""

    input_ids: Tensor
    """(B, T) int64, padded with any token."""
    key_mask: Tensor | None
    """(B, T) bool, False at padding; None where nothing is padded."""
    prompt_mask: Tensor
    """(B, T) bool, True at what guidance hides."""
    where: Tensor
    """(N,) int64: positions in the flattened (B * T)."""
    positions: Tensor | None = None
    """(B, T) int64: each token's place in its row; None where all rows begin in the first column."""
    without_prompt: bool = False
    """Whether this is guidance's second pass."""
    window: Tensor | None = None
    """(B, T) bool: what a reader with a cache must compute anew (`block_cache`); None for everything."""
    most: int | None = None
    """The most positions that one row has in `window`, or without one in `where`; None: count them, which waits for the
    device."""


_FEW = 0.7
"""Share of a row's positions up to which the last block is worth reading for them alone."""
LogitsFn = Callable[[ReadBatch], Iterator[Tensor]]
"""A batch to the logits (n, V) at `where`, in order, in chunks."""


def model_logits(model: Transformer) -> LogitsFn:
    """A model as a function of batches."""

    def logits(batch: ReadBatch) -> Iterator[Tensor]:
        rows, length = batch.input_ids.shape
        if not model.causal:
            window = torch.zeros(rows * length, dtype=torch.bool, device=batch.where.device)
            columns, slots = window_columns(window.index_fill(0, batch.where, True).view(rows, length), batch.most)
            # The last block is read where somebody looks; where most positions do, the detour does not pay.
            if columns.size(1) <= length * _FEW:
                hidden = model.hidden_states(batch.input_ids, batch.positions, batch.key_mask, columns=columns)
                return head_logits(model, hidden[batch.where // length, slots.flatten()[batch.where]])
        hidden = model.hidden_states(batch.input_ids, batch.positions, batch.key_mask)
        return head_logits(model, hidden.flatten(0, 1)[batch.where])

    return logits


def window_columns(window: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """The columns of a window as a rectangle, and where each column stands in it.

    Args:
        window: (B, T) bool.
        most: the largest count of a row; None: count, which waits for the device.

    Returns:
        (B, W) int64 with W the largest count of a row; a row with fewer repeats its last column (an empty one the last of
        all), which computes the same numbers twice; and (B, T) int64, meaningful where the window is True.
    """
    counts = window.sum(1, keepdim=True)
    # Columns inside come first, in their order.
    order = (~window).to(torch.int8).argsort(dim=1, stable=True)
    width = max(1, int(counts.max()) if most is None else most)
    slot = torch.arange(width, device=window.device).expand(len(window), -1)
    columns = order.gather(1, torch.minimum(slot, (counts - 1).clamp(min=0)))
    columns = torch.where(counts > 0, columns, window.size(1) - 1)
    return columns, window.cumsum(1) - 1


def head_logits(model: Transformer, hidden: Tensor) -> Iterator[Tensor]:
    """The head's logits of (N, C) rows, (n, V) float32 at a time."""
    rows = max(1, kernels.chunk_elements(hidden.device) // model.lm_head.weight.size(0))
    for part in hidden.split(rows):
        yield model.lm_head(part).float()


def guided(logits_fn: LogitsFn, cfg_scale: float, mask_id: int) -> LogitsFn:
    """Classifier-free guidance: un + (cfg_scale + 1) (cond - un), where `un` reads the prompt as [MASK].

    Args:
        logits_fn: the model.
        cfg_scale: w; 0 returns `logits_fn` itself.
        mask_id: id of [MASK].

    Source: Ho & Salimans 2022 (arXiv 2207.12598); unsupervised form: SMDM (arXiv 2410.18514), section 4.
    """
    if not cfg_scale:
        return logits_fn

    def with_guidance(batch: ReadBatch) -> Iterator[Tensor]:
        hidden = batch.input_ids.masked_fill(batch.prompt_mask, mask_id)
        unconditional = replace(batch, input_ids=hidden, without_prompt=True)
        for cond, uncond in zip(logits_fn(batch), logits_fn(unconditional), strict=True):
            yield uncond + (cfg_scale + 1) * (cond - uncond)

    return with_guidance
