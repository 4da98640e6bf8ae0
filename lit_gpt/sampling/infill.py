"""Text with gaps: what a person types, as the tokens and [MASK]s that an MDM fills in.

Decisions: a gap is three or more underscores, `___5` one of exactly five tokens; the row ends where the text ends, since
a person who wants more after it adds a gap. The space before a gap belongs to the gap, because a word's token holds the
space before it; where the model begins the gap without one, the finished text still has the space that was typed
(`spaced_positions`, `with_typed_spaces`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_gpt.model.causal import GPT
from lit_gpt.model.layers import Transformer
from lit_gpt.sampling.sample import mdm_states, sample_states
from lit_gpt.sampling.sequence import State, context_lengths
from lit_gpt.sampling.settings import Sampling

if TYPE_CHECKING:
    from lit_gpt.tokenizer import Tokenizer

DEFAULT_GAP = 8
"""Tokens of a gap without a number: a few words."""
_GAP = re.compile(r"_{3,}(\d*)")
# Beyond any context; Python refuses to read numbers of thousands of digits.
_MOST_DIGITS = 9
_ANCHORS = ("\n", "a", ".")
_NO_GAPS = "an ARM writes from left to right and cannot fill gaps (___): end the prompt with its text, or use an MDM"


def has_gaps(text: str) -> bool:
    """Whether a text has a gap."""
    return _GAP.search(text) is not None


def split_gaps(text: str, gap: int = DEFAULT_GAP) -> list[str | int]:
    """A text's pieces in their order: what is written as strings, gaps as their numbers of tokens.

    Args:
        text: such as `the ___ sat on the ___3`.
        gap: tokens of a gap without a number.

    Raises:
        ValueError: a gap of no token, or one with more digits than any context.
    """
    pieces: list[str | int] = []
    start = 0
    for found in _GAP.finditer(text):
        digits = found[1].lstrip("0")
        if len(digits) > _MOST_DIGITS:
            raise ValueError(f"a gap's number has {len(digits)} digits: no context has room for it")
        size = int(digits or 0) if found[1] else gap
        if size < 1:
            raise ValueError(f"the gap {found[0]} has {size} tokens: at least 1 is needed")
        pieces += [text[start : found.start()].removesuffix(" "), size]
        start = found.end()
    return [piece for piece in (*pieces, text[start:]) if piece]


def infill_row(text: str, tokenizer: Tokenizer, mask_id: int, limit: int, gap: int = DEFAULT_GAP) -> list[int]:
    """Token ids of a text, `mask_id` at its gaps; a text without gaps gives the tokenizer's ids.

    Args:
        text: see `split_gaps`.
        tokenizer: of the model.
        mask_id: id of [MASK].
        limit: tokens that a row with gaps may have.
        gap: tokens of a gap without a number.

    Raises:
        ValueError: a gap of no token, or more of them than the limit has room for.
    """
    pieces = split_gaps(text, gap)
    written = _written(pieces, tokenizer)
    gaps = [piece if isinstance(piece, int) else 0 for piece in pieces]
    # Before any gap is filled with masks: a typed number can be larger than the memory.
    if any(gaps) and (total := sum(gaps) + sum(map(len, written))) > limit:
        raise ValueError(
            f"prompt 0 has {total} tokens, more than the context length {limit} (gaps included): shorten it"
        )
    return [token for ids, size in zip(written, gaps, strict=True) for token in (*ids, *[mask_id] * size)]


def spaced_positions(text: str, tokenizer: Tokenizer, gap: int = DEFAULT_GAP) -> frozenset[int]:
    """Where in `infill_row`, beyond its beginning, a gap comes behind a typed space; arguments as there."""
    typed = iter([text[: found.start()].endswith(" ") for found in _GAP.finditer(text)])
    pieces, found, position = split_gaps(text, gap), set(), 0
    for piece, ids in zip(pieces, _written(pieces, tokenizer), strict=True):
        if isinstance(piece, int) and next(typed) and position:
            found.add(position)
        position += piece if isinstance(piece, int) else len(ids)
    return frozenset(found)


def with_typed_spaces(ids: Sequence[int], spaced: Collection[int], tokenizer: Tokenizer) -> str:
    """The text of finished tokens, with a space before each of the positions `spaced` that has none."""
    text = tokenizer.decode(list(ids))
    for position in sorted(spaced, reverse=True):
        before = len(tokenizer.decode(list(ids[:position])))
        if not text.startswith(" ", before):
            text = f"{text[:before]} {text[before:]}"
    return text


def infill_states(
    model: Transformer,
    rows: Sequence[Sequence[int] | Tensor],
    sampling: Sampling,
    context_length: int | Sequence[int],
    stop_id: int | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[State]:
    """`sample_states`, for rows that may hold [MASK] anywhere: those positions are filled in.

    Args:
        model: an MDM, or an ARM if no row holds [MASK].
        rows: token ids and [MASK]s; [MASK] follows up to the context length.
        sampling: how.
        context_length: as `sample`.
        stop_id: as `sample`.
        numbers: each row's number, the `rows` of `sample_states`.

    Raises:
        ValueError: [MASK] for an ARM; else as `sample_states`.
    """
    config = model.config
    ids = [torch.as_tensor(row, dtype=torch.int64).cpu() for row in rows]
    gaps = [row == config.mask_id for row in ids]
    if not any(bool(gap.any()) for gap in gaps):
        return sample_states(model, ids, sampling, context_length, stop_id, numbers)
    if isinstance(model, GPT):
        raise ValueError(_NO_GAPS)
    # [MASK] is no token of a prompt: any token stands in for it where prompts are checked.
    given = [row.masked_fill(gap, 0) for row, gap in zip(ids, gaps, strict=True)]
    return mdm_states(model, ids, context_lengths(given, context_length, config), sampling, stop_id, numbers)


def _written(pieces: Sequence[str | int], tokenizer: Tokenizer) -> list[list[int]]:
    """The token ids of each piece of `split_gaps`; none for gaps."""
    return [
        (_continuation(tokenizer, piece) if number else tokenizer.encode_ids(piece)) if isinstance(piece, str) else []
        for number, piece in enumerate(pieces)
    ]


def _continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that goes on within a row: without the space that a tokenizer puts before a whole text."""
    for anchor in _ANCHORS:
        before = tokenizer.encode_ids(anchor)
        ids = tokenizer.encode_ids(anchor + text)
        if ids[: len(before)] == before:
            return ids[len(before) :]
    return tokenizer.encode_ids(text)
