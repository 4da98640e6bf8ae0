"""Checks of training objectives: what they learn, whatever the model.

A loss is a sum of weights times cross-entropies, each of one position given the tokens that the model may see. Averaged over
the noise, the weight c(M, i) of position i with the set M masked is the loss's gradient with respect to that
cross-entropy, so a loss has the bound's gradient under every model if and only if its coefficients are the bound's. More
generally a loss is a bound if its coefficients are a flow: what leads into a set, sum over j of c(M + j, j), is what leads
out of it, sum over i in M of c(M, i), and 1 leads out of the set of everything. Then it is the mean over some random order of
unmasking of -log p of the text in that order, which is above -log of the mean.

B rows, T columns, L positions of a text; a set of positions is a number with bit i for position i.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_gpt.data.batching import MicroBatch
from lit_gpt.data.packed_dataset import Extent
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.model.visibility import Visibility
from lit_gpt.studies.certification_findings import Finding, guarded, mean_p_value, smallest_of
from lit_gpt.studies.certification_toys import (
    TableModel,
    ToyDistribution,
    bound_coefficients,
    position_sets,
    toy_bound,
)
from lit_gpt.training.objectives import OBJECTIVES, Objective, ValidatedObjective

# Weights of 1/p up to 1000 make means skew, so rows are many and t-tests are of means over batches of them. Half a million
# rows tell the weight at one masked token to 2 % and at all of them to 0.3 %; the smallest rate 0.001 moves them by 0.4 %
# and 0.1 %, which is not seen.
_BATCHES, _ROWS = 128, 4096
_VALIDATION_BLOCKS, _VALIDATION_ROWS = 64, 512
_ROUNDING = 1e-6
# Settings that are objectives of their own.
_SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {"masked_diffusion": ({"loss_weight": "cross_entropy"},)}
# A prompt of this many tokens stands before what fine-tuning learns.
_PROMPT = 1


@dataclass(frozen=True)
class ScoredTerms:
    """The scored columns of a batch, (N,) each."""

    row: Tensor
    masked: Tensor
    """int64: the set of positions whose tokens the model does not see."""
    position: Tensor
    """int64: what is predicted."""
    weight: Tensor
    """float64."""
    problems: tuple[str, ...]
    """What must never be."""


def read_terms(terms: LossTerms, texts: Tensor, lengths: Tensor, mask_id: int) -> ScoredTerms:
    """What each scored column of a batch is predicted from.

    Args:
        terms: from an objective, for a model whose columns all see each other, or, where nothing is masked, for a causal
            one, which predicts the next token.
        texts: (B, L) the batch's rows.
        lengths: (B,) real tokens of each.
        mask_id: id of [MASK].
    """
    (rows, columns), length = terms.input_ids.shape, texts.size(1)
    shift = int(predicts_next(terms, mask_id))
    visibility = terms.visibility or Visibility(causal=bool(shift))
    causal, mask = visibility.attention_arguments(columns, columns)
    seen = torch.ones(1, columns, columns, dtype=torch.bool) if mask is None else mask[:, 0]
    seen = (seen.tril() if causal else seen).expand(rows, columns, columns)
    positions = torch.arange(columns).expand(rows, -1) if terms.positions is None else terms.positions
    told = terms.input_ids != mask_id
    known = torch.stack(
        [(seen & (told & (positions == place))[:, None]).any(2) for place in range(length)], 2
    )  # (B, T, L)
    # What stands in a column that someone sees.
    stands = texts.gather(1, positions.clamp(max=length - 1))
    scored = terms.weights != 0
    wrong = told & ((positions >= lengths[:, None]) | (stands != terms.input_ids))
    reads_wrong = (seen & wrong[:, None]).any(2) & scored
    row, column = scored.nonzero().T
    position = (positions + shift)[row, column]
    outside = position >= lengths[row]
    inside = position.clamp(max=length - 1)
    problems = {
        "reads a token that is not the text's, or padding": bool(reads_wrong.any()),
        "scores a position behind the text": bool(outside.any()),
        "predicts a token that it reads": bool(known[row, column, inside].any()),
        "predicts another position's token": bool((terms.targets[row, column] != texts[row, inside])[~outside].any()),
    }
    masked = (~known[row, column] * 2 ** torch.arange(length)).sum(1)
    found = tuple(name for name, is_so in problems.items() if is_so)
    return ScoredTerms(row, masked, inside, terms.weights[row, column].double(), found)


def predicts_next(terms: LossTerms, mask_id: int) -> bool:
    """Whether an objective masks nothing: its model is causal, and a column predicts the token after it."""
    return not bool((terms.input_ids == mask_id).any())


def micro_batch(texts: Tensor, lengths: Tensor, step: int, next_token: bool, given: int = 0) -> MicroBatch:
    """Texts (B, L) as a training batch whose loss is a sum over rows."""
    rows = len(texts)
    # The token after the input, which an MDM does not read.
    tokens = texts if next_token else torch.nn.functional.pad(texts, (0, 1))
    return MicroBatch(
        tokens, lengths, torch.full((rows,), given), torch.arange(rows), torch.ones(rows, dtype=torch.float64), step
    )


def make_objective(kind: type[Objective], toy: ToyDistribution, **settings: Any) -> Objective:
    """An objective for the rows of a toy distribution: its fields by their names, other fields as they are by default."""
    values = {"block_size": toy.length, "row_length": toy.length, "mask_id": toy.words, "seed": 11, **settings}
    values |= {"global_batch_size": _ROWS}
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in names})


# --- the checks -------------------------------------------------------------------------------------------------------


def check_objectives(toys: list[ToyDistribution]) -> Iterator[Finding]:
    """All that are registered, on each toy; the gradient, which does not see the words, on the first one."""
    for name, kind in OBJECTIVES.items():
        for settings in ({}, *_SETTINGS.get(name, ())):
            words = ", ".join((name, *(f"{value}" for value in settings.values())))
            for number, toy in enumerate(toys):
                yield from check_objective(words, make_objective(kind, toy, **settings), toy, gradient=not number)


def check_objective(
    name: str, objective: Objective, toy: ToyDistribution, gradient: bool = True, batches: int = _BATCHES
) -> Iterator[Finding]:
    """One objective, its gradient from so many batches of noise."""
    probe = objective.training(micro_batch(toy.sample(_ROWS, 0), torch.full((_ROWS,), toy.length), 0, True, _PROMPT))
    subject = _Subject(name, objective, toy, predicts_next(probe, toy.words), batches)
    checks = [subject.gradient] if gradient else []
    checks += [subject.count, subject.batch]
    if isinstance(objective, ValidatedObjective):
        checks.append(subject.validation)
    yield from guarded("objective", name, checks)


@dataclass(frozen=True)
class _Subject:
    """An objective on a toy distribution."""

    name: str
    objective: Objective
    toy: ToyDistribution
    next_token: bool
    batches: int

    @property
    def given(self) -> int:
        """Tokens that are never predicted: a prompt where the objective knows prompts, an ARM's first one."""
        return 0 if isinstance(self.objective, ValidatedObjective) and not self.next_token else _PROMPT

    def finding(self, check: str, evidence: str, **result: Any) -> Finding:
        return Finding("objective", self.name, check, self.toy.name, evidence, **result)

    def gradient(self) -> Iterator[Finding]:
        """The coefficients of the training loss, of many rows of noise."""
        length, problems = self.toy.length, set[str]()
        tables = torch.zeros(self.batches, 2**length * length, dtype=torch.float64)
        lengths = torch.full((_ROWS,), length)
        for step in range(self.batches):
            texts = self.toy.sample(_ROWS, step)
            batch = micro_batch(texts, lengths, step, self.next_token, self.given)
            found = read_terms(self.objective.training(batch), texts, lengths, self.toy.words)
            tables[step].index_add_(0, found.masked * length + found.position, found.weight / _ROWS)
            problems |= set(found.problems)
        yield self.finding(
            "reads and predicts the text alone", "; ".join(sorted(problems)) or "yes", holds=not problems
        )
        is_bound = bool(getattr(self.objective, "training_is_bound", True))
        claims = is_bound, is_bound and not self.next_token
        yield from coefficient_findings(self.finding, tables.view(self.batches, -1, length), self.given, claims)

    def count(self) -> Iterator[Finding]:
        """The loss per token divides by the tokens that may be scored, in whole and in shorter rows."""
        length = self.toy.length
        lengths = torch.tensor([length, length, length - 1, length])
        texts = self.toy.sample(4, 1)
        batch = micro_batch(texts, lengths, 0, self.next_token, self.given)
        counted = int(self.objective.training(batch).in_denominator.sum())
        extents = [Extent(int(own), self.given) for own in lengths]
        denominator = self.objective.group(0, 0, extents).denominator
        # Fine-tuning of an MDM pads with end tokens, which it scores.
        pads = not self.next_token and not isinstance(self.objective, ValidatedObjective)
        expected = (4 * length if pads else int(lengths.sum())) - 4 * self.given
        evidence = f"divides by {denominator:g}, counts {counted}, {expected} tokens are predicted"
        yield self.finding("loss per token", evidence, holds=denominator == counted == expected)

    def batch(self) -> Iterator[Finding]:
        """A row's terms are the same in a part of the batch."""
        whole = micro_batch(self.toy.sample(8, 2), torch.full((8,), self.toy.length), 3, self.next_token, self.given)
        part = dataclasses.replace(whole, **{
            name: getattr(whole, name)[2:5] for name in ("tokens", "lengths", "prompt_lengths", "rows", "row_weights")
        })  # fmt: skip
        one, other = self.objective.training(whole), self.objective.training(part)
        same = all(torch.equal(a[2:5], b) for a, b in zip(one[:4], other[:4], strict=True))
        yield self.finding("batch changes nothing", "rows 2 to 4 alone and of 8: " + _same(same), holds=same)

    def validation(self) -> Iterator[Finding]:
        """The validation loss of an inexact model is its enumerated bound, rows of two lengths."""
        assert isinstance(self.objective, ValidatedObjective)
        toy, model, draws = self.toy, self.toy.inexact_model, self.objective.fixed_draws or 2
        differences, counts, bounds, problems = [], [], 0.0, set[str]()
        reference = _References(model, toy, self.next_token)
        for block in range(_VALIDATION_BLOCKS):
            texts = toy.sample(_VALIDATION_ROWS, block)
            lengths = toy.length - torch.arange(_VALIDATION_ROWS) % 2
            rows = torch.arange(_VALIDATION_ROWS) + block * _VALIDATION_ROWS
            batch = dataclasses.replace(micro_batch(texts, lengths, 0, self.next_token), rows=rows)
            nats = 0.0
            for draw in range(draws):
                terms = self.objective.validation(batch, draw, draws)
                found = read_terms(terms, texts, lengths, toy.words)
                problems |= set(found.problems)
                nats += float((found.weight * reference.cross_entropies(texts, found)).sum()) / draws
            expected = float(reference.losses(texts, lengths).sum())
            differences.append((nats - expected) / _VALIDATION_ROWS)
            bounds += expected / _VALIDATION_ROWS / _VALIDATION_BLOCKS
            counts.append(int(terms.in_denominator.sum()) - int((lengths - int(self.next_token)).sum()))
        values = torch.tensor(differences, dtype=torch.float64)
        p_value = mean_p_value(values, 0.0, _ROUNDING)
        error = float(values.std()) / _VALIDATION_BLOCKS**0.5
        evidence = f"{bounds + float(values.mean()):.4f} nats a text, enumerated {bounds:.4f}, error {error:.4f}"
        yield self.finding("validation loss is the bound" if self.objective.is_bound else "validation loss is exact",
                           evidence, p_value=p_value)  # fmt: skip
        evidence = "; ".join(sorted(problems)) or "yes"
        yield self.finding("validation reads and predicts the text alone", evidence, holds=not problems)
        evidence = "tokens counted: " + _same(not any(counts))
        yield self.finding("validation divides by the tokens", evidence, holds=not any(counts))


