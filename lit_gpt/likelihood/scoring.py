"""Cross-entropies of chosen tokens in many rows at once: the forward passes behind every likelihood.

Decisions: rows of different requests share a batch, sorted by length and padded on the right under a key mask, so a
result depends on no batch-mate; the head runs only on the positions that are scored (`reading`); equal inputs are read
once, whoever asks (the answers of a multiple-choice question often differ in what they score, not in what is read).
May import reading only.

R rows of a query, B rows of a batch, T tokens, N scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.model.logits import LogitsBatch, LogitsFn


@dataclass(frozen=True)
class Query:
    """Rows of one request, all of one length."""

    input_ids: Tensor
    """(R, T) int64: what the model reads."""
    scored: Tensor
    """(R, T) bool: the positions whose prediction is wanted."""
    targets: Tensor
    """(T,) int64: what each position should predict; anything where no row is scored."""
    prompt_length: int = 0
    """Leading tokens that guidance hides in its second pass."""


@dataclass(frozen=True)
class Scores:
    """A query's results, all (R, T) and 0 where nothing is scored."""

    nll: Tensor
    """float32: -log p(target), nats."""
    best_ids: Tensor
    """int64: the likeliest token."""
    best_probability: Tensor
    """float32: its probability."""


@torch.no_grad()
def score(
    logits_fn: LogitsFn, queries: Sequence[Query], vocab_size: int, max_tokens: int, device: torch.device | str = "cpu"
) -> list[Scores]:
    """Score every row of every query.

    Args:
        logits_fn: the model, see `reading`.
        queries: in any order.
        vocab_size: K; ids from here on are padding of the vocabulary and are never the likeliest.
        max_tokens: tokens of a batch, padding included; a longer row is a batch of its own. Halved when memory runs out.
        device: where the model reads.

    Returns:
        One `Scores` per query, on the CPU.

    Raises:
        ValueError: a single row does not fit into memory.
    """
    results = [
        Scores(torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))
        for shape in (query.input_ids.shape for query in queries)
    ]
    rows = _distinct_rows(queries)
    start = 0
    while start < len(rows):
        length = queries[rows[start][0][0]].input_ids.size(1)
        group = rows[start : start + max(1, max_tokens // length)]
        try:
            batch, targets = _read_batch(queries, group, device)
            found = _evaluate(logits_fn(batch), targets, vocab_size)
        except torch.OutOfMemoryError:
            if len(group) == 1:
                raise ValueError(f"a row of {length} tokens does not fit into the memory of {device}") from None
            max_tokens = len(group) * length // 2
            continue
        start += len(group)
        _hand_out(queries, group, found, results)
    return results


_User = tuple[int, int]
"""(number of the query, number of its row)."""


def _distinct_rows(queries: Sequence[Query]) -> list[list[_User]]:
    """Rows that read the same, together; longest first, so that memory runs out at once or not at all."""
    users: dict[tuple[int, bytes], list[_User]] = {}
    for number, query in enumerate(queries):
        wide = query.input_ids.numpy()
        for row in range(len(wide)):
            users.setdefault((query.prompt_length, wide[row].tobytes()), []).append((number, row))
    return sorted(users.values(), key=lambda group: -queries[group[0][0]].input_ids.size(1))


def _read_batch(
    queries: Sequence[Query], group: list[list[_User]], device: torch.device | str
) -> tuple[LogitsBatch, Tensor]:
    """The padded batch of some distinct rows, and the targets (N,) of its scored positions."""
    width = max(queries[users[0][0]].input_ids.size(1) for users in group)
    input_ids = torch.zeros(len(group), width, dtype=torch.int64)
    key_mask, prompt_mask = (torch.zeros(len(group), width, dtype=torch.bool) for _ in range(2))
    where, targets = [], []
    for place, users in enumerate(group):
        query, row = queries[users[0][0]], users[0][1]
        length = query.input_ids.size(1)
        input_ids[place, :length] = query.input_ids[row]
        key_mask[place, :length] = True
        prompt_mask[place, : query.prompt_length] = True
        for number, own_row in users:
            positions = queries[number].scored[own_row].nonzero().squeeze(1)
            where.append(positions + place * width)
            targets.append(queries[number].targets[positions])
    padded = None if bool(key_mask.all()) else key_mask.to(device)
    batch = LogitsBatch(input_ids.to(device), padded, prompt_mask.to(device), torch.cat(where).to(device))
    return batch, torch.cat(targets).to(device)


def _hand_out(
    queries: Sequence[Query], group: list[list[_User]], found: tuple[Tensor, Tensor, Tensor], results: list[Scores]
) -> None:
    """Put what was found at the scored positions of a group of distinct rows where each of their users looks for it."""
    start = 0
    for number, row in (user for users in group for user in users):
        scored = queries[number].scored[row]
        part = slice(start, start := start + int(scored.sum()))
        scores = results[number]
        for value, whole in zip(found, (scores.nll, scores.best_ids, scores.best_probability), strict=True):
            whole[row, scored] = value[part]


def _evaluate(logits: Iterator[Tensor], targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, likeliest token and its probability at every scored position, (N,) each, on the CPU."""
    parts, start = [], 0
    for chunk in logits:
        own = targets[start : (start := start + len(chunk))]
        total = chunk.logsumexp(1)
        best, best_ids = chunk[:, :vocab_size].max(1)
        parts.append((total - chunk.gather(1, own[:, None]).squeeze(1), best_ids, (best - total).exp()))
    nll, best_ids, best_probability = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return nll, best_ids, best_probability
