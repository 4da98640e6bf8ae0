"""Log-likelihoods of targets given prefixes, for many requests at once: exact for an ARM, estimated for an MDM.

The random masks are a function of (seed, prefix, number of the mask, position in the target): the answers of one question
share them, which makes their differences less noisy, and no result depends on the batch. Requests are processed in
rounds, longest first, and a round's results can be stored before the next begins. What is masked and how losses are summed
is the estimator's (`plan`, `estimators`); the forward passes are in `scoring`.

R rows (masks), L tokens of the target, T tokens of a row.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_gpt.likelihood.monte_carlo import MonteCarlo
from lit_gpt.likelihood.plan import Estimator, MaskingPlan
from lit_gpt.likelihood.scoring import ScoringInput, ScoringModel, TokenScores, score_tokens
from lit_gpt.likelihood.shared_context import answers_of_a_batch, score_answers
from lit_gpt.model.logits import guided
from lit_gpt.randomness import hash_int

# Raised whenever the likelihoods of this file change, by more than rounding: kept results of another version are computed
# again. What one estimator alone changes is its own `version`.
SCORING_VERSION = 1
# Batches of a round: enough that equal rows meet and lengths can be sorted, few enough that results come in after seconds
# (a choice, not a measurement).
_BATCHES_PER_ROUND = 32
# A question's answers may make an ARM's round longer, up to this: a bound on memory (a choice, not a measurement).
_MOST_BATCHES_PER_ROUND = 64
# The answers of a question come one after the other, and have the same plan where their lengths are the same.
_KEPT_PLANS = 8


@dataclass(frozen=True)
class LikelihoodRequest:
    """A target whose likelihood is wanted, given a prefix."""

    prefix: tuple[int, ...]
    """Token ids; never masked. An MDM's may be empty."""
    target: tuple[int, ...]
    """Token ids, at least one."""
    stream: int = 0
    """Chooses the random numbers together with the prefix: texts without a prefix want different ones."""


@dataclass(frozen=True)
class LikelihoodSettings:
    """How an MDM's likelihood is estimated."""

    estimator: Estimator = MonteCarlo()
    """With its own parameters."""
    cfg_scale: float = 0.0
    """Scale of classifier-free guidance; 0 is none."""
    greedy: bool = False
    """Also say whether greedy decoding gives the target."""
    pad_to: int = 0
    """Fill every input with [MASK] up to this length (published `padding=True`); 0 does not."""
    seed: int = 1234
    """Of the masks."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale >= 0):
            raise ValueError(f"likelihood: cfg is {self.cfg_scale}: it must be a number from 0 up")

    def identity(self) -> dict[str, Any]:
        """Everything here that decides a result, as JSON values; it names caches, so its keys never change."""
        own = {name: value for name, value in dataclasses.asdict(self).items() if name != "estimator"}
        # `eps` is a parameter of one estimator, but caches have it for all.
        return {"eps": 0.0, **self.estimator.identity(), **own}

    def versions(self) -> dict[str, int]:
        """Versions of what estimates an MDM's likelihoods."""
        return {"scoring": SCORING_VERSION, self.estimator.name: self.estimator.version}


@dataclass(frozen=True)
class Likelihood:
    """A result."""

    nll: float
    """Negative log-likelihood, nats, or the estimate of its bound."""
    standard_error: float
    """Of the estimator, nats."""
    is_greedy: bool
    """Greedy decoding gives the target; False where it was not asked for."""


class NotFiniteError(ValueError):
    """A request whose logits are NaN or infinite, or all equal because the states before them overflow."""

    def __init__(self, request: LikelihoodRequest, name: str = "a text") -> None:
        self.request = request
        super().__init__(
            f"{name}: the model's logits are NaN, infinite or all equal: its numbers overflow; give dtype float32 or "
            "another checkpoint"
        )


