"""How well an MDM reads texts of other lengths than it was trained on: loss and next-token accuracy by length.

Every length scores the same tokens, and every model under the same masks, so that differences between models are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_gpt.checkpoints.loaded import LoadedModel
from lit_gpt.likelihood.exact import ExactBound
from lit_gpt.likelihood.loglikelihood import LikelihoodRequest, LikelihoodSettings


@dataclass(frozen=True)
class NextTokenScores:
    """Predictions of single tokens, one for each position."""

    nll: list[float]
    """Nats, exact: with one token masked the bound is the conditional likelihood."""
    correct: list[bool]
    """Whether the true token is the likeliest."""


def block_losses(model: LoadedModel, blocks: Sequence[Sequence[int]], length: int, budget: int) -> list[float]:
    """The bound of each block when it is read in pieces: nats per token.

    Args:
        model: an MDM.
        blocks: token ids, all of one length.
        length: tokens of a piece; divides the blocks' length.
        budget: forward passes for each piece.

    Raises:
        ValueError: the blocks do not divide into such pieces.
    """
    whole = len(blocks[0])
    if whole % length:
        raise ValueError(f"{whole} tokens do not divide into pieces of {length}")
    pieces = [tuple(block[start : start + length]) for block in blocks for start in range(0, whole, length)]
    requests = [LikelihoodRequest((), piece, number) for number, piece in enumerate(pieces)]
    nll = [0.0] * len(blocks)
    settings = LikelihoodSettings(ExactBound(budget))
    for number, found in model.likelihoods(requests, settings, model.batch_tokens):
        nll[number * length // whole] += found.nll / whole
    return nll


def next_token_scores(
    model: LoadedModel, ids: Sequence[int], positions: Sequence[int], length: int, pad_to: int = 0
) -> NextTokenScores:
    """Predictions of the tokens at some positions, each as the last one of a row of `length` tokens.

    Args:
        model: an MDM.
        ids: a text's tokens.
        positions: at least length - 1 each.
        length: tokens of a row, the predicted one included.
        pad_to: tokens that the model reads, filled up by [MASK]; 0 does not fill up.
    """
    requests = [LikelihoodRequest(tuple(ids[end - length + 1 : end]), (ids[end],)) for end in positions]
    nll, correct = [0.0] * len(requests), [False] * len(requests)
    settings = LikelihoodSettings(ExactBound(), greedy=True, pad_to=pad_to)
    for number, found in model.likelihoods(requests, settings, model.batch_tokens):
        nll[number], correct[number] = found.nll, found.is_greedy
    return NextTokenScores(nll, correct)


def even_positions(first: int, end: int, count: int) -> list[int]:
    """So many numbers of [first, end), evenly spread."""
    return [first + number * (end - first) // count for number in range(count)]
