"""Fits of a scaling study: parabolas over size, power laws over compute, and L = E + A / M^a + B / D^b by a Huber loss.

Everything runs over many sets of losses at once (first axis), because every interval is a bootstrap: from a fit, sweeps are
simulated and fitted anew. A simulated loss is the fitted one plus two kinds of noise. One is the standard error of the
loss: all runs of a kind are validated on the same sequences with the same draws, so it moves all of them together, by one
normal number a sweep. The other is each run's own, with the variance of the fit's residuals, itself drawn from its
uncertainty (scaled inverse chi-squared, as few residuals know it badly). Resampling runs instead would leave budgets of four
sizes without a parabola.

K sets of losses, n runs, G budgets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LAW_NAMES = ("E", "A", "B", "a", "b")
# Huber 1964: 95 % as exact as least squares where residuals are normal.
_HUBER_SCALES = 1.345
_MAD_TO_DEVIATION = 1.4826
# Exponents are searched in here; published ones lie between 0.05 and 0.8.
_EXPONENTS = (1e-3, 4.0)
_START_EXPONENTS = (0.1, 0.3, 0.6, 1.2)
_START_FLOORS = (0.1, 0.5, 0.9)
_LM_STEPS = 150
# Of the parametric law in a bootstrap: from the fit itself, and from this many of the other starts.
_BOOTSTRAP_STARTS = 6


@dataclass(frozen=True)
class SweptRuns:
    """The runs of one kind."""

    budgets: Array
    """(n,) nominal FLOPs: equal in runs of one budget."""
    sizes: Array
    """(n,) non-embedding parameters, N."""
    measures: Array
    """(n,) what the parametric law takes for size: M or N."""
    tokens: Array
    """(n,) D."""
    losses: Array
    """(n,) nats per token."""
    errors: Array
    """(n,) each loss's standard error as an estimate on the validation text; 0 where it is exact."""

    def groups(self) -> list[NDArray[np.intp]]:
        """The runs' numbers by budget, ascending."""
        return [np.flatnonzero(self.budgets == budget) for budget in np.unique(self.budgets)]


@dataclass(frozen=True)
class Optima:
    """The best sizes by budget, of K sets of losses."""

    log_sizes: Array
    """(K, G) log N at the parabola's lowest point within the swept sizes."""
    losses: Array
    """(K, G) the parabola there."""
    at_edge: NDArray[np.bool_]
    """(K, G) whether that point is the smallest or largest size: the optimum may lie beyond."""
    fitted: Array
    """(K, n) the parabolas at the runs."""


def parabola_optima(runs: SweptRuns, losses: Array) -> Optima:
    """Least-squares parabolas of the loss in log N, for every budget (Hoffmann et al. 2022, approach 2).

    Args:
        runs: at least three sizes for each budget.
        losses: (K, n).

    Raises:
        ValueError: a budget has fewer than three sizes.
    """
    groups = runs.groups()
    shape = (len(losses), len(groups))
    log_sizes, lowest, fitted = np.empty(shape), np.empty(shape), np.empty_like(losses)
    at_edge = np.empty(shape, dtype=bool)
    for number, members in enumerate(groups):
        x = np.log(runs.sizes[members])
        if len(np.unique(x)) < 3:
            raise ValueError(f"budget {runs.budgets[members[0]]:.3g}: a parabola needs three sizes, there are {len(x)}")
        centre = x.mean()
        design = np.vander(x - centre, 3)
        curve = losses[:, members] @ np.linalg.pinv(design).T
        fitted[:, members] = curve @ design.T
        low, high = x.min() - centre, x.max() - centre
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex = -curve[:, 1] / (2 * curve[:, 0])
        ends = np.stack([_polynomial(curve, low), _polynomial(curve, high)])
        lower_end = np.where(ends[0] < ends[1], low, high)
        inside = (curve[:, 0] > 0) & (vertex > low) & (vertex < high)
        best = np.where(inside, vertex, lower_end)
        log_sizes[:, number], at_edge[:, number] = best + centre, ~inside
        lowest[:, number] = _polynomial(curve, best)
    return Optima(log_sizes, lowest, at_edge, fitted)


def _polynomial(curve: Array, x: Array | float) -> Array:
    result: Array = curve[:, 0] * x**2 + curve[:, 1] * x + curve[:, 2]
    return result


