"""Log-likelihoods of targets given prefixes: exact for an ARM; bounds and a left-to-right product for an MDM.

The bound on an MDM's negative log-likelihood of a target of L tokens, in nats (SMDM, arXiv 2410.18514, section 3; in its
form over numbers of masked tokens: Ou et al. 2024, arXiv 2406.03736):

    integral over t in (0, 1) of E[sum over masked i of CE_i / t]  =  sum_{k=1..L} (1/k) E_{|M| = k}[sum_{i in M} CE_i(M)]

Decisions: an estimator is a plan, a function of (length, effort, keys) to masks and to what becomes of their
cross-entropies; it sees no model. Random masks are a function of (seed, prefix, draw, position in the target), so that
the answers of one question share them and their differences are less noisy, and no result depends on the batch. A
result's standard error is that of the estimator, 0 where nothing was drawn. May import noise and scoring.

R rows (masks), L tokens of the target, T tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.noise import Stream, hash_int, uniform
from lit_gpt.scoring import LogitsFn, Query, Scores, score

ESTIMATORS = ("mc", "chain_rule", "exact")
# What a token's cross-entropy is expected to be when k of L tokens are masked, as a share of what it is when all are:
# the control variate of `exact_plan`. Any numbers leave the estimate unbiased; these made it the least noisy on a trained
# model of 1M parameters, and the choice is flat (docs/results/likelihood.md).
_SHARE_AT_NONE, _SHARE_AT_ALL = 0.6, 1.0
# Rows of a round of work, in batches: results and progress come after each.
_BATCHES_PER_ROUND = 32


@dataclass(frozen=True)
class Request:
    """A target whose likelihood is wanted, given a prefix."""

    prefix: tuple[int, ...]
    """Token ids; never masked. An MDM's may be empty."""
    target: tuple[int, ...]
    """Token ids, at least one."""


@dataclass(frozen=True)
class Method:
    """How an MDM's likelihood is estimated."""

    estimator: str = "mc"
    """`mc` and `chain_rule` as published, or `exact`."""
    mc_num: int = 1024
    """Draws of `mc`."""
    budget: int = 128
    """Forward passes that `exact` may spend on a target."""
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
class Plan:
    """Which tokens are masked in which pass, and what the cross-entropies come to."""

    masks: Tensor
    """(R, L) bool: True is read as [MASK]."""
    scored: Tensor
    """(R, L) bool, within `masks`."""
    reduce: Callable[[Tensor], tuple[float, float]]
    """Cross-entropies (R, L) float64, 0 where not scored, to (nll, standard error)."""


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
        reader: the model; for guidance its `logits_fn` is wrapped by `scoring.guided`.
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
        greedy = greedy_matches(reader, part, method.pad_to) if method.greedy else [False] * len(part)
        for number, request, plan, scores, matches in zip(
            numbers, part, plans, reader.score(queries), greedy, strict=True
        ):
            start = len(request.prefix)
            nll, error = plan.reduce(scores.nll[:, start : start + len(request.target)].double())
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


def greedy_matches(reader: Reader, requests: Sequence[Request], pad_to: int = 0) -> list[bool]:
    """Whether greedy decoding of each target gives it.

    All target tokens start as [MASK]; one at a time, the position whose likeliest token has the highest probability is
    fixed. All requests decode together, and one is dropped at its first wrong token: nothing can mend it.

    Args:
        reader: the model.
        requests: prefixes and targets.
        pad_to: as `Method.pad_to`.
    """
    masks = [torch.ones(1, len(request.target), dtype=torch.bool) for request in requests]
    verdicts = [True] * len(requests)
    alive = list(range(len(requests)))
    while alive:
        queries = [_masked_query(requests[n], masks[n], masks[n], reader.mask_id, pad_to) for n in alive]
        for number, query, scores in zip(alive, queries, reader.score(queries), strict=True):
            position = int(torch.where(query.scored[0], scores.best_probability[0], -1.0).argmax())
            verdicts[number] = bool(scores.best_ids[0, position] == query.targets[position])
            masks[number][0, position - len(requests[number].prefix)] = False
        alive = [number for number in alive if verdicts[number] and bool(masks[number].any())]
    return verdicts


