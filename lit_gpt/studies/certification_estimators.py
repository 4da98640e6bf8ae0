"""Checks of likelihood estimators: the bound of a model whose every mask is enumerated.

For the exact model of a distribution the bound is -log p, because every order of unmasking gives the text the probability
p. For any other model it is above -log of the mean over orders, and known by the sum over all masks: that is what an
estimator must give on average, with a standard error that says how far single estimates are from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_gpt.likelihood.estimators import ESTIMATORS
from lit_gpt.likelihood.loglikelihood import LikelihoodRequest, LikelihoodSettings, mdm_likelihoods
from lit_gpt.likelihood.plan import Estimator
from lit_gpt.likelihood.scoring import ScoringModel
from lit_gpt.studies.certification_findings import Finding, guarded, mean_p_value, smallest_of
from lit_gpt.studies.certification_toys import TableModel, ToyDistribution, toy_bound

Estimates = Callable[[TableModel, Tensor, int, int], Sequence[tuple[float, float | None]]]
"""(model, text (l,), leading tokens that are given, number of estimates) to (nats, standard error or None) of each, whose
random numbers are independent."""
# Passes of an estimator that spends as many as it is given: too few to read every mask of four tokens.
_PASSES = 8
_COUNT = 200
# Nats a token: sums are in float32.
_ROUNDING = 1e-4
# Between the standard error that is told and the spread over seeds: estimates with weights 1/t have heavy tails.
_FACTOR = 2.0
_TEXTS = 3


def check_estimators(toys: list[ToyDistribution]) -> Iterator[Finding]:
    """All that are registered, on each toy."""
    for name, kind in ESTIMATORS.items():
        estimator = kind(**({kind.passes_parameter: _PASSES} if kind.passes_parameter else {}))
        for toy in toys:
            yield from check_estimator(estimator, toy, name)


def check_estimator(estimator: Estimator, toy: ToyDistribution, name: str) -> Iterator[Finding]:
    """One of this package's estimators."""

    def estimates(model: TableModel, text: Tensor, given: int, count: int) -> list[tuple[float, float | None]]:
        words = tuple(text.tolist())
        requests = [LikelihoodRequest(words[:given], words[given:], stream) for stream in range(count)]
        return _estimate(model, requests, estimator)

    def batch() -> Iterator[Finding]:
        """Texts of all lengths at once, padded, and each alone."""
        requests = []
        for number, text in enumerate(toy.sample(12, 6).tolist()):
            given = number % 2
            requests.append(
                LikelihoodRequest(tuple(text[:given]), tuple(text[given : given + 1 + number % toy.length]))
            )
        model = toy.inexact_model
        together, row_by_row = (_estimate(model, requests, estimator, most) for most in (10**6, 1))
        alone = [_estimate(model, [request], estimator)[0] for request in requests]
        worst = max(
            abs(one[0] - other[0]) / len(request.target)
            for others in (row_by_row, alone)
            for one, other, request in zip(together, others, requests, strict=True)
        )
        evidence = f"12 texts of 1 to {toy.length} tokens: at most {worst:.1e} nats a token"
        yield Finding(
            "estimator", name, "batch and padding change nothing", toy.name, evidence, holds=worst <= _ROUNDING
        )

    yield from check_estimates(estimates, toy, ("estimator", name), estimator.is_bound)
    yield from guarded("estimator", name, [batch])


def _estimate(
    model: TableModel, requests: Sequence[LikelihoodRequest], estimator: Estimator, max_tokens: int = 4096
) -> list[tuple[float, float | None]]:
    """(nats, standard error) of each request."""
    # What likelihoods are computed in.
    scoring = ScoringModel(
        lambda batch: map(Tensor.float, model.batch_logits(batch)),
        model.mask_id,
        model.mask_id + 1,
        max_tokens,
        may_be_uniform=True,
    )
    found = dict(mdm_likelihoods(scoring, requests, LikelihoodSettings(estimator)))
    return [(found[number].nll, found[number].standard_error) for number in range(len(requests))]


@dataclass(frozen=True)
class _Group:
    """The estimates of one text."""

    text: Tensor
    given: int
    values: Tensor
    errors: Sequence[float | None]
    expected: float

    @property
    def tolerance(self) -> float:
        """Nats."""
        return _ROUNDING * len(self.text)


def check_estimates(
    estimates: Estimates, toy: ToyDistribution, subject: tuple[str, str], is_bound: bool, count: int = _COUNT
) -> Iterator[Finding]:
    """Any estimator of the bound.

    Args:
        estimates: see the type.
        toy: whose texts are read.
        subject: part and name of the findings.
        is_bound: whether it is the bound, and not the likelihood of another order of unmasking.
        count: independent estimates of each text.
    """

    def exact() -> Iterator[Finding]:
        """The exact model."""
        found = list(_groups(estimates, toy, toy.exact_model, count))
        yield _mean_finding(subject, "mean is -log p under the exact model", toy, found)

    def inexact() -> Iterator[Finding]:
        """Another model."""
        found = list(_groups(estimates, toy, toy.inexact_model, count))
        yield _mean_finding(subject, "mean is the bound under another model", toy, found, claimed=is_bound)
        told = [error for group in found for error in group.errors if error is not None]
        if told:
            ratios = [_error_ratio(group) for group in found]
            evidence = "told over true, by text: " + " ".join(f"{ratio:.2f}" for ratio in ratios)
            honest = all(1 / _FACTOR <= ratio <= _FACTOR for ratio in ratios)
            yield Finding(*subject, "standard error is the spread over seeds", toy.name, evidence, holds=honest)

    yield from guarded(*subject, [exact, inexact])


def _groups(estimates: Estimates, toy: ToyDistribution, model: TableModel, count: int) -> Iterator[_Group]:
    """The likeliest texts: whole, behind one given token, and without their last token."""
    likeliest = toy.nll.argsort()[:_TEXTS]
    for number, text in enumerate(toy.texts[likeliest]):
        given = int(number == 1)
        part = text[: toy.length - int(number == 2)]
        found = estimates(model, part, given, count)
        values = torch.tensor([nats for nats, _ in found], dtype=torch.float64)
        yield _Group(part, given, values, [error for _, error in found], toy_bound(model, part, given))


def _mean_finding(
    subject: tuple[str, str], check: str, toy: ToyDistribution, groups: Sequence[_Group], **result: Any
) -> Finding:
    p_value = smallest_of([mean_p_value(one.values, one.expected, one.tolerance) for one in groups])
    evidence = ", ".join(f"{float(one.values.mean()):.3f} for {one.expected:.3f}" for one in groups) + " nats"
    return Finding(*subject, check, toy.name, evidence, p_value=p_value, **result)


def _error_ratio(group: _Group) -> float:
    """The standard error that is told (root of the mean square) over the spread of the estimates; 1 where both are 0."""
    told = math.sqrt(sum((error or 0.0) ** 2 for error in group.errors) / len(group.errors))
    true = float(group.values.std())
    return 1.0 if max(told, true) <= group.tolerance else told / max(true, 1e-12)
