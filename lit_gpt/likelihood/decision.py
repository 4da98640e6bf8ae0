"""The likelihoods of a question's answers with as many forward passes as its decision needs.

The decision is which answer has the smallest bound, as it is or divided by the answer's length (`Question.rules`). Each answer
is estimated several times, by independent small estimates of `exact` (replicates): one pass with everything masked, which
all of them share, and `_PASSES` others each. The number of a replicate chooses its masks, for all answers of the question:
so the error of the *difference* of two answers is what its replicates show, whatever the two have in common.

At a look, every rule compares each answer that is left with the leader, the one with the smallest mean: Student's t of the
replicates' differences, one-sided. An answer whose tail probability is at most

    chance / (looks * rules * (answers - 1))

is out. An answer that is out under all rules gets no more passes; a question is decided when each rule has one answer left.
By the union bound over looks, rules and leaders, the best answer of any rule is lost with a probability of at most `chance`,
as far as a mean of `_PASSES` passes is normal: that is tested on cross-entropies of a trained model. What is undecided when
the budget is spent keeps the mean of all its replicates. An answer whose masks can all be read is exact, and has no error.

L tokens of a target.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.likelihood.exact import ExactBound
from lit_gpt.likelihood.loglikelihood import (
    Likelihood,
    LikelihoodRequest,
    LikelihoodSettings,
    all_masked_input,
    check_scores,
    greedy_matches,
    masked_input,
    round_tokens,
    target_slice,
)
from lit_gpt.likelihood.plan import MaskingPlan
from lit_gpt.likelihood.scoring import ScoringInput, ScoringModel, TokenScores, score_tokens
from lit_gpt.model.logits import guided
from lit_gpt.randomness import hash_int

# Raised whenever the results of this file change, by more than rounding: kept results of another version are computed again.
DECISION_VERSION = 1
# Passes of a replicate beside the shared one. On the quickstart's model, the variance of the difference of two answers times
# the passes was 71, 52 and 44 nats^2 for 2, 4 and 8; fewer passes mean more replicates, and so smaller quantiles of t.
_PASSES = 4
# Replicates at the first look and their growth from look to look: choices among some with equal savings.
_FIRST_LOOK, _GROWTH = 5, 1.5
# A look later than this share of all replicates could save little.
_LAST_LOOK = 0.8


@dataclass(frozen=True)
class Question:
    """Answers of which one is chosen."""

    answers: tuple[LikelihoodRequest, ...]
    """At least two."""
    rules: tuple[tuple[float, ...], ...]
    """For each decision, what each answer's negative log-likelihood is divided by: 1 for all, or lengths."""


@dataclass(frozen=True)
class QuestionResult:
    """The likelihoods of a question's answers."""

    likelihoods: tuple[Likelihood, ...]
    passes: tuple[int, ...]
    """Rows that the model read for each answer."""
    is_decided: bool
    """Whether every decision was safe before the budget was spent."""


def check_decision(settings: LikelihoodSettings, chance: float) -> None:
    """Refuse settings with which no question can be decided.

    Raises:
        ValueError: says which.
    """
    if not 0 < chance < 0.5:
        raise ValueError(f"decide is {chance}: it is the chance of another decision, more than 0 and less than 0.5")
    if not isinstance(settings.estimator, ExactBound):
        raise ValueError(f"decide={chance} needs nll_type=exact, not {settings.estimator.name}")
    if len(look_sizes(settings.estimator.budget)) < 2:
        raise ValueError(f"decide={chance} needs a budget of 29 or more, not {settings.estimator.budget}")


def look_sizes(budget: int) -> list[int]:
    """Replicates of an answer at each look; the last one spends the budget, and eliminates nothing that is not exact."""
    most = (budget - 1) // _PASSES
    sizes = [_FIRST_LOOK]
    while (larger := math.ceil(sizes[-1] * _GROWTH)) <= most * _LAST_LOOK:
        sizes.append(larger)
    return [size for size in sizes if size <= most * _LAST_LOOK] + [most]


