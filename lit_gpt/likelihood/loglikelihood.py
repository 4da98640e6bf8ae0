"""Log-likelihoods of targets given prefixes, for many requests at once: exact for an ARM, estimated for an MDM.

Decisions: the masks are a function of (seed, prefix, draw, position in the target), so that the answers of one question
share them and their differences are less noisy, and no result depends on the batch; requests are worked off in rounds,
longest first, whose results can be kept before the next begins. The estimators and their formulas are in `estimators`.
May import estimators, noise, reading and scoring.

R rows (masks), L tokens of the target, T tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.likelihood.estimators import Plan, chain_rule_plan, exact_plan, mc_plan
from lit_gpt.likelihood.scoring import Query, Scores, score
from lit_gpt.model.logits import LogitsFn
from lit_gpt.randomness import hash_int

ESTIMATORS = ("mc", "chain_rule", "exact")
# Rows of a round of work, in batches: results and progress come after each.
_BATCHES_PER_ROUND = 32


@dataclass(frozen=True)
class Request:
    """A target whose likelihood is wanted, given a prefix."""

    prefix: tuple[int, ...]
    """Token ids; never masked. An MDM's may be empty."""
    target: tuple[int, ...]
    """Token ids, at least one."""
    stream: int = 0
    """Chooses the random numbers together with the prefix: texts without one want different numbers."""


@dataclass(frozen=True)
class Method:
    """How an MDM's likelihood is estimated."""

    estimator: str = "mc"
    """`mc` and `chain_rule` as published, or `exact`."""
    mc_num: int = 1024
    """Draws of `mc`."""
    budget: int = 128
    """Forward passes that `exact` may spend on a target."""
    eps: float = 0.0
    """Smallest masking probability of `mc`: p = (1 - eps) t + eps; training has 1e-3."""
    cfg_scale: float = 0.0
    """Classifier-free guidance; 0 is none."""
    greedy: bool = False
    """Also say whether greedy decoding gives the target."""
    pad_to: int = 0
    """Fill every input with [MASK] up to this length (published `padding=True`); 0 does not."""
    seed: int = 1234
    """Of the masks."""

    def __post_init__(self) -> None:
        problems = []
        if self.estimator not in ESTIMATORS:
            problems.append(f"estimator {self.estimator!r} is unknown: choose from {', '.join(ESTIMATORS)}")
        if self.mc_num < 1:
            problems.append(f"mc_num is {self.mc_num}: at least 1 draw is needed")
        if self.budget < 2:
            problems.append(f"budget is {self.budget}: at least 2 forward passes are needed")
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale >= 0):
            problems.append(f"cfg is {self.cfg_scale}: it must be a number from 0 up")
        if problems:
            raise ValueError("likelihood: " + "; ".join(problems))


@dataclass(frozen=True)
class Likelihood:
    """A result."""

    nll: float
    """Negative log-likelihood, nats, or the estimate of its bound."""
    standard_error: float
    """Of the estimator, nats."""
    is_greedy: bool
    """Greedy decoding gives the target; False where it was not asked for."""


@dataclass(frozen=True)
class Reader:
    """What reads: a model seen through `logits_fn`, and its limits."""

    logits_fn: LogitsFn
    mask_id: int
    vocab_size: int
    """Real tokens: what greedy decoding may choose."""
    max_tokens: int
    """Tokens of a batch; a matter of speed and memory only."""
    device: torch.device | str = "cpu"

    def score(self, queries: Sequence[Query]) -> list[Scores]:
        """`scoring.score` with this model and these limits."""
        return score(self.logits_fn, queries, self.vocab_size, self.max_tokens, self.device)


def mdm_likelihoods(reader: Reader, requests: Sequence[Request], method: Method) -> Iterator[tuple[int, Likelihood]]:
    """The likelihoods of some requests under an MDM.

    Args:
        reader: the model; for guidance its `logits_fn` is wrapped by `reading.guided`.
        requests: in any order; each prefix and target together no longer than the model's block size.
        method: how.

    Yields:
        (number of the request, its result), each once, longest first, as rounds of work are done.
    """
    for numbers in _rounds(reader, requests, lambda request: _passes(method, len(request.target))):
        part = [requests[number] for number in numbers]
        plans = [make_plan(method, request) for request in part]
        queries = [
            _masked_query(request, plan.masks, plan.scored, reader.mask_id, method.pad_to)
            for request, plan in zip(part, plans, strict=True)
        ]
        # The first look of the greedy check masks everything, as a row of most plans does: read together, it is free.
        first_looks = [_first_look(reader, request, method.pad_to) for request in part] if method.greedy else []
        found = reader.score(queries + first_looks)
        greedy = [False] * len(part)
        if method.greedy:
            greedy = greedy_matches(reader, part, found[len(part) :], method.pad_to)
        for number, request, plan, scores, matches in zip(
            numbers, part, plans, found[: len(part)], greedy, strict=True
        ):
            nll, error = plan.reduce(scores.nll[:, _target_part(request)].double())
            yield number, Likelihood(nll, error, matches)