def mdm_likelihoods(
    model: ScoringModel, requests: Sequence[LikelihoodRequest], settings: LikelihoodSettings
) -> Iterator[tuple[int, Likelihood]]:
    """The likelihoods of some requests under an MDM.

    Args:
        model: the model, without guidance.
        requests: in any order; each prefix and target together no longer than the model's block size.
        settings: the estimator, and what else decides the results.

    Yields:
        (number of the request, its result), each once, longest first, as rounds of work are done.

    Raises:
        NotFiniteError: it says for which request.
    """
    model = dataclasses.replace(model, logits_fn=guided(model.logits_fn, settings.cfg_scale, model.mask_id))
    for numbers in _rounds(model, requests, lambda request: settings.estimator.passes(len(request.target)), False):
        part = [requests[number] for number in numbers]
        plans = [masking_plan(settings, request) for request in part]
        inputs = [
            masked_input(request, plan.masks, plan.scored, model.mask_id, settings.pad_to)
            for request, plan in zip(part, plans, strict=True)
        ]
        # The greedy check begins with everything masked, as one row of most plans is: in one call, it costs nothing.
        checked = part if settings.greedy else []
        all_masked = [all_masked_input(request, model.mask_id, settings.pad_to) for request in checked]
        found = score_tokens(model, inputs + all_masked, best=settings.greedy)
        check_scores(part, found[: len(part)])
        greedy = greedy_matches(model, checked, found[len(part) :], settings.pad_to) or [False] * len(part)
        for number, request, plan, scores, matches in zip(
            numbers, part, plans, found[: len(part)], greedy, strict=True
        ):
            nll, error = plan.reduce(scores.nll[:, target_slice(request)].double())
            yield number, Likelihood(nll, error, matches)


def arm_likelihoods(model: ScoringModel, requests: Sequence[LikelihoodRequest]) -> Iterator[tuple[int, Likelihood]]:
    """The exact likelihoods of some requests under an ARM: sum over i of -log p(target_i | prefix, target_<i).

    Args:
        model: the model.
        requests: as `mdm_likelihoods`; prefixes hold at least one token.

    Yields:
        As `mdm_likelihoods`; whether greedy decoding gives the target follows from the same forward pass.

    Raises:
        NotFiniteError: as `mdm_likelihoods`.
    """
    for numbers in _rounds(model, requests, lambda request: 1, True):
        part = [requests[number] for number in numbers]
        found: dict[int, TokenScores] = {}
        # A context with several answers is read once; everything else is whole rows.
        for own, scores in _shared_contexts(model, part):
            found[own] = scores
        alone = [own for own in range(len(part)) if own not in found]
        inputs = [_whole_input(part[own]) for own in alone]
        for own, row, scores in zip(alone, inputs, score_tokens(model, inputs), strict=True):
            scored = row.scored[0]
            kept = (values[:, scored] for values in (scores.nll, scores.best_ids, scores.best_probability))
            found[own] = TokenScores(*kept)
        check_scores(part, [found[own] for own in range(len(part))])
        for own, (number, request) in enumerate(zip(numbers, part, strict=True)):
            matches = found[own].best_ids[0].tolist() == list(request.target)
            yield number, Likelihood(float(found[own].nll.double().sum()), 0.0, matches)


def _shared_contexts(model: ScoringModel, requests: Sequence[LikelihoodRequest]) -> Iterator[tuple[int, TokenScores]]:
    """The scores, (1, L) each, of the requests whose prefix others have too, by their numbers."""
    if model.network is None:
        return
    answers: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        answers.setdefault(request.prefix, []).append(number)
    questions, numbers = [], []
    for prefix, own in answers.items():
        # Whole rows that are equal are read once anyway: answers of one token, for example.
        if len(prefix) > 1 and len({requests[number].target[:-1] for number in own}) > 1:
            for some in answers_of_a_batch(prefix, [requests[number].target for number in own], model.max_tokens):
                questions.append(some)
                numbers.append(own[: len(some.answers)])
                own = own[len(some.answers) :]
    for question, scores in score_answers(model.network, questions, model.max_tokens):
        yield from zip(numbers[question], scores, strict=True)


def greedy_matches(
    model: ScoringModel, requests: Sequence[LikelihoodRequest], all_masked: Sequence[TokenScores], pad_to: int = 0
) -> list[bool]:
    """Whether greedy decoding of each target gives it.

    All target tokens start as [MASK]; one at a time, the position whose likeliest token has the highest probability is
    fixed. All requests decode together, and one is dropped at its first wrong token.

    Args:
        model: the model.
        requests: prefixes and targets.
        all_masked: the scores of each whole target where all of it is masked.
        pad_to: as in `LikelihoodSettings`.
    """
    masks = [torch.ones(1, len(request.target), dtype=torch.bool) for request in requests]
    matches = [True] * len(requests)
    unfinished, found = list(range(len(requests))), all_masked
    while unfinished:
        check_scores([requests[number] for number in unfinished], found)
        for number, scores in zip(unfinished, found, strict=True):
            request, part = requests[number], target_slice(requests[number])
            position = int(torch.where(masks[number][0], scores.best_probability[0, part], -1.0).argmax())
            matches[number] = int(scores.best_ids[0, part][position]) == request.target[position]
            masks[number][0, position] = False
        unfinished = [number for number in unfinished if matches[number] and bool(masks[number].any())]
        inputs = [masked_input(requests[n], masks[n], masks[n], model.mask_id, pad_to) for n in unfinished]
        found = score_tokens(model, inputs)
    return matches