class _References:
    """Enumerated cross-entropies and losses of all texts of a toy distribution, and of their first L - 1 words."""

    def __init__(self, model: TableModel, toy: ToyDistribution, next_token: bool) -> None:
        self._place = toy.words ** torch.arange(toy.length - 1, -1, -1)
        count = toy.words**toy.length
        every = torch.arange(count)[:, None] // self._place % toy.words
        self._tables = torch.stack([model.cross_entropies(text) for text in every])
        short = every[:, :-1]
        if next_token:
            sets = (2**toy.length - 2 ** torch.arange(1, toy.length))[None]
            terms = self._tables[torch.arange(count)[:, None], sets, torch.arange(1, toy.length)]
            self._losses = torch.stack((terms[:, :-1].sum(1), terms.sum(1)))
        else:
            whole = (self._tables * bound_coefficients(toy.length)).sum((1, 2))
            self._losses = torch.stack((torch.tensor([toy_bound(model, t) for t in short], dtype=torch.float64), whole))

    def cross_entropies(self, texts: Tensor, terms: ScoredTerms) -> Tensor:
        """Of scored terms, (N,)."""
        number = (texts * self._place).sum(1)[terms.row]
        return self._tables[number, terms.masked, terms.position]

    def losses(self, texts: Tensor, lengths: Tensor) -> Tensor:
        """Of texts of L or L - 1 words, (B,) nats."""
        return self._losses[(lengths == texts.size(1)).long(), (texts * self._place).sum(1)]


