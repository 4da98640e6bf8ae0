"""The number of steps after which one kind of model is as good as another one: a search over whole runs."""

from __future__ import annotations

from collections.abc import Callable

# An interpolated guess stays so far away from both ends, so that a bent curve still narrows the interval.
_NEAREST_TO_AN_END = 0.1


def match_loss(
    loss_after: Callable[[int], float], target: float, start: int, tolerance: float, most_runs: int
) -> dict[int, float]:
    """Train with different numbers of steps until a loss is near a target.

    Doubles or halves until the target is between two runs, then interpolates the loss over the logarithm of the steps.

    Args:
        loss_after: the final loss of a whole run of so many steps; falls with them.
        target: the loss to be met, nats.
        start: steps of the first run.
        tolerance: nats; the search ends within it.
        most_runs: it ends after so many, too.

    Returns:
        The losses by steps, the nearest to the target first.
    """
    found: dict[int, float] = {}
    steps = start
    while len(found) < most_runs and steps not in found:
        loss = found[steps] = loss_after(steps)
        if abs(loss - target) <= tolerance:
            break
        shorter = max((known for known, value in found.items() if value > target), default=None)
        longer = min((known for known, value in found.items() if value <= target), default=None)
        if shorter is None or longer is None:
            steps = 2 * steps if longer is None else max(1, steps // 2)
            continue
        share = (found[shorter] - target) / (found[shorter] - found[longer])
        share = min(max(share, _NEAREST_TO_AN_END), 1 - _NEAREST_TO_AN_END)
        steps = max(1, round(shorter * (longer / shorter) ** share))
    return dict(sorted(found.items(), key=lambda run: abs(run[1] - target)))
