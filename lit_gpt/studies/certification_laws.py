"""What samplers write, by enumeration of all rows that their steps may lead to.

A selection rule is written here once more, in plain Python and for one row, so that it can be held against the sampler: for
every word that could be sampled at every masked position it says which positions keep theirs, and with what probability.

V words, L positions.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.studies.certification_toys import TableModel

# Where the published time grid ends (SMDM's sampling code).
_LAST_TIME = 1e-5


@dataclass(frozen=True)
class SelectionStep:
    """One row in one step, with the words sampled at its masked positions."""

    confidences: Sequence[float]
    """The probability of the sampled word at each masked position, from left to right."""
    log_p: Tensor
    """(n, V) float64: the distributions there."""
    t: float
    """The time at which the step begins."""
    s: float
    """The time to which it leads; 0 at the last step."""

    @property
    def entropies(self) -> list[float]:
        """Of the distributions, nats."""
        return (-(self.log_p.exp() * self.log_p).sum(1)).tolist()


SelectionRule = Callable[[SelectionStep], Iterator[tuple[Sequence[int], float]]]
"""A step to (numbers of the masked positions that are revealed, probability)."""


def by_chance(step: SelectionStep) -> Iterator[tuple[Sequence[int], float]]:
    """`origin`: each position with probability 1 - s / t."""
    numbers, reveal = range(len(step.confidences)), 1 - step.s / step.t
    for chosen in itertools.product((False, True), repeat=len(numbers)):
        probability = math.prod(reveal if keep else 1 - reveal for keep in chosen)
        if probability > 0:
            yield [number for number in numbers if chosen[number]], probability


def by_confidence(step: SelectionStep) -> Iterator[tuple[Sequence[int], float]]:
    """`greedy`: int(n (1 - s / t)) of n positions, those whose words are the most probable."""
    share = 1 - torch.tensor(step.s) / torch.tensor(step.t)
    yield _most_confident(step)[: int(torch.tensor(float(len(step.confidences))) * share)], 1.0


def above_threshold(step: SelectionStep, threshold: float) -> Iterator[tuple[Sequence[int], float]]:
    """`threshold`: all whose words are at least so probable, and the best one; everything at the last step."""
    best = _most_confident(step)
    yield [n for n in best if step.s == 0 or n == best[0] or step.confidences[n] >= threshold], 1.0


def below_entropy(step: SelectionStep, bound: float) -> Iterator[tuple[Sequence[int], float]]:
    """`entropy`: in rising order of entropy, as long as those before a position sum to at most the bound."""
    order = sorted(range(len(step.entropies)), key=step.entropies.__getitem__)
    before = [sum(step.entropies[other] for other in order[:place]) for place in range(len(order))]
    yield [n for place, n in enumerate(order) if step.s == 0 or not place or before[place] <= bound], 1.0


def one_at_random(step: SelectionStep) -> Iterator[tuple[Sequence[int], float]]:
    """One position, each as likely as the others: the bound's own order."""
    count = len(step.confidences)
    yield from (([number], 1 / count) for number in range(count))


def _most_confident(step: SelectionStep) -> list[int]:
    return sorted(range(len(step.confidences)), key=lambda number: -step.confidences[number])


def selection_rules(threshold: float, entropy_bound: float) -> dict[str, SelectionRule]:
    """The rules by the names of the samplers; `random_order` is the bound's own."""
    return {
        "origin": by_chance,
        "greedy": by_confidence,
        "threshold": functools.partial(above_threshold, threshold=threshold),
        "entropy": functools.partial(below_entropy, bound=entropy_bound),
        "random_order": one_at_random,
    }


def times(steps: int) -> list[float]:
    """The published grid of times; the last step leads to 0."""
    return [*torch.linspace(1, _LAST_TIME, steps + 1)[:-1].tolist(), 0.0]


def sampler_law(
    model: TableModel, row: Sequence[int], rule: SelectionRule, steps: int, temperature: float = 1.0
) -> Tensor:
    """The law of the rows that a rule writes in some steps.

    Args:
        model: whose words are sampled, all positions of a step independently.
        row: l words and [MASK]s.
        rule: which positions a step reveals.
        steps: over the published times.
        temperature: 1, or 0 for the likeliest word.

    Returns:
        (V,) * l float64, sums to 1.
    """
    grid, rows = times(steps), {tuple(row): 1.0}
    for t, s in itertools.pairwise(grid):
        following: dict[tuple[int, ...], float] = {}
        for before, mass in rows.items():
            for after, probability in _successors(model, before, rule, (t, s, temperature)):
                following[after] = following.get(after, 0.0) + mass * probability
        rows = following
    law = torch.zeros((model.mask_id,) * len(row), dtype=torch.float64)
    for words, mass in rows.items():
        law[words] = mass
    assert abs(float(law.sum()) - 1) < 1e-6
    return law


def _successors(
    model: TableModel, row: tuple[int, ...], rule: SelectionRule, moment: tuple[float, float, float]
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every row that a step may lead to, with its probability; some come several times."""
    t, s, temperature = moment
    masked = [place for place, word in enumerate(row) if word == model.mask_id]
    if not masked:
        yield row, 1.0
        return
    log_p = model(torch.tensor([row]))[0, masked].log_softmax(1)[:, :-1]
    table = log_p.exp()
    chances = table if temperature else torch.nn.functional.one_hot(table.argmax(1), model.mask_id).double()
    choices = [[(w, c, p) for w, (c, p) in enumerate(zip(*both, strict=True)) if c > 0]
               for both in zip(chances.tolist(), table.tolist(), strict=True)]  # fmt: skip
    for words in itertools.product(*choices):
        sampled = math.prod(chance for _, chance, _ in words)
        for revealed, probability in rule(SelectionStep([p for *_, p in words], log_p, t, s)):
            after = list(row)
            for number in revealed:
                after[masked[number]] = words[number][0]
            yield tuple(after), sampled * probability


def left_to_right_law(model: TableModel, row: Sequence[int]) -> Tensor:
    """The law of writing a row's [MASK]s from left to right, one at a time; as `sampler_law`."""

    def first(step: SelectionStep) -> Iterator[tuple[Sequence[int], float]]:
        yield [0], 1.0

    return sampler_law(model, row, first, max(1, len(row)))