def coefficient_findings(
    finding: Callable[..., Finding], tables: Tensor, given: int, claims: tuple[bool, bool]
) -> Iterator[Finding]:
    """Whether coefficients are those of a bound, and of the bound.

    Args:
        finding: makes one, from what must hold, the evidence and the result.
        tables: (n, 2^L, L) float64, from independent noise; nats of a text.
        given: leading positions that are never masked.
        claims: whether the loss says that it is a bound, and that its order of unmasking is random.
    """
    mean, length = tables.mean(0), tables.size(2)
    masked, everything = position_sets(length), 2**length - 2**given
    differences = [tables[:, everything].sum(1) - 1]
    for number in range(1, 2**length):
        if number & ~everything == 0 and number != everything:
            sources = [place for place in range(given, length) if not masked[number, place]]
            inflow = sum(tables[:, number | 1 << place, place] for place in sources)
            differences.append(inflow - tables[:, number].sum(1))
    p_value = smallest_of([mean_p_value(values, 0.0, _ROUNDING) for values in differences])
    by_size = _by_size(mean, masked)
    evidence = "weight of all terms with 1, 2, ... masked: " + " ".join(f"{value:.3f}" for value in by_size)
    yield finding("gradient is that of a bound", evidence, p_value=p_value, claimed=claims[0])
    expected = bound_coefficients(length, given)
    compared = [mean_p_value(tables[:, number, place], float(expected[number, place]), _ROUNDING)
                for number in range(2**length) for place in range(length)]  # fmt: skip
    largest = float((mean - expected).abs().max())
    uniform = smallest_of(compared)
    evidence = f"largest difference of a term's weight {largest:.4f}; it is 1/(k C(n, k)) for k of n masked"
    yield finding("gradient is that of the random-order bound", evidence, p_value=uniform, claimed=claims[1])


def _by_size(mean: Tensor, masked: Tensor) -> list[float]:
    """The sum of coefficients over all sets of each size."""
    sizes = masked.sum(1)
    return [float(mean[sizes == size].sum()) for size in range(1, masked.size(1) + 1)]


def _same(is_so: bool) -> str:
    return "the same" if is_so else "different"
