"""What a check of the certification found, and how likely it is by chance.

N samples, l positions, C cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.likelihood.decision import student_tail

FALSE_ALARMS = 1e-3
"""Chance that a run in which everything is right reports any failure: shared evenly by all checks with a p-value."""
# Cells that are expected less often are counted together: the usual rule for chi-squared.
_FEWEST_EXPECTED = 5.0
# Rounding of the enumerated laws: a cell below it is impossible.
_SMALLEST_PROBABILITY = 1e-11


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    part: str
    """objective, estimator, sampler, model, loss, likelihood, perplexity."""
    name: str
    """Of the thing that was checked."""
    check: str
    """What must hold."""
    where: str
    """The toy distribution, or whatever it was checked on."""
    evidence: str
    """What was found, in numbers."""
    p_value: float | None = None
    """Of what was found by chance, if the check is one of chance."""
    holds: bool = True
    """Where it is none: whether it holds."""
    claimed: bool = True
    """Whether the thing says of itself that this holds; else it fails nothing."""
    told: bool = True
    """Whether what was found is enough to say that it holds."""

    def verdict(self, level: float) -> str:
        """`pass`, `FAIL`, or `no` where a thing does not have what it does not claim, or it cannot be told.

        Args:
            level: p-values below it fail.
        """
        holds = self.holds and (self.p_value is None or self.p_value >= level)
        if holds:
            return "pass" if self.told else "no"
        return "FAIL" if self.claimed else "no"


def level_of(findings: Sequence[Finding]) -> float:
    """The p-value below which one of several checks fails (Bonferroni)."""
    return FALSE_ALARMS / max(1, sum(one.p_value is not None for one in findings))


def guarded(part: str, name: str, checks: Iterable[Callable[[], Iterable[Finding]]]) -> Iterator[Finding]:
    """The findings of some checks of one thing; one that raises is a failure of that thing."""
    for check in checks:
        try:
            yield from check()
        # Whatever foreign code raises is what was found.
        except Exception as error:
            words = str(error).splitlines()
            evidence = f"{type(error).__name__}: {words[0] if words else 'no message'}"
            yield Finding(part, name, "runs", getattr(check, "__name__", "").strip("_"), evidence, holds=False)


# --- agreement --------------------------------------------------------------------------------------------------------


def law_p_value(samples: Tensor, law: Tensor) -> float:
    """How likely samples (N, l) are to be as far from a law as they are, by chi-squared; 0 if one is impossible."""
    if bool((samples < 0).any() or (samples >= law.size(0)).any()):
        return 0.0
    codes = torch.zeros(len(samples), dtype=torch.int64)
    for column in samples.T:
        codes = codes * law.size(0) + column
    observed = torch.bincount(codes, minlength=law.numel()).double()
    expected = law.flatten() * len(samples)
    possible = law.flatten() > _SMALLEST_PROBABILITY
    if bool(observed[~possible].any()):
        return 0.0
    observed, expected = observed[possible], expected[possible]
    return chi_squared_p_value(observed, expected)


def chi_squared_p_value(observed: Tensor, expected: Tensor) -> float:
    """P(chi-squared is at least that of these counts), (C,) float64 each; rare cells are counted together."""
    order = expected.argsort()
    rare = int((expected[order].cumsum(0) < _FEWEST_EXPECTED).sum()) + 1 if expected.min() < _FEWEST_EXPECTED else 1
    groups = [torch.cat((counts[order][:rare].sum()[None], counts[order][rare:])) for counts in (observed, expected)]
    cells = len(groups[0])
    if cells < 2:
        return 1.0
    statistic = ((groups[0] - groups[1]).square() / groups[1]).sum()
    half = torch.tensor((cells - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))


def mean_p_value(values: Tensor, expected: float, tolerance: float) -> float:
    """How likely a mean of independent values is to be as far from what is expected, by Student's t, two-sided.

    Args:
        values: (n,) float64.
        expected: their mean.
        tolerance: a difference that is rounding.
    """
    difference = abs(float(values.mean()) - expected)
    if difference <= tolerance:
        return 1.0
    error = float(values.std()) / math.sqrt(len(values))
    return min(1.0, 2 * student_tail(difference / error, len(values) - 1)) if error > 0 else 0.0


def smallest_of(p_values: Sequence[float]) -> float:
    """One p-value for several checks: the smallest times their number."""
    return min(1.0, len(p_values) * min(p_values))
