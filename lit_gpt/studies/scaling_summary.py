"""What a sweep says: optima, exponents, laws and the compute gap, each with its bootstrap interval, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_gpt.studies.scaling_fits import (
    LAW_NAMES,
    Array,
    Optima,
    SweptRuns,
    bootstrapped_law,
    fit_one_law,
    natural_law,
    parabola_optima,
    power_law,
    shared_slope_gap,
    simulated_losses,
)

_PERCENTILES = (2.5, 97.5)
_LEAST_RUNS_OF_A_LAW = 6


def swept_runs(rows: Sequence[dict[str, Any]], kind: str, size_measure: str) -> SweptRuns:
    """The rows of one kind whose learning rate is the rule's.

    Raises:
        ValueError: there are none.
    """
    own = [row for row in rows if row["kind"] == kind and float(row["rate_factor"]) == 1]
    if not own:
        raise ValueError(f"no finished runs of {kind}: run sweep first")

    def column(name: str) -> Array:
        # An empty standard error is that of an exact loss, or of one draw, which does not know it.
        return np.array([float(row[name] or 0) for row in own])

    measure = column("flops_per_token" if size_measure == "M" else "size")
    errors = column("val_loss_draws_se")
    return SweptRuns(column("budget"), column("size"), measure, column("tokens"), column("val_loss"), errors)


def summarised(runs: dict[str, SweptRuns], draws: int, huber: float | None, seed: int) -> dict[str, Any]:
    """All fits of all kinds.

    Args:
        runs: by kind; the gaps are those of every kind to the first.
        draws: simulated sweeps.
        huber: threshold of the parametric law, or None for one from the residuals.
        seed: of the simulations.

    Raises:
        ValueError: a budget has fewer than three sizes.
    """
    kinds, curves = {}, {}
    for number, (kind, own) in enumerate(runs.items()):
        random = np.random.default_rng([seed, number])
        optima = parabola_optima(own, own.losses[None])
        free = len(own.losses) - 3 * len(own.groups())
        simulated = parabola_optima(own, simulated_losses(own, optima.fitted[0], free, draws, random))
        curves[kind] = (own, optima, simulated)
        kinds[kind] = _optima_summary(own, optima, simulated)
        if len(own.losses) >= _LEAST_RUNS_OF_A_LAW:
            kinds[kind]["law"] = _law_summary(own, huber, draws, random)
    first = next(iter(curves))
    gaps = {kind: _gap(curves[first], curves[kind]) for kind in curves if kind != first and _has_curve(curves[kind][0])}
    return {"kinds": kinds, "compute_gap_to": first, "compute_gaps": gaps, "bootstrap_draws": draws, "interval": 0.95}


def _has_curve(runs: SweptRuns) -> bool:
    return len(runs.groups()) >= 2


def _with_interval(value: float, draws: Array) -> list[float]:
    """[value, lower end, upper end]."""
    return [float(value), *(float(end) for end in np.percentile(draws, _PERCENTILES))]


def _log_budgets(runs: SweptRuns) -> Array:
    logs: Array = np.log(np.unique(runs.budgets))
    return logs


def _optima_summary(runs: SweptRuns, optima: Optima, simulated: Optima) -> dict[str, Any]:
    budgets = []
    for number, members in enumerate(runs.groups()):
        best = members[runs.losses[members].argmin()]
        budgets.append(
            {
                "flops": float(runs.budgets[members[0]]),
                "size": _with_interval(np.exp(optima.log_sizes[0, number]), np.exp(simulated.log_sizes[:, number])),
                "loss": _with_interval(optima.losses[0, number], simulated.losses[:, number]),
                "at_edge": bool(optima.at_edge[0, number]),
                "share_of_draws_at_edge": float(simulated.at_edge[:, number].mean()),
                "best_run": {"size": float(runs.sizes[best]), "loss": float(runs.losses[best])},
            }
        )
    found: dict[str, Any] = {"budgets": budgets}
    if _has_curve(runs):
        x = _log_budgets(runs)
        slope, intercept = power_law(x, optima.log_sizes)
        found["size_exponent"] = _with_interval(slope[0], power_law(x, simulated.log_sizes)[0])
        found["tokens_exponent"] = [1 - found["size_exponent"][index] for index in (0, 2, 1)]
        found["size_log_factor"] = float(intercept[0])
        slope, intercept = power_law(x, np.log(optima.losses))
        slopes, intercepts = power_law(x, np.log(simulated.losses))
        found["loss_exponent"] = _with_interval(-slope[0], -slopes)
        found["loss_factor"] = _with_interval(np.exp(intercept[0]), np.exp(intercepts))
    return found


def _law_summary(runs: SweptRuns, huber: float | None, draws: int, random: np.random.Generator) -> dict[str, Any]:
    parameters, predicted, threshold = fit_one_law(runs, huber)
    residuals = np.log(predicted / runs.losses)
    found = natural_law(runs, parameters[None])[0]
    simulated = natural_law(runs, bootstrapped_law(runs, (parameters, predicted, threshold), draws, random))
    law: dict[str, Any] = {
        name: _with_interval(found[number], simulated[:, number]) for number, name in enumerate(LAW_NAMES)
    }
    size_share = simulated[:, 4] / (simulated[:, 3] + simulated[:, 4])
    law["size_exponent"] = _with_interval(found[4] / (found[3] + found[4]), size_share)
    law["huber_threshold"] = threshold
    law["share_beyond_threshold"] = float((np.abs(residuals) > threshold).mean())
    law["root_mean_square_log_residual"] = float(np.sqrt((residuals**2).mean()))
    return law


_Curve = tuple[SweptRuns, Optima, Optima]


def _gap(first: _Curve, other: _Curve) -> dict[str, Any]:
    """How many times the first kind's compute the other one needs for the same loss, at their best sizes."""
    x, budget = _log_budgets(first[0]), float(first[0].budgets.max())
    if not np.array_equal(x, _log_budgets(other[0])):
        raise ValueError("the compute gap needs the same budgets of both kinds: finish the sweep first")

    def at_largest(one: Optima, two: Optima) -> Array:
        slopes, intercepts = power_law(x, np.log(two.losses))
        own_slopes, own_intercepts = power_law(x, np.log(one.losses))
        reached = (own_slopes * np.log(budget) + own_intercepts - intercepts) / slopes
        factors: Array = np.exp(np.clip(reached - np.log(budget), -50, 50))
        return factors

    shared, factor = shared_slope_gap(x, np.log(other[1].losses), np.log(first[1].losses))
    slopes, factors = shared_slope_gap(x, np.log(other[2].losses), np.log(first[2].losses))
    own = at_largest(first[1], other[1])[0]
    return {
        # log_y - log_other over a negative slope: the other's advance along log x; its inverse is what this kind needs.
        "factor": _with_interval(1 / factor[0], 1 / factors),
        "shared_loss_exponent": _with_interval(-shared[0], -slopes),
        "factor_at_largest_budget": _with_interval(own, at_largest(first[2], other[2])),
    }