def question_likelihoods(
    model: ScoringModel, questions: Sequence[Question], settings: LikelihoodSettings, chance: float
) -> Iterator[tuple[int, QuestionResult]]:
    """The likelihoods of the answers of some questions.

    Args:
        model: the model, without guidance.
        questions: in any order.
        settings: as for `mdm_likelihoods`, with the estimator `exact`.
        chance: that more passes would change one of a question's decisions, at most.

    Yields:
        (number of the question, its result), each once, as they are done. A question's result depends on nothing but
        itself, up to the rounding of the model's numbers.

    Raises:
        ValueError: as `check_decision`.
        NotFiniteError: as `mdm_likelihoods`.
    """
    check_decision(settings, chance)
    model = dataclasses.replace(model, logits_fn=guided(model.logits_fn, settings.cfg_scale, model.mask_id))
    lengths = [max(len(one.prefix) + len(one.target) for one in question.answers) for question in questions]
    waiting = sorted(range(len(questions)), key=lambda number: (lengths[number], -number))  # the last one is the next
    running: dict[int, _Race] = {}
    while waiting or running:
        # Others take the place of questions that are done, so that batches stay full.
        tokens = sum(answer.missing_tokens() for race in running.values() for answer in race.next)
        while waiting and tokens < round_tokens(model):
            number = waiting.pop()
            running[number] = _Race(questions[number], settings, chance)
            tokens += sum(answer.missing_tokens() for answer in running[number].next)
        _read(model, [answer for race in running.values() for answer in race.next], settings.pad_to)
        done = [number for number, race in running.items() if race.advance()]
        greedy = _greedy(model, [questions[number] for number in done], settings)
        for number, matches in zip(done, greedy, strict=True):
            yield number, running.pop(number).result(matches)


