"""Distributions over a few words that are small enough to enumerate, and masked models of them given as tables.

A table holds the word probabilities of every masked position for every partly masked row. The exact model's are those of
the distribution, so that any order of unmasking has the distribution's law and the bound is the negative log-likelihood;
the inexact model's are disturbed, so that orders differ and the bound is above it. A row shorter than the distribution is
read as if [MASK] followed, which for the exact model is the marginal distribution of its tokens.

V words, L positions, S = (V + 1)^L partly masked rows, R rows, T tokens. A set of positions is a number with bit i for
position i.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.model.logits import LogitsBatch

IMPOSSIBLE = -1e9
"""The logit of a word with probability 0, and of [MASK]: e to it is 0, and sums of it stay numbers."""
# How far the inexact model is from the exact one: enough that its orders differ by tenths of a nat.
_DISTURBANCE, _SMOOTHING = 0.7, 0.1
# Digits of a table's probabilities: positions whose probabilities are equal in theory are equal in the table, too, so
# that the sampler and the enumeration decide ties alike.
_DIGITS = 12


@dataclass(frozen=True)
class ToyDistribution:
    """A joint distribution of L words."""

    name: str
    """In a table."""
    joint: Tensor
    """(V,) * L float64, sums to 1."""

    @property
    def words(self) -> int:
        """V; [MASK] has this id."""
        return self.joint.size(0)

    @property
    def length(self) -> int:
        """L."""
        return self.joint.dim()

    @functools.cached_property
    def texts(self) -> Tensor:
        """(N, L) int64: all texts that are possible."""
        return self.joint.nonzero()

    @functools.cached_property
    def nll(self) -> Tensor:
        """(N,) float64: -log p of `texts`, nats."""
        return -self.joint[tuple(self.texts.T)].log()

    @property
    def natural_model(self) -> TableModel:
        """The exact model where some texts are impossible, which no sampler may write; else the inexact one."""
        return self.exact_model if len(self.texts) < self.joint.numel() else self.inexact_model

    @property
    def entropy(self) -> float:
        """Nats of a text."""
        return float((self.nll * (-self.nll).exp()).sum())

    def sample(self, count: int, seed: int) -> Tensor:
        """(count, L) int64 texts."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.multinomial((-self.nll).exp(), count, replacement=True, generator=generator)
        return self.texts[chosen]

    @functools.cached_property
    def exact_model(self) -> TableModel:
        """The distribution's own conditional probabilities; uniform where the words that are known are impossible."""
        return TableModel(self.words, self.length, self._conditionals().clamp(min=0))

    @functools.cached_property
    def inexact_model(self) -> TableModel:
        """Smoothed and disturbed at random, as a trained model is."""
        smooth = (1 - _SMOOTHING) * self._conditionals() + _SMOOTHING / self.words
        noise = torch.randn(smooth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        return TableModel(self.words, self.length, (smooth.log() + _DISTURBANCE * noise).softmax(2))

    def _conditionals(self) -> Tensor:
        """(S, L, V) float64: each position's distribution given the words that are known."""
        rows = []
        for known in itertools.product(range(self.words + 1), repeat=self.length):
            part = self.joint
            for position, word in enumerate(known):
                if word < self.words:
                    keep = torch.zeros(self.words, dtype=torch.bool)
                    keep[word] = True
                    shape = [-1 if axis == position else 1 for axis in range(self.length)]
                    part = part * keep.view(shape)
            axes = range(self.length)
            sums = torch.stack([part.sum([axis for axis in axes if axis != position]) for position in axes])
            rows.append(sums / sums[0].sum() if sums[0].sum() > 0 else torch.full_like(sums, 1 / self.words))
        return torch.stack(rows).round(decimals=_DIGITS)


class TableModel:
    """A masked model as a table, called like a network.

    At positions that are known it says nothing: all words are equally likely there, so that who scores them is seen.

    Attributes:
        mask_id: V, the id of [MASK]; it has a column in the logits, and probability 0.
        length: L, the most tokens of a row.
        probabilities: (S, L, V) float64.
    """

    def __init__(self, words: int, length: int, probabilities: Tensor) -> None:
        self.mask_id, self.length, self.probabilities = words, length, probabilities
        # The first position is the most significant digit, as in `itertools.product`.
        self._place = (words + 1) ** torch.arange(length - 1, -1, -1)
        known = torch.arange(len(probabilities))[:, None] // self._place % (words + 1) < words
        told = torch.where(known[..., None], 1 / words, probabilities)
        logits = torch.where(told > 0, told.log(), IMPOSSIBLE)
        self._logits = torch.nn.functional.pad(logits, (0, 1), value=IMPOSSIBLE)

    def __call__(self, input_ids: Tensor, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits (R, T, V + 1) float64 of every column of a batch.

        Args:
            input_ids: (R, T) int64.
            key_mask: (R, T) bool, False at padding; None where nothing is padded.
            positions: (R, T) int64, each token's position in its row; None for 0, 1, ...
        """
        state, positions = self._read(input_ids, key_mask, positions)
        return self._logits[state[:, None], positions.clamp(max=self.length - 1)]

    def batch_logits(self, batch: LogitsBatch) -> Iterator[Tensor]:
        """The same as a `LogitsFn`."""
        yield self(batch.input_ids, batch.key_mask, batch.positions).flatten(0, 1)[batch.indices]

    def tempting_logits(self, batch: LogitsBatch) -> Iterator[Tensor]:
        """`batch_logits` with the largest logit at [MASK], for samplers that must leave that column out."""
        for logits in self.batch_logits(batch):
            logits[:, -1] = 50.0
            yield logits

    def next_logits(self, input_ids: Tensor, positions: Tensor, key_mask: Tensor | None) -> Tensor:
        """As an ARM behind one start token: logits (R, 1, V + 1) of the word after the last column."""
        keys = (torch.ones_like(input_ids, dtype=torch.bool) if key_mask is None else key_mask) & (positions > 0)
        state, _ = self._read(input_ids, keys, (positions - 1).clamp(min=0))
        # A row that is finished waits for the others.
        return self._logits[state, positions[:, -1].clamp(max=self.length - 1)][:, None]

    def _read(self, input_ids: Tensor, key_mask: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """The number (R,) of each partly masked row, and the positions."""
        if positions is None:
            positions = torch.arange(input_ids.size(1)).expand_as(input_ids)
        keys = torch.ones_like(input_ids, dtype=torch.bool) if key_mask is None else key_mask
        # What is not in the row is masked: its digit is V, and a word takes away what is missing to it.
        less = torch.where(keys, self.mask_id - input_ids, 0) * self._place[positions.clamp(max=self.length - 1)]
        state = self.mask_id * int(self._place.sum()) - less.sum(1)
        if bool((state < 0).any()):
            raise ValueError("several tokens at one position: padding is read, or positions are wrong")
        return state, positions

    def cross_entropies(self, text: Tensor) -> Tensor:
        """(2^l, l) float64: -log p of each word of a text (l,) under each set of masked positions; 0 where not masked."""
        masked = position_sets(len(text))
        logits = self(torch.where(masked, self.mask_id, text))
        nll = -logits.log_softmax(2).gather(2, text.expand(masked.shape)[..., None]).squeeze(2)
        return torch.where(masked, nll, 0.0)


def position_sets(length: int) -> Tensor:
    """(2^L, L) bool: all sets of positions, in the order of their numbers."""
    return torch.arange(2**length)[:, None] >> torch.arange(length) & 1 == 1


def bound_coefficients(length: int, given: int = 0) -> Tensor:
    """The bound of a row as coefficients of its cross-entropies, (2^L, L) float64, by sets of masked positions.

    For a set M of k of the n positions that are not given it is 1 / (k C(n, k)) at each of them: the mean over all orders
    of unmasking (docs/likelihood.md).

    Args:
        length: L.
        given: leading positions that are never masked.
    """
    masked, free = position_sets(length), length - given
    weights = torch.tensor([0.0] + [1 / (k * math.comb(free, k)) for k in range(1, free + 1)], dtype=torch.float64)
    possible = ~masked[:, :given].any(1)
    return masked * torch.where(possible, weights[masked.sum(1).clamp(max=free)], 0.0)[:, None]


def toy_bound(model: TableModel, text: Tensor, given: int = 0) -> float:
    """The bound of a text (l,), nats, by the sum over all masks."""
    return float((bound_coefficients(len(text), given) * model.cross_entropies(text)).sum())


def left_to_right_nll(model: TableModel, text: Tensor, given: int = 0) -> float:
    """The negative log-likelihood of writing a text from left to right, nats."""
    table = model.cross_entropies(text)
    last = 2 ** len(text)
    return sum(float(table[last - 2**position, position]) for position in range(given, len(text)))


def toy_distributions() -> list[ToyDistribution]:
    """The family: dependent words, a deterministic rule, a long-range copy."""
    return [dependent_words(3, 4), sum_rule(3, 4), long_range_copy(2, 5)]


def dependent_words(words: int, length: int) -> ToyDistribution:
    """Every word depends on every other: random weights of all texts."""
    shape = torch.full((words,) * length, 0.6, dtype=torch.float64)
    return ToyDistribution("dependent words", _normalised(torch._standard_gamma(shape, _generator(3)) + 0.02))


def sum_rule(words: int, length: int) -> ToyDistribution:
    """The last word is the sum of the others modulo V: it is certain once they are known, and nearly free before."""
    others = torch.rand((words,) * (length - 1), dtype=torch.float64, generator=_generator(4)) + 0.2
    joint = torch.zeros((words,) * length, dtype=torch.float64)
    for text in itertools.product(range(words), repeat=length - 1):
        joint[(*text, sum(text) % words)] = others[text]
    return ToyDistribution("sum rule", _normalised(joint))


def long_range_copy(words: int, length: int) -> ToyDistribution:
    """The last word is always the first one, and between them stand a Markov chain's."""
    generator = _generator(5)
    start = torch.rand(words, dtype=torch.float64, generator=generator) + 0.2
    chain = torch.rand(length - 2, words, words, dtype=torch.float64, generator=generator) + 0.1
    joint = torch.zeros((words,) * length, dtype=torch.float64)
    for text in itertools.product(range(words), repeat=length - 1):
        weight = float(start[text[0]])
        for place, (before, word) in enumerate(itertools.pairwise(text)):
            weight *= float(chain[place, before, word] / chain[place, before].sum())
        joint[(*text, text[0])] = weight
    return ToyDistribution("long-range copy", _normalised(joint))


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