def arm_likelihoods(reader: Reader, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
    """The exact likelihoods of some requests under an ARM: sum over i of -log p(target_i | prefix, target_<i).

    Args:
        reader: the model.
        requests: as `mdm_likelihoods`; prefixes hold at least one token.

    Yields:
        As `mdm_likelihoods`; greedy decoding comes for nothing.
    """
    for numbers in _rounds(reader, requests, lambda request: 1):
        queries = []
        for request in (requests[number] for number in numbers):
            assert request.prefix, "an ARM's first token needs one before it"
            ids = torch.tensor(request.prefix + request.target)
            scored = torch.arange(len(ids) - 1) >= len(request.prefix) - 1
            queries.append(Query(ids[None, :-1], scored[None], ids[1:]))
        for number, query, scores in zip(numbers, queries, reader.score(queries), strict=True):
            matches = bool((scores.best_ids == query.targets)[query.scored].all())
            yield number, Likelihood(float(scores.nll.double().sum()), 0.0, matches)


def greedy_matches(
    reader: Reader, requests: Sequence[Request], first_looks: Sequence[Scores], pad_to: int = 0
) -> list[bool]:
    """Whether greedy decoding of each target gives it.

    All target tokens start as [MASK]; one at a time, the position whose likeliest token has the highest probability is
    fixed. All requests decode together, and one is dropped at its first wrong token: nothing can mend it.

    Args:
        reader: the model.
        requests: prefixes and targets.
        first_looks: what the model says where all of a target is masked.
        pad_to: as `Method.pad_to`.
    """
    masks = [torch.ones(1, len(request.target), dtype=torch.bool) for request in requests]
    verdicts = [True] * len(requests)
    alive, found = list(range(len(requests))), first_looks
    while alive:
        for number, scores in zip(alive, found, strict=True):
            request, part = requests[number], _target_part(requests[number])
            position = int(torch.where(masks[number][0], scores.best_probability[0, part], -1.0).argmax())
            verdicts[number] = int(scores.best_ids[0, part][position]) == request.target[position]
            masks[number][0, position] = False
        alive = [number for number in alive if verdicts[number] and bool(masks[number].any())]
        queries = [_masked_query(requests[n], masks[n], masks[n], reader.mask_id, pad_to) for n in alive]
        found = reader.score(queries)
    return verdicts


def _first_look(reader: Reader, request: Request, pad_to: int) -> Query:
    """The target all masked, every position scored."""
    everything = torch.ones(1, len(request.target), dtype=torch.bool)
    return _masked_query(request, everything, everything, reader.mask_id, pad_to)


def _target_part(request: Request) -> slice:
    """Where the target stands in a row."""
    return slice(len(request.prefix), len(request.prefix) + len(request.target))


def make_plan(method: Method, request: Request) -> Plan:
    """The plan of a request's estimator."""
    length, keys = len(request.target), (method.seed, request.stream, hash_int(*request.prefix))
    if method.estimator == "mc":
        return mc_plan(length, method.mc_num, method.eps, *keys)
    return chain_rule_plan(length) if method.estimator == "chain_rule" else exact_plan(length, method.budget, *keys)


# --- from requests to rows --------------------------------------------------------------------------------------------


def _passes(method: Method, length: int) -> int:
    """Rows of a target, at most."""
    if method.estimator == "mc":
        return method.mc_num
    return length if method.estimator == "chain_rule" else min(method.budget, 2 ** min(length, 62) - 1)


def _rounds(reader: Reader, requests: Sequence[Request], passes: Callable[[Request], int]) -> Iterator[list[int]]:
    """Numbers of requests in rounds of some batches of work; longest first, like prefixes together."""

    def order(number: int) -> tuple[int, tuple[int, ...], int]:
        request = requests[number]
        return -len(request.prefix) - len(request.target), request.prefix, number

    current: list[int] = []
    tokens = 0
    for number in sorted(range(len(requests)), key=order):
        request = requests[number]
        current.append(number)
        tokens += (len(request.prefix) + len(request.target)) * passes(request)
        if tokens >= _BATCHES_PER_ROUND * reader.max_tokens:
            yield current
            current, tokens = [], 0
    if current:
        yield current


def _masked_query(request: Request, masks: Tensor, scored: Tensor, mask_id: int, pad_to: int) -> Query:
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
    return Query(input_ids, wanted, targets, before)