def power_law(log_x: Array, log_y: Array) -> tuple[Array, Array]:
    """Least squares of log y = slope log x + intercept; log_x (G,), log_y (K, G); returns slopes and intercepts (K,)."""
    centred = log_x - log_x.mean()
    slopes = log_y @ centred / (centred @ centred)
    return slopes, log_y.mean(1) - slopes * log_x.mean()


def shared_slope_gap(log_x: Array, log_y: Array, log_other: Array) -> tuple[Array, Array]:
    """Two curves as power laws of one exponent: log_y and log_other (K, G), each about log_x (G,).

    Returns:
        The exponents (K,), negative where losses fall, and the factors (K,) by which x has to grow for the other curve to
        reach the first: exp of the distance along log x.
    """
    slopes, _ = power_law(log_x, (log_y + log_other) / 2)
    return slopes, np.exp((log_y - log_other).mean(1) / slopes)


def fit_law(runs: SweptRuns, losses: Array, huber: float, starts: Array) -> tuple[Array, Array]:
    """L = E + A / M^a + B / D^b: the least sum of Huber losses of log residuals, by Levenberg and Marquardt's method.

    Args:
        runs: for M and D.
        losses: (K, n).
        huber: threshold; residuals below it count squared, above it by their size.
        starts: (S, 5), from `law_starts` or found before: log E, log A', log B', a, b, where A' and B' are the two terms at
            the runs' geometric mean of M and D.

    Returns:
        The best parameters of each set (K, 5), as the starts are written, and their predicted losses (K, n).
    """
    x, y = _centred_logs(runs)
    count, many = len(losses), len(starts)
    goals = np.repeat(np.log(losses), many, axis=0)
    parameters = np.tile(starts, (count, 1)).astype(float)
    damping = np.full(len(parameters), 1e-2)
    cost = _huber_cost(np.log(_law_terms(parameters, x, y).sum(2)) - goals, huber)
    for _ in range(_LM_STEPS):
        terms = _law_terms(parameters, x, y)
        predicted = terms.sum(2)
        residuals = np.log(predicted) - goals
        jacobian = np.concatenate([terms, -terms[:, :, 1:2] * x[:, None], -terms[:, :, 2:3] * y[:, None]], axis=2)
        jacobian /= predicted[:, :, None]
        weighted = jacobian * np.minimum(1, huber / np.maximum(np.abs(residuals), 1e-300))[:, :, None]
        normal = np.swapaxes(weighted, 1, 2) @ jacobian
        gradient = (np.swapaxes(weighted, 1, 2) @ residuals[:, :, None])[:, :, 0]
        # A flat direction (a floor near 0, say) has no curvature of its own.
        scale = np.einsum("kii->ki", normal) + 1e-9
        steps = np.linalg.solve(normal + (damping[:, None] * scale)[:, :, None] * np.eye(5), gradient[:, :, None])
        tried = _bounded(parameters - np.clip(steps[:, :, 0], -1, 1), goals)
        new_cost = _huber_cost(np.log(_law_terms(tried, x, y).sum(2)) - goals, huber)
        better = new_cost < cost
        parameters = np.where(better[:, None], tried, parameters)
        gain = np.max((cost - new_cost)[better] / (cost[better] + 1e-300), initial=0.0)
        cost = np.where(better, new_cost, cost)
        damping = np.clip(np.where(better, damping * 0.3, damping * 5), 1e-9, 1e9)
        if gain < 1e-10 and damping.min() > 1e3:
            break
    best = cost.reshape(count, many).argmin(1)
    chosen = parameters.reshape(count, many, 5)[np.arange(count), best]
    return chosen, _law_terms(chosen, x, y).sum(2)


def law_starts(runs: SweptRuns) -> Array:
    """48 starts: floors and both exponents on a grid, what is above the floor shared equally."""
    lowest, mean = runs.losses.min(), runs.losses.mean()
    starts = []
    for floor in _START_FLOORS:
        half = np.log((mean - floor * lowest) / 2)
        starts += [(np.log(floor * lowest), half, half, a, b) for a in _START_EXPONENTS for b in _START_EXPONENTS]
    return np.array(starts)


