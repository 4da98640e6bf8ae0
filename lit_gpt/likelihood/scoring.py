"""Cross-entropies of chosen tokens in many rows at once: the forward passes behind every likelihood.

Rows of different requests share a batch, sorted by length and padded on the right, where a mask hides the padding: a row's
result does not depend on the other rows. Logits are computed at the scored positions only. Equal rows are evaluated once,
for all requests that have them: the answers of a multiple-choice question often differ only in the tokens that are scored.

R rows of a request, B rows of a batch, T tokens, N scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.model.layers import Transformer
from lit_gpt.model.logits import LogitsBatch, LogitsFn, model_logits

# Work after which results should come, so that an evaluation that is stopped has kept some: about 30 s of two cores (100
# GFLOP/s). A GPU's 32 batches take seconds.
_FLOPS_PER_RESULT = {"cpu": 3e12}


@dataclass(frozen=True)
class ScoringModel:
    """A model as likelihoods use it: a function from batches to logits, and its limits."""

    logits_fn: LogitsFn
    mask_id: int
    vocab_size: int
    """Real tokens; ids from here on are padding of the vocabulary and are never the likeliest."""
    max_tokens: int
    """Tokens of a batch, padding included; a longer row is a batch of its own. Decides speed and memory, not results."""
    device: torch.device | str = "cpu"
    """Where the batches go."""
    tokens_per_result: int | None = None
    """Tokens that are read before the first results must come; None: only the number of batches counts."""

    @classmethod
    def of(cls, model: Transformer, max_tokens: int) -> ScoringModel:
        """A network on its own device."""
        config, device = model.config, next(model.parameters()).device
        flops = _FLOPS_PER_RESULT.get(device.type)
        tokens = None if flops is None else int(flops / (2 * sum(value.numel() for value in model.parameters())))
        return cls(model_logits(model), config.mask_id, config.vocab_size, max_tokens, device, tokens)


@dataclass(frozen=True)
class ScoringInput:
    """The rows of one request, all of one length."""

    input_ids: Tensor
    """(R, T) int64: what the model reads."""
    scored: Tensor
    """(R, T) bool: the positions whose prediction is wanted."""
    targets: Tensor
    """(T,) int64: what each position should predict; anything where no row is scored."""
    prompt_length: int = 0
    """Leading tokens that guidance replaces by [MASK] in its second pass."""


@dataclass(frozen=True)
class TokenScores:
    """The results of one request's rows, all (R, T) and 0 where nothing is scored."""

    nll: Tensor
    """float32: -log p(target), nats; NaN or infinite where a logit of the position is, or where all of them are equal."""
    best_ids: Tensor
    """int64: the likeliest token."""
    best_probability: Tensor
    """float32: its probability."""


@torch.no_grad()
def score_tokens(model: ScoringModel, inputs: Sequence[ScoringInput]) -> list[TokenScores]:
    """Score every row of every request.

    Args:
        model: its `max_tokens` is halved for the rest of the call when memory runs out.
        inputs: in any order.

    Returns:
        The scores of each input, on the CPU.

    Raises:
        ValueError: a single row does not fit into memory.
    """
    results = [
        TokenScores(torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))
        for shape in (own.input_ids.shape for own in inputs)
    ]
    rows = _distinct_rows(inputs)
    start, max_tokens = 0, model.max_tokens
    while start < len(rows):
        length = inputs[rows[start][0][0]].input_ids.size(1)
        batch_rows = rows[start : start + max(1, max_tokens // length)]
        try:
            batch, targets = _padded_batch(inputs, batch_rows, model.device)
            found = _scores(model.logits_fn(batch), targets, model.vocab_size)
        except torch.OutOfMemoryError:
            if len(batch_rows) == 1:
                raise ValueError(f"a row of {length} tokens does not fit into the memory of {model.device}") from None
            max_tokens = len(batch_rows) * length // 2
            continue
        start += len(batch_rows)
        _store(inputs, batch_rows, found, results)
    return results


_EqualRows = list[tuple[int, int]]
"""Rows with equal input, each as (number of the request, number of its row)."""


def _distinct_rows(inputs: Sequence[ScoringInput]) -> list[_EqualRows]:
    """Rows grouped by what the model reads; longest first, so that memory runs out at once or not at all."""
    groups: dict[tuple[int, bytes], _EqualRows] = {}
    for request, own in enumerate(inputs):
        input_ids = own.input_ids.numpy()
        for row in range(len(input_ids)):
            groups.setdefault((own.prompt_length, input_ids[row].tobytes()), []).append((request, row))
    return sorted(groups.values(), key=lambda equal: -inputs[equal[0][0]].input_ids.size(1))


def _padded_batch(
    inputs: Sequence[ScoringInput], batch_rows: list[_EqualRows], device: torch.device | str
) -> tuple[LogitsBatch, Tensor]:
    """The padded batch of some distinct rows, and the targets (N,) of its scored positions."""
    width = max(inputs[equal[0][0]].input_ids.size(1) for equal in batch_rows)
    input_ids = torch.zeros(len(batch_rows), width, dtype=torch.int64)
    key_mask, prompt_mask = (torch.zeros(len(batch_rows), width, dtype=torch.bool) for _ in range(2))
    indices, targets = [], []
    for batch_row, equal in enumerate(batch_rows):
        first, first_row = inputs[equal[0][0]], equal[0][1]
        length = first.input_ids.size(1)
        input_ids[batch_row, :length] = first.input_ids[first_row]
        key_mask[batch_row, :length] = True
        prompt_mask[batch_row, : first.prompt_length] = True
        for request, row in equal:
            positions = inputs[request].scored[row].nonzero().squeeze(1)
            indices.append(positions + batch_row * width)
            targets.append(inputs[request].targets[positions])
    padded = None if bool(key_mask.all()) else key_mask.to(device)
    batch = LogitsBatch(input_ids.to(device), padded, prompt_mask.to(device), torch.cat(indices).to(device))
    return batch, torch.cat(targets).to(device)


def _scores(logits: Iterator[Tensor], targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, likeliest token and its probability at every scored position, (N,) each, on the CPU."""
    parts, start = [], 0
    for chunk in logits:
        own = targets[start : (start := start + len(chunk))]
        total = chunk.logsumexp(1)
        best, best_ids = chunk[:, :vocab_size].max(1)
        lowest = chunk.amin(1)
        # A logit of -inf vanishes in the sum, and states that overflow vanish in the last norm: their logits are all equal.
        sound = lowest.isfinite() & (lowest < best)
        nll = torch.where(sound, total - chunk.gather(1, own[:, None]).squeeze(1), torch.nan)
        parts.append((nll, best_ids, (best - total).exp()))
    nll, best_ids, best_probability = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return nll, best_ids, best_probability


def _store(
    inputs: Sequence[ScoringInput],
    batch_rows: list[_EqualRows],
    found: tuple[Tensor, Tensor, Tensor],
    results: list[TokenScores],
) -> None:
    """Write the values (N,) of a batch's scored positions into the results of all requests that have its rows."""
    start = 0
    for request, row in (one for equal in batch_rows for one in equal):
        scored = inputs[request].scored[row]
        part = slice(start, start := start + int(scored.sum()))
        scores = results[request]
        for values, whole in zip(found, (scores.nll, scores.best_ids, scores.best_probability), strict=True):
            whole[row, scored] = values[part]