def check_scores(requests: Sequence[LikelihoodRequest], found: Sequence[TokenScores]) -> None:
    """Refuse scores that are not numbers: they must not enter a mean or a cache."""
    for request, scores in zip(requests, found, strict=True):
        if not bool(scores.nll.isfinite().all()):
            raise NotFiniteError(request)


def masking_plan(settings: LikelihoodSettings, request: LikelihoodRequest) -> MaskingPlan:
    """The plan of a request's target."""
    return _plan(settings.estimator, len(request.target), settings.seed, request.stream, hash_int(*request.prefix))


@functools.lru_cache(maxsize=_KEPT_PLANS)
def _plan(estimator: Estimator, length: int, *keys: int) -> MaskingPlan:
    return estimator.plan(length, *keys)


# --- from requests to rows --------------------------------------------------------------------------------------------


def _rounds(
    model: ScoringModel,
    requests: Sequence[LikelihoodRequest],
    passes: Callable[[LikelihoodRequest], int],
    whole_questions: bool,
) -> Iterator[list[int]]:
    """Numbers of requests in rounds of work; longest first, like prefixes together.

    Args:
        model: decides how much a round is.
        requests: in any order.
        passes: over a request's tokens.
        whole_questions: do not end a round between answers to one question. An ARM reads their context once; an MDM saves
            nothing, and its results should come soon.
    """
    longest: dict[tuple[int, ...], int] = {}
    for request in requests:
        longest[request.prefix] = max(len(request.target), longest.get(request.prefix, 0))

    def order(number: int) -> tuple[int, tuple[int, ...], int, int]:
        # The answers of a question stand where its longest does.
        prefix, target = requests[number].prefix, requests[number].target
        return -len(prefix) - longest[prefix], prefix, -len(target), number

    def is_answer_too(number: int) -> bool:
        # Texts that share one token, or none, save nothing by being read together.
        prefix = requests[number].prefix
        return whole_questions and len(prefix) > 1 and prefix == requests[current[-1]].prefix

    current: list[int] = []
    tokens, enough, most = 0, round_tokens(model), _MOST_BATCHES_PER_ROUND * model.max_tokens
    for number in sorted(range(len(requests)), key=order):
        if tokens >= most or (tokens >= enough and not is_answer_too(number)):
            yield current
            current, tokens = [], 0
        request = requests[number]
        current.append(number)
        tokens += (len(request.prefix) + len(request.target)) * passes(request)
    if current:
        yield current


def round_tokens(model: ScoringModel) -> int:
    """Tokens of a round: some batches, or less on slow devices."""
    most = _BATCHES_PER_ROUND * model.max_tokens
    return min(most, model.tokens_per_result or most)


def target_slice(request: LikelihoodRequest) -> slice:
    """The columns of the target in a row."""
    return slice(len(request.prefix), len(request.prefix) + len(request.target))


def _whole_input(request: LikelihoodRequest) -> ScoringInput:
    """One row with prefix and target, whose last token nobody reads, for an ARM."""
    assert request.prefix, "an ARM's first token needs one before it"
    ids = torch.tensor(request.prefix + request.target)
    scored = torch.arange(len(ids) - 1) >= len(request.prefix) - 1
    return ScoringInput(ids[None, :-1], scored[None], ids[1:])


def all_masked_input(request: LikelihoodRequest, mask_id: int, pad_to: int) -> ScoringInput:
    """One row with the whole target masked and scored."""
    everything = torch.ones(1, len(request.target), dtype=torch.bool)
    return masked_input(request, everything, everything, mask_id, pad_to)


def masked_input(request: LikelihoodRequest, masks: Tensor, scored: Tensor, mask_id: int, pad_to: int) -> ScoringInput:
    """The rows of a target under some masks (R, L), behind its prefix and before the padding."""
    rows, before = len(masks), len(request.prefix)
    length = before + len(request.target)
    total = max(length, pad_to)
    targets = torch.full((total,), mask_id)
    targets[:length] = torch.tensor(request.prefix + request.target)
    input_ids = targets.repeat(rows, 1)
    input_ids[:, before:length].masked_fill_(masks, mask_id)
    wanted = torch.zeros(rows, total, dtype=torch.bool)
    wanted[:, before:length] = scored
    return ScoringInput(input_ids, wanted, targets, before)
