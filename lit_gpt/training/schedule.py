"""From a compute budget to steps, and from a step to a learning rate: plain arithmetic on numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

MOST_STEPS = 10**12
"""Of a run: 31 years at a step a millisecond; the number of a sample stays far below 2**63."""


def budget_steps(flops: float, size_in_millions: float, global_batch_size: int, tokens_per_sample: float) -> int:
    """Optimizer steps that a budget pays for: int(F / (6 N B T)), the paper's rule C = 6ND (Hoffmann et al. 2022).

    Args:
        flops: in units of 1e18.
        size_in_millions: non-embedding parameters, exact.
        global_batch_size: sequences a step, over all nodes.
        tokens_per_sample: mean length of a sequence.

    Raises:
        ValueError: the budget does not pay for one step, or for more than can be counted.
    """
    # 1e18 / 1e6 leaves 1e12; this order of operations is the published code's, so its rounding is too.
    steps_paid = flops * 1e12 / (6 * size_in_millions * global_batch_size * tokens_per_sample)
    if steps_paid > MOST_STEPS:
        raise ValueError(f"--flops {flops:g} (in 1e18) pays for {steps_paid:.3g} steps: at most {MOST_STEPS:g}")
    steps = int(steps_paid)
    if steps < 1:
        per_step = budget_flops(1, size_in_millions, global_batch_size, tokens_per_sample)
        raise ValueError(f"--flops {flops:g} (in 1e18) does not pay for one step, which costs {per_step:.3g}")
    return steps


def budget_flops(steps: int, size_in_millions: float, global_batch_size: int, tokens_per_sample: float) -> float:
    """The budget in 1e18 that `steps` use up: the inverse of `budget_steps`."""
    return steps * 6 * size_in_millions * global_batch_size * tokens_per_sample / 1e12


def mean_random_length(block_size: int, ssl_ratio: float) -> float:
    """Mean length when a share `ssl_ratio` of the groups has a length uniform in [1, block_size]."""
    return block_size * (1 - ssl_ratio) + (block_size + 1) / 2 * ssl_ratio


def default_warmup(max_steps: int) -> int:
    """Linear warmup of the published runs: 1 % of the steps, at least 100."""
    return max(100, max_steps // 100)


def learning_rate(
    step: int, max_steps: int, warmup_steps: int, peak: float, floor: float, extended_from: int | None = None
) -> float:
    """Linear from 0 to `peak`, then a cosine down to `floor` at `max_steps`.

    A run that was extended follows the cosine of all its steps; from `floor`, where it had ended, the rate rises to
    that cosine as slowly as in the first warmup, since a jump unsettles what the end of a cosine has settled.

    Args:
        step: optimizer step, counted from 1.
        max_steps: the run's last step.
        warmup_steps: the step at which `peak` is reached.
        peak: highest learning rate.
        floor: last learning rate, also beyond max_steps.
        extended_from: the step at which the run had been finished before it was extended; None: it was not.
    """
    if extended_from is not None and extended_from < step < extended_from + warmup_steps:
        rising = floor + (peak - floor) * (step - extended_from) / warmup_steps
        return min(rising, learning_rate(step, max_steps, warmup_steps, peak, floor))
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step > max_steps:
        return floor
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return floor + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - floor)


def parse_row_lengths(words: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """`16:300` and `32:600` (rows of 16 tokens up to step 300, then 32 up to 600) as (length, step) pairs.

    Raises:
        ValueError: a word is no such pair, or lengths or steps do not rise.
    """
    pairs = []
    for word in ",".join(words).split(",") if words else ():
        length, colon, step = word.partition(":")
        if not (colon and length.isdecimal() and step.isdecimal() and int(length) and int(step)):
            raise ValueError(f"--row_lengths {word}: expected LENGTH:STEP, such as 16:300")
        pairs.append((int(length), int(step)))
    for before, after in itertools.pairwise(pairs):
        if not (before[0] < after[0] and before[1] < after[1]):
            raise ValueError(f"--row_lengths {','.join(words)}: lengths and steps must rise")
    return tuple(pairs)


def row_length(step: int, row_lengths: Sequence[tuple[int, int]], block_size: int) -> int:
    """Tokens of a row in a step (from 0): that of the first pair whose step is not reached, the block behind the last."""
    return next((length for length, until in row_lengths if step < until), block_size)
