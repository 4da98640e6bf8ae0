"""Ranges of steps against the sets that they stand for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.training import skipped_steps

ranges = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)).map(lambda pair: [pair[0], sum(pair)]), max_size=5)


def members(found):
    return {step for first, last in found for step in range(first, last + 1)}


@given(ranges, ranges, st.integers(0, 40), st.integers(0, 40))
def test_ranges_are_sets(one, other, begin, end):
    both = skipped_steps.union(one, other)
    assert members(both) == members(one) | members(other)
    assert all(before[1] + 1 < after[0] for before, after in zip(both, both[1:], strict=False))
    assert list(skipped_steps.others(both, range(begin, end))) == [
        step for step in range(begin, end) if step + 1 not in members(both)
    ]
    assert skipped_steps.count(both, end) == len([step for step in members(both) if step <= end])
    outside = sorted(step for step in members(one) - members(other) if step <= end)
    assert skipped_steps.first_outside(skipped_steps.union(one), skipped_steps.union(other), end) == (
        outside[0] if outside else None
    )


def test_parsing():
    assert skipped_steps.parse_ranges(["7", "5120-5130,9", "8"]) == [[7, 9], [5120, 5130]]
    assert skipped_steps.parse_ranges([]) == []