class _Answer:
    """An answer's replicates, and the rows that were read for it.

    Args:
        request: the answer.
        settings: the seed.
    """

    def __init__(self, request: LikelihoodRequest, settings: LikelihoodSettings) -> None:
        self.request = request
        self.is_exact = False
        self.values: list[float] = []
        """The estimate of each replicate, or the only one if it is exact."""
        self.rows: dict[bytes, Tensor] = {}
        """Cross-entropies (L,) float64 by mask, 0 where not masked."""
        self._keys = settings.seed, request.stream, hash_int(*request.prefix)
        self._plans: list[MaskingPlan] = []

    def plan(self, replicates: int, passes: int) -> None:
        """Plan so many replicates in all; or all masks, where they are no more than `passes`."""
        length = len(self.request.target)
        if length < 63 and 2**length - 1 <= passes:
            if not self.is_exact:
                self.is_exact, self.values = True, []
                self._plans = [ExactBound(max(2, passes)).plan(length)]
            return
        numbers = range(len(self.values), replicates)
        self._plans = [ExactBound(1 + _PASSES).plan(length, *self._keys, number) for number in numbers]

    def missing_masks(self) -> Tensor:
        """(R, L) bool: the masks of the plan that were not read yet, each once."""
        masks = {_bytes(mask): mask for plan in self._plans for mask in plan.masks}
        new = [mask for key, mask in masks.items() if key not in self.rows]
        return torch.stack(new) if new else torch.zeros(0, len(self.request.target), dtype=torch.bool)

    def add(self, masks: Tensor, nll: Tensor) -> None:
        """Take the cross-entropies (R, L) of the missing masks, and finish what was planned."""
        self.rows.update(zip(map(_bytes, masks), nll.double(), strict=True))
        for plan in self._plans:
            self.values.append(plan.reduce(torch.stack([self.rows[_bytes(mask)] for mask in plan.masks]))[0])
        self._plans = []

    def mean(self) -> float:
        """The estimate."""
        return statistics.fmean(self.values)

    def standard_error(self) -> float:
        """Of the estimate, nats."""
        return 0.0 if self.is_exact else statistics.stdev(self.values) / math.sqrt(len(self.values))

    def is_complete(self, replicates: int) -> bool:
        """Whether so many replicates were read, or all masks."""
        return self.is_exact or len(self.values) >= replicates

    def missing_tokens(self) -> int:
        """Tokens of the rows that are to be read."""
        return len(self.missing_masks()) * (len(self.request.prefix) + len(self.request.target))

    def tail(self, leader: _Answer, own_scale: float, leader_scale: float) -> float:
        """The chance of a mean difference to the leader as large as this, if the two bounds were equal."""
        if self.is_exact and leader.is_exact:
            return 0.0
        count = max(len(self.values), len(leader.values))
        own, other = (one.values * count if one.is_exact else one.values for one in (self, leader))
        differences = [a / own_scale - b / leader_scale for a, b in zip(own, other, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(count)
        # Estimates that all agree say nothing about how sure they are.
        return student_tail(statistics.fmean(differences) / error, count - 1) if error else 1.0


class _Race:
    """A question under way: which answers are left under each rule, and how far they have been read."""

    def __init__(self, question: Question, settings: LikelihoodSettings, chance: float) -> None:
        assert isinstance(settings.estimator, ExactBound)
        self._rules = question.rules
        self._answers = [_Answer(request, settings) for request in question.answers]
        self._left = [set(range(len(self._answers))) for _ in self._rules]
        self._budget = settings.estimator.budget
        self._sizes = look_sizes(self._budget)
        self._look = 0
        self._share = chance / ((len(self._sizes) - 1) * len(self._rules) * (len(self._answers) - 1))
        self._is_settled = False
        self.next: list[_Answer] = []
        """Whose masks are to be read."""
        self._plan(range(len(self._answers)))

    def advance(self) -> bool:
        """Judge what was read, and plan what comes next; whether nothing does."""
        last = self._look == len(self._sizes) - 1
        if not self._is_settled:
            for left, scales in zip(self._left, self._rules, strict=True):
                self._eliminate(left, scales, 0.0 if last else self._share)
            self._is_settled = last or all(len(left) == 1 for left in self._left)
            if not self._is_settled:
                self._look += 1
                self._plan(sorted(set.union(*self._left)))
                return False
        # Of an answer that is out, the mean may be the smallest once those of others have moved: then it is read like them.
        chosen = sorted({self._chosen(scales) for scales in self._rules})
        self._plan([n for n in chosen if not self._answers[n].is_complete(self._sizes[self._look])])
        return not self.next

    def result(self, greedy: Sequence[bool]) -> QuestionResult:
        """The likelihoods as they are; `greedy`: which answers greedy decoding gives."""
        likelihoods = [
            Likelihood(answer.mean(), answer.standard_error(), matches)
            for answer, matches in zip(self._answers, greedy, strict=True)
        ]
        is_decided = all(left == {self._chosen(scales)} for left, scales in zip(self._left, self._rules, strict=True))
        return QuestionResult(tuple(likelihoods), tuple(len(answer.rows) for answer in self._answers), is_decided)

    def _plan(self, numbers: Iterable[int]) -> None:
        """Plan the reading of some answers up to the present look."""
        size = self._sizes[self._look]
        passes = self._budget if self._look == len(self._sizes) - 1 else 1 + _PASSES * size
        self.next = [self._answers[number] for number in numbers]
        for answer in self.next:
            answer.plan(size, passes)

    def _eliminate(self, left: set[int], scales: Sequence[float], share: float) -> None:
        """Drop the answers that are safely behind the leader of a rule."""
        leader = min(left, key=lambda number: (self._answers[number].mean() / scales[number], number))
        for number in sorted(left - {leader}):
            if self._answers[number].tail(self._answers[leader], scales[number], scales[leader]) <= share:
                left.discard(number)

    def _chosen(self, scales: Sequence[float]) -> int:
        """The answer that a rule chooses as things stand."""
        return min(
            range(len(self._answers)), key=lambda number: (self._answers[number].mean() / scales[number], number)
        )


def student_tail(t: float, freedom: int) -> float:
    """P(T > t) for Student's t with a whole number of degrees of freedom.

    Source: the finite sums of Abramowitz & Stegun, Handbook of Mathematical Functions, 1964, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    cosine, term, total = math.cos(angle), 1.0, 0.0
    if freedom % 2:
        term = cosine
        for k in range(3, freedom + 1, 2):
            total += term
            term *= cosine**2 * (k - 1) / k
        within = 2 / math.pi * (angle + math.sin(angle) * total)
    else:
        for k in range(2, freedom + 1, 2):
            total += term
            term *= cosine**2 * (k - 1) / k
        within = math.sin(angle) * total
    return max(0.0, (1 - within) / 2)


# --- forward passes ---------------------------------------------------------------------------------------------------


def _bytes(mask: Tensor) -> bytes:
    """A mask as a key."""
    return mask.numpy().tobytes()


def _read(model: ScoringModel, answers: Sequence[_Answer], pad_to: int) -> None:
    """Read the missing masks of some answers, all in one call."""
    masks = [answer.missing_masks() for answer in answers]
    inputs = [
        masked_input(one.request, own, own, model.mask_id, pad_to) for one, own in zip(answers, masks, strict=True)
    ]
    found = score_tokens(model, inputs, best=False)
    check_scores([answer.request for answer in answers], found)
    for answer, own, scores in zip(answers, masks, found, strict=True):
        answer.add(own, scores.nll[:, target_slice(answer.request)])


def _greedy(model: ScoringModel, questions: Sequence[Question], settings: LikelihoodSettings) -> list[list[bool]]:
    """For each answer of some questions whether greedy decoding gives it; False where it was not asked for."""
    if not settings.greedy:
        return [[False] * len(question.answers) for question in questions]
    requests = [request for question in questions for request in question.answers]
    inputs: list[ScoringInput] = [all_masked_input(one, model.mask_id, settings.pad_to) for one in requests]
    all_masked: list[TokenScores] = score_tokens(model, inputs)
    matches = iter(greedy_matches(model, requests, all_masked, settings.pad_to))
    return [[next(matches) for _ in question.answers] for question in questions]
