"""A batch of sequences that are partly given, of different lengths, padded on the left; and its states while it is sampled.

Decisions: padding is on the left with a key mask, so every row ends in the last column; each row's positions start at
0 (the rounded rotary tables are not shift-invariant); a row carries its own number, the key of its random stream.
Infilling needs nothing new here: any position may be given.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lit_gpt.config import Config


@dataclass(frozen=True)
class PartialSequences:
    """A batch to be completed: whole rows with [MASK]s for an MDM, prompts for an ARM; all end in the last column."""

    input_ids: Tensor
    """(B, T) int64: prompts, [MASK] where a token is wanted, 0 at padding."""
    positions: Tensor
    """(B, T) int64: from 0 at a row's first token; 0 at padding."""
    key_mask: Tensor
    """(B, T) bool: False at padding."""
    prompt_mask: Tensor
    """(B, T) bool: True where a token is given."""
    rows: Tensor
    """(B,) int64: each row's number, the key of its random stream."""

    def regrouped(self, kept: Tensor, joined: PartialSequences | None) -> PartialSequences:
        """Some of the rows (n,), and behind them those of another batch of the same width."""
        others = [] if joined is None else [joined]
        return PartialSequences(
            *(
                torch.cat([getattr(self, one.name)[kept], *(getattr(own, one.name) for own in others)])
                for one in fields(self)
            )
        )

    def attention_mask(self) -> Tensor | None:
        """`key_mask`, or None where nothing is padded (faster kernels); waits for the device."""
        return None if bool(self.key_mask.all()) else self.key_mask


@dataclass(frozen=True)
class State:
    """The sequences after a step, on the device: who asks for tokens waits until it has computed them."""

    step: int
    """Steps done; 0 is the prompt alone."""
    input_ids: Tensor
    """(B, T) int64; [MASK] where nothing is decided."""
    confidence: Tensor
    """(B, T) float32: the model's probability of a token when it was decided; 1 at prompts, 0 where undecided."""
    key_mask: Tensor
    """(B, T) bool: False at padding and, for the ARM, where no token has been written."""
    finite: Tensor | None = None
    """Scalar bool: whether all logits up to here were finite numbers; None if there were none."""
    changeable: Tensor | None = None
    """(B, T) bool: what a later step may still change; None where that is [MASK] alone."""

    def check(self) -> None:
        """Refuse what a broken model wrote.

        Raises:
            ValueError: some logits were no finite numbers.
        """
        if self.finite is not None:
            check_finite_logits(self.finite)

    def tokens(self) -> list[Tensor]:
        """Each row without its padding, (L_i,) int64.

        Raises:
            ValueError: as `check`.
        """
        self.check()
        return [ids[keep] for ids, keep in zip(self.input_ids, self.key_mask, strict=True)]

    def confidences(self) -> list[Tensor]:
        """The confidences of `tokens`, (L_i,) float32 each."""
        return [value[keep] for value, keep in zip(self.confidence, self.key_mask, strict=True)]


@dataclass(frozen=True)
class SampleRequest:
    """One prompt of many to complete."""

    prompt: Sequence[int]
    """Token ids."""
    length: int
    """Tokens of the finished row, prompt included."""
    row: int
    """The row's number, which decides its random numbers."""
    is_decided: Callable[[list[int]], bool] | None = None
    """Given the first new tokens, as far as they are final: whether nothing behind them counts. None: all tokens count."""


def check_finite_logits(finite: Tensor) -> None:
    """Refuse a broken model; waits for the device.

    Args:
        finite: scalar bool, whether all logits were finite numbers.

    Raises:
        ValueError: they were not.
    """
    if not bool(finite):
        raise ValueError("the model gives logits that are no finite numbers: its weights are damaged or it diverged")


def context_lengths(
    prompts: Sequence[Sequence[int] | Tensor], context_length: int | Sequence[int], config: Config
) -> tuple[int, ...]:
    """One length of the finished row per prompt, checked.

    Args:
        prompts: token ids per row.
        context_length: of all rows, or of each.
        config: of the model.

    Raises:
        ValueError: no prompt; a length that the model cannot read, or below its prompt's; ids that are no tokens.
    """
    lengths = (context_length,) * len(prompts) if isinstance(context_length, int) else tuple(context_length)
    if not len(prompts):
        raise ValueError("sampling: no prompt was given")
    if len(lengths) != len(prompts):
        raise ValueError(f"sampling: {len(lengths)} context lengths for {len(prompts)} prompts")
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        if not 1 <= length <= config.block_size:
            raise ValueError(f"context length {length}: this model reads from 1 to {config.block_size} tokens")
        if len(prompt) > length:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, more than the context length {length} (prompt included): "
                f"shorten it or raise the context length (this model's limit is {config.block_size})"
            )
        ids = torch.as_tensor(prompt, dtype=torch.int64)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
            raise ValueError(
                f"prompt {index} holds ids from {int(ids.min())} to {int(ids.max())}: this model's tokens are 0 to "
                f"{config.vocab_size - 1} (the mask is no token of a prompt)"
            )
    return lengths


def masked_sequences(
    prompts: Sequence[Sequence[int] | Tensor],
    lengths: Sequence[int],
    mask_id: int,
    rows: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    width: int = 0,
) -> PartialSequences:
    """Each prompt followed by [MASK] up to its length; shorter rows are padded on the left.

    Args:
        prompts: token ids per row.
        lengths: tokens of each finished row, at least the prompt's.
        mask_id: id of [MASK].
        rows: as `sample`.
        device: where the tensors go.
        width: columns, if they shall be more than the longest row has.
    """
    filled = []
    for prompt, length in zip(prompts, lengths, strict=True):
        given = torch.as_tensor(prompt, dtype=torch.int64).cpu()
        filled.append(torch.cat((given, torch.full((length - len(given),), mask_id))))
    return _aligned_right(filled, [ids != mask_id for ids in filled], rows, device, width)


def prompt_sequences(
    prompts: Sequence[Sequence[int] | Tensor], rows: Sequence[int] | None = None, device: torch.device | str = "cpu"
) -> PartialSequences:
    """The prompts alone, padded on the left so that all of them end in the last column; arguments as `masked_sequences`.

    Raises:
        ValueError: a prompt is empty: the ARM's first token needs one before it.
    """
    ids = [torch.as_tensor(prompt, dtype=torch.int64).cpu() for prompt in prompts]
    for index, row in enumerate(ids):
        if not len(row):
            raise ValueError(f"prompt {index} is empty: an ARM needs at least one token to start from, such as bos")
    return _aligned_right(ids, [torch.ones(len(row), dtype=torch.bool) for row in ids], rows, device)


def _aligned_right(
    ids: Sequence[Tensor],
    given: Sequence[Tensor],
    rows: Sequence[int] | None,
    device: torch.device | str,
    width: int = 0,
) -> PartialSequences:
    """Rows of different lengths, padded on the left to the longest, or to a width."""
    shape = (len(ids), max(width, *(len(row) for row in ids)))
    input_ids, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    key_mask, prompt_mask = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for index, row in enumerate(ids):
        start = shape[1] - len(row)
        input_ids[index, start:] = row
        positions[index, start:] = torch.arange(len(row))
        key_mask[index, start:] = True
        prompt_mask[index, start:] = given[index]
    numbers = torch.arange(len(ids)) if rows is None else torch.tensor(list(rows), dtype=torch.int64)
    assert len(numbers) == len(ids)
    return PartialSequences(*(tensor.to(device) for tensor in (input_ids, positions, key_mask, prompt_mask, numbers)))