# --- plans ------------------------------------------------------------------------------------------------------------


def make_plan(method: Method, request: Request) -> Plan:
    """The plan of a request's estimator."""
    length, keys = len(request.target), (method.seed, hash_int(*request.prefix))
    if method.estimator == "mc":
        return mc_plan(length, method.mc_num, *keys)
    return chain_rule_plan(length) if method.estimator == "chain_rule" else exact_plan(length, method.budget, *keys)


def chain_rule_plan(length: int) -> Plan:
    """The left-to-right product: in pass j the tokens from j on are masked, and token j is scored.

    Not the bound, but the likelihood of one order of unmasking. Source: SMDM's `nll_type=chain_rule`.
    """
    return Plan(
        torch.ones(length, length, dtype=torch.bool).triu(),
        torch.eye(length, dtype=torch.bool),
        lambda nll: (float(nll.sum()), 0.0),
    )


def mc_plan(length: int, draws: int, *keys: int) -> Plan:
    """The integral by low-discrepancy times: mean over i of sum_masked CE / t_i with t_i = (u + i / n) mod 1.

    Source: SMDM's `nll_type=mc` (published: n is the forward batch; here all draws). The standard error compares
    neighbours in t (collapsed strata: Cochran 1977, section 5A.12), so it counts what the strata do not.

    Args:
        length: L.
        draws: n.
        *keys: what the random numbers are a function of.
    """
    position = torch.arange(length)
    shift = float(uniform(*keys, int(Stream.LIKELIHOOD), torch.tensor(-1)))
    times = ((torch.arange(draws, dtype=torch.float64) + shift) / draws) % 1.0
    masks = uniform(*keys, int(Stream.LIKELIHOOD), torch.arange(draws)[:, None], position) < times[:, None]

    def reduce(nll: Tensor) -> tuple[float, float]:
        values = nll.sum(1) / times.clamp(min=torch.finfo(torch.float64).tiny)
        pairs = values[: draws // 2 * 2].view(-1, 2)
        spread = (pairs[:, 0] - pairs[:, 1]).square().sum() * (draws / max(1, 2 * len(pairs)))
        return float(values.mean()), float(spread.sqrt() / draws) if len(pairs) else math.nan

    return Plan(masks, masks, reduce)


def exact_plan(length: int, budget: int, *keys: int) -> Plan:
    """The bound as a sum over numbers of masked tokens, without a draw where the budget allows.

    With 2^L - 1 <= budget every mask is read. Otherwise one pass masks everything, which gives the term k = L and a
    first guess a_i of every token's cross-entropy; the other n passes take k from 1 to L - 1 systematically with density
    q_k ~ sqrt((1/k) (1 - k/L)), the spread of a mean of k tokens, and

        nll = sum_k g_k mean(a) + (1/n) sum_j (1/q_{k_j}) mean_{i in M_j} (CE_i(M_j) - g_{k_j} a_i),    g_L = 1.

    The masks, in the order of k, are cut from a chain of random permutations: neighbouring passes, whose k are alike,
    partition the target, so that every token is scored about as often at every level, and by symmetry each mask is
    uniform among those of its size. The estimate is unbiased for any g. Its standard error compares successive scorings
    of the same token.

    Args:
        length: L.
        budget: passes, at least 2.
        *keys: what the random numbers are a function of.
    """
    if length < 63 and 2**length - 1 <= budget:
        return _all_masks(length)
    shift = float(uniform(*keys, int(Stream.LIKELIHOOD), torch.tensor(-2)))
    sizes, weights = systematic_sizes(length, budget - 1, shift)
    drawn = permutation_masks(length, sizes, *keys)
    masks = torch.cat((torch.ones(1, length, dtype=torch.bool), drawn))
    share = _SHARE_AT_NONE + (_SHARE_AT_ALL - _SHARE_AT_NONE) * torch.arange(1, length + 1).double() / length
    coefficients = weights / sizes

    def reduce(nll: Tensor) -> tuple[float, float]:
        first = nll[0]
        residual = (nll[1:] - share[sizes - 1, None] * first) * drawn
        value = share.sum() * first.mean() + (coefficients * residual.sum(1)).sum()
        return float(value), _chain_error(residual, drawn, coefficients)

    return Plan(masks, masks, reduce)


def systematic_sizes(length: int, count: int, shift: float) -> tuple[Tensor, Tensor]:
    """Numbers of masked tokens by systematic sampling, in rising order, and their weights.

    Args:
        length: L, at least 2.
        count: n.
        shift: in [0, 1), the one random number.

    Returns:
        (n,) int64 in [1, L - 1], k_j at the quantile (j + shift) / n; and (n,) float64 1 / (n q_{k_j}), whose sum over
        f(k_j) estimates the sum of f(k).
    """
    sizes = torch.arange(1, length, dtype=torch.float64)
    density = ((1 / sizes) * (1 - sizes / length)).sqrt()
    density /= density.sum()
    points = (torch.arange(count, dtype=torch.float64) + shift) / count
    index = torch.searchsorted(density.cumsum(0), points, right=True).clamp(max=length - 2)
    return index + 1, 1 / (count * density[index])


def permutation_masks(length: int, sizes: Tensor, *keys: int) -> Tensor:
    """Masks of given sizes, cut one after the other from a chain of random permutations of the target.

    A mask that a permutation's end leaves unfinished takes the rest from the next one, passing over what it has.

    Args:
        length: L.
        sizes: (R,) int64 in [1, L].
        *keys: what the permutations are a function of; a longer target orders its first tokens alike.

    Returns:
        (R, L) bool.
    """
    masks = torch.zeros(len(sizes), length, dtype=torch.bool)
    waiting: list[int] = []
    for row, size in enumerate(sizes.tolist()):
        chosen, waiting = waiting[:size], waiting[size:]
        if len(chosen) < size:
            order = uniform(*keys, int(Stream.LIKELIHOOD), -3, row, torch.arange(length)).argsort().tolist()
            taken = set(chosen)
            fresh = [token for token in order if token not in taken]
            missing = size - len(chosen)
            chosen, waiting = chosen + fresh[:missing], fresh[missing:] + [token for token in order if token in taken]
        masks[row, chosen] = True
    return masks


def _all_masks(length: int) -> Plan:
    """Every mask but the empty one, weighted so that the sum is the bound: 1 / (L C(L-1, k-1)) for one of k tokens."""
    numbers = torch.arange(1, 2**length)
    masks = (numbers[:, None] >> torch.arange(length)) & 1 == 1
    by_size = torch.tensor([0.0] + [1 / (length * math.comb(length - 1, k - 1)) for k in range(1, length + 1)]).double()
    weights = by_size[masks.sum(1)]
    return Plan(masks, masks, lambda nll: (float((weights * nll.sum(1)).sum()), 0.0))


def _chain_error(residual: Tensor, masks: Tensor, coefficients: Tensor) -> float:
    """Standard error of sum_j c_j sum_{i in M_j} residual_ij, from differences between a token's successive scorings.

    Args:
        residual: (n, L) float64, 0 where not scored.
        masks: (n, L) bool.
        coefficients: (n,) float64.
    """
    last = torch.full((masks.size(1),), math.nan, dtype=torch.float64)
    squares, pairs = 0.0, 0
    for row, mask in zip(residual, masks, strict=True):
        again = mask & ~last.isnan()
        squares += float((row - last)[again].square().sum() / 2)
        pairs += int(again.sum())
        last = torch.where(mask, row, last)
    if not pairs:
        return math.nan
    total = float((coefficients.square() * masks.sum(1)).sum())
    return math.sqrt(squares / pairs * total)


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