def natural_law(runs: SweptRuns, parameters: Array) -> Array:
    """E, A, B, a, b (K, 5) from the parameters of `fit_law`."""
    centre_x, centre_y = np.log(runs.measures).mean(), np.log(runs.tokens).mean()
    floor, first, second, a, b = parameters.T
    return np.stack([np.exp(floor), np.exp(first + a * centre_x), np.exp(second + b * centre_y), a, b], axis=1)


def _centred_logs(runs: SweptRuns) -> tuple[Array, Array]:
    x, y = np.log(runs.measures), np.log(runs.tokens)
    return x - x.mean(), y - y.mean()


def _law_terms(parameters: Array, x: Array, y: Array) -> Array:
    """(K, n, 3): E, A / M^a and B / D^b at the runs."""
    floor, first, second, a, b = parameters.T
    exponents = [np.broadcast_to(floor[:, None], (len(floor), len(x))), first[:, None] - a[:, None] * x]
    return np.exp(np.stack([*exponents, second[:, None] - b[:, None] * y], axis=2))


def _bounded(parameters: Array, goals: Array) -> Array:
    """Terms of at most 20 times the largest loss and at least 1e-5 of the smallest; exponents in their range."""
    lowest, highest = goals.min() - np.log(1e5), goals.max() + np.log(20)
    return np.concatenate(
        [np.clip(parameters[:, :3], lowest, highest), np.clip(parameters[:, 3:], *_EXPONENTS)], axis=1
    )


def _huber_cost(residuals: Array, threshold: float) -> Array:
    size = np.abs(residuals)
    cost: Array = np.where(size <= threshold, size**2 / 2, threshold * (size - threshold / 2)).sum(1)
    return cost


def huber_threshold(residuals: Array, parameters: int = 5) -> float:
    """1.345 standard deviations of the residuals (n,), by their median size, for the parameters that were fitted to them."""
    count = len(residuals)
    spread = _MAD_TO_DEVIATION * np.median(np.abs(residuals)) * np.sqrt(count / max(1, count - parameters))
    return max(float(_HUBER_SCALES * spread), 1e-7)


def fit_one_law(runs: SweptRuns, huber: float | None) -> tuple[Array, Array, float]:
    """The law of measured losses from all starts: parameters (5,), predictions (n,), and the threshold that was used."""
    losses, starts = runs.losses[None], law_starts(runs)
    # A threshold above all residuals makes it least squares, whose residuals give the threshold.
    parameters, predicted = fit_law(runs, losses, 1.0, starts)
    threshold = huber or huber_threshold(np.log(predicted[0] / runs.losses))
    parameters, predicted = fit_law(runs, losses, threshold, np.concatenate([starts, parameters]))
    return parameters[0], predicted[0], threshold


def simulated_losses(runs: SweptRuns, fitted: Array, free: int, draws: int, random: np.random.Generator) -> Array:
    """Sweeps (draws, n) about fitted losses (n,): errors that all runs share, and scatter that the residuals show.

    How much of the standard errors is shared is not known. As residuals hold what is not, taking all of it as shared counts
    some of it twice: intervals may be too wide, not too narrow.

    Args:
        runs: for the losses and their errors.
        fitted: by a fit with n - free parameters.
        free: degrees of freedom that the residuals have; 0 where they tell nothing, and the errors stand for the scatter, too.
        draws: how many.
        random: for all draws.
    """
    shared = runs.errors * random.standard_normal((draws, 1))
    scatter = np.broadcast_to(runs.errors**2, (draws, len(fitted)))
    if free > 0:
        squares = ((runs.losses - fitted) ** 2).sum()
        scatter = (squares / random.chisquare(free, draws))[:, None]
    # A loss is above 0.
    return np.maximum(fitted + shared + np.sqrt(scatter) * random.standard_normal((draws, len(fitted))), 1e-3)


def bootstrapped_law(
    runs: SweptRuns, fit: tuple[Array, Array, float], draws: int, random: np.random.Generator
) -> Array:
    """Parameters (draws, 5) of laws fitted to simulated sweeps; `fit` is what `fit_one_law` found."""
    parameters, predicted, threshold = fit
    losses = simulated_losses(runs, predicted, len(predicted) - 5, draws, random)
    others = law_starts(runs)
    chosen = others[:: max(1, len(others) // _BOOTSTRAP_STARTS)]
    return fit_law(runs, losses, threshold, np.concatenate([parameters[None], chosen]))[0]
