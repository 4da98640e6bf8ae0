"""Steps that a run passes over: their data is not read, the weights stay as they are, the schedule goes on.

Kept as ranges `[first, last]` of step numbers from 1, as the log counts them, sorted and apart from each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Ranges = list[list[int]]


def parse_ranges(words: Sequence[str]) -> Ranges:
    """Read `--skip_steps`: `7`, `5120-5130`, several with commas or as words.

    Raises:
        ValueError: something else, or a range that ends before it begins.
    """
    found = []
    for word in ",".join(words).split(",") if words else ():
        match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(f"--skip_steps {word}: expected a step from 1, or a range such as 5120-5130")
        found.append([first, last])
    return union(found)


def union(*parts: Iterable[Sequence[int]]) -> Ranges:
    """All steps of several lists of ranges."""
    merged: Ranges = []
    for first, last in sorted((first, last) for ranges in parts for first, last in ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return merged


def first_outside(wanted: Ranges, inside: Ranges, until: int) -> int | None:
    """The first step of `wanted`, up to `until`, that is not in `inside`; None if all are."""
    for first, last in wanted:
        step = first
        while step <= min(last, until):
            covering = next((end for start, end in inside if start <= step <= end), None)
            if covering is None:
                return step
            step = covering + 1
    return None


def count(skipped: Ranges, until: int) -> int:
    """How many steps up to this one are passed over."""
    return sum(max(0, min(last, until) - first + 1) for first, last in skipped)


def others(skipped: Ranges, steps: range) -> Iterable[int]:
    """The steps, counted from 0 as in the code, that are not passed over."""
    start = steps.start
    for first, last in skipped:
        yield from range(start, min(first - 1, steps.stop))
        start = max(start, last)
    yield from range(start, steps.stop)
