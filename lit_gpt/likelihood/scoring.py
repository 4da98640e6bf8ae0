"""Cross-entropies of chosen tokens in many rows at once: the forward passes behind every likelihood.

Rows of different requests share a batch, sorted by length and padded on the right, where a mask hides the padding: a row's
result does not depend on the other rows. Logits are computed at the scored positions only. Equal rows are evaluated once,
for all requests that have them: the answers of a multiple-choice question often differ only in the tokens that are scored.

R rows of a request, B rows of a batch, T tokens, N scored positions, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_gpt.devices import check_halvable
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
    network: Transformer | None = None
    """What `logits_fn` runs; with an ARM's, a context that several targets share is read once."""
    may_be_uniform: bool = False
    """Logits that are all equal are meant; a network has them where its states overflow."""

    @classmethod
    def of(cls, model: Transformer, max_tokens: int) -> ScoringModel:
        """A network on its own device."""
        config, device = model.config, next(model.parameters()).device
        flops = _FLOPS_PER_RESULT.get(device.type)
        tokens = None if flops is None else int(flops / (2 * sum(value.numel() for value in model.parameters())))
        return cls(model_logits(model), config.mask_id, config.vocab_size, max_tokens, device, tokens, model)


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
    """float32: -log p(target), nats; NaN or infinite where a logit of the position is; NaN where all are wrongly equal."""
    best_ids: Tensor
    """int64: the likeliest token; 0 where nobody asked."""
    best_probability: Tensor
    """float32: its probability; likewise."""


@torch.no_grad()
def score_tokens(model: ScoringModel, inputs: Sequence[ScoringInput], best: bool = True) -> list[TokenScores]:
    """Score every row of every request.

    A device gets a batch before the results of the one before it are fetched, so that it computes while the host works.

    Args:
        model: its `max_tokens` is halved for the rest of the call when memory runs out.
        inputs: in any order.
        best: also find the likeliest tokens, which costs another pass over the logits.

    Returns:
        The scores of each input, on the CPU.

    Raises:
        ValueError: a single row does not fit into memory.
    """
    store = _ScoreStore(inputs)
    rows = _distinct_rows(inputs)
    start, max_tokens = 0, model.max_tokens
    running: tuple[Tensor, tuple[Tensor, ...]] | None = None
    while start < len(rows):
        length = inputs[rows[start][0][0]].input_ids.size(1)
        batch_rows = rows[start : start + max(1, max_tokens // length)]
        try:
            batch, targets, places = _padded_batch(inputs, batch_rows, store, model.device)
            found = token_scores(model.logits_fn(batch), targets, model.vocab_size, best, model.may_be_uniform)
        except RuntimeError as error:
            check_halvable(error, len(batch_rows), length, model.device)
            max_tokens = len(batch_rows) * length // 2
            continue
        start += len(batch_rows)
        if running:
            store.put(*running)
        running = places, found
    if running:
        store.put(*running)
    return store.scores


class _ScoreStore:
    """The results of all requests in one piece of memory, and the scored positions of their rows.

    Attributes:
        scores: each request's part, to be filled.
    """

    def __init__(self, inputs: Sequence[ScoringInput]) -> None:
        shapes = [own.input_ids.shape for own in inputs]
        ends = list(itertools.accumulate((shape.numel() for shape in shapes), initial=0))
        self._values = torch.zeros(ends[-1]), torch.zeros(ends[-1], dtype=torch.int64), torch.zeros(ends[-1])
        self.scores = [
            TokenScores(*(values[start : start + shape.numel()].view(shape) for values in self._values))
            for start, shape in zip(ends, shapes, strict=False)
        ]
        self._starts = ends[:-1]
        # As numpy arrays: torch needs several microseconds for what is done once a row here.
        self._columns = []
        for own in inputs:
            row, column = own.scored.numpy().nonzero()
            self._columns.append(np.split(column, np.searchsorted(row, np.arange(1, len(own.scored)))))

    def positions(self, request: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The scored columns of a row, and where their results belong."""
        columns = self._columns[request][row]
        return columns, columns + (self._starts[request] + row * self.scores[request].nll.size(1))

    def put(self, places: Tensor, found: tuple[Tensor, ...]) -> None:
        """Fetch a batch's values (N,) from the device and write them at their places (N,)."""
        for values, whole in zip(found, self._values, strict=False):
            whole[places] = values.cpu()


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
    inputs: Sequence[ScoringInput], batch_rows: list[_EqualRows], store: _ScoreStore, device: torch.device | str
) -> tuple[LogitsBatch, Tensor, Tensor]:
    """The padded batch of some distinct rows, and the targets (N,) of its scored positions with their results' places."""
    lengths = torch.tensor([inputs[equal[0][0]].input_ids.size(1) for equal in batch_rows])
    prompts = torch.tensor([inputs[equal[0][0]].prompt_length for equal in batch_rows])
    width = int(lengths.max())
    input_ids = np.zeros((len(batch_rows), width), dtype=np.int64)
    indices, targets, places, most = [], [], [], 0
    for batch_row, equal in enumerate(batch_rows):
        request, row = equal[0]
        ids = inputs[request].input_ids.numpy()[row]
        input_ids[batch_row, : len(ids)] = ids
        wanted = []
        for request, row in equal:
            columns, where = store.positions(request, row)
            wanted.append(columns)
            targets.append(inputs[request].targets.numpy()[columns])
            places.append(where)
        indices += [columns + batch_row * width for columns in wanted]
        most = max(most, len(wanted[0]) if len(wanted) == 1 else len(set(np.concatenate(wanted).tolist())))
    column = torch.arange(width)
    key_mask, prompt_mask = column < lengths[:, None], column < prompts[:, None]

    def there(value: Tensor | np.ndarray) -> Tensor:
        return torch.as_tensor(value).to(device, non_blocking=True)

    batch = LogitsBatch(
        there(input_ids),
        None if bool((lengths == width).all()) else there(key_mask),
        there(prompt_mask),
        there(np.concatenate(indices)),
        max_per_row=most,
    )
    return batch, there(np.concatenate(targets)), torch.as_tensor(np.concatenate(places))


# Logits that differ by less than this are all the same: rounding of -log V, which is then every log-probability.
_EQUAL_LOGITS = 1e-5


def token_scores(
    logits: Iterator[Tensor], targets: Tensor, vocab_size: int, best: bool, may_be_uniform: bool = False
) -> tuple[Tensor, ...]:
    """Cross-entropy, and where wanted the likeliest token and its probability, at every scored position, (N,) each."""
    parts: list[tuple[Tensor, ...]] = []
    start = 0
    for chunk in logits:
        own = targets[start : (start := start + len(chunk))]
        log_p = chunk.log_softmax(1)
        lowest = log_p.amin(1)
        # A logit of -inf vanishes in the sum, and states that overflow vanish in the last norm: their logits are all equal.
        is_uniform = lowest >= -math.log(chunk.size(1)) - _EQUAL_LOGITS
        sound = lowest.isfinite() & (~is_uniform | may_be_uniform)
        nll = torch.where(sound, -log_p.gather(1, own[:, None]).squeeze(1), torch.nan)
        if best:
            highest, ids = log_p[:, :vocab_size].max(1)
            parts.append((nll, ids, highest.exp()))
        else:
            parts.append((nll,))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
