"""Counter-based randomness: the scalar and tensor hashes agree, numbers are uniform, permutations are permutations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt import randomness
from lit_gpt.randomness import Stream

ANY_INT64 = st.integers(-(2**63), 2**63 - 1)


@given(keys=st.lists(ANY_INT64, max_size=4), last=ANY_INT64)
@settings(deadline=None)
def test_scalar_and_tensor_hash_have_the_same_bits(keys, last):
    expected = randomness.hash_int(*keys, last)
    assert int(randomness.hash_tensor(*keys, torch.tensor([last]))) % 2**64 == expected


def test_first_value_is_splitmix64s():
    # The first output of splitmix64 seeded with 0, as published with the generator.
    assert randomness.hash_int(0) == 0xE220A8397B1DCDAF


def test_seeds_that_torch_confuses_are_different():
    rows = torch.arange(4)
    first = randomness.uniform_grid(1, Stream.MASK, 0, rows, 8)
    assert not torch.equal(first, randomness.uniform_grid(1 + 2**32, Stream.MASK, 0, rows, 8))
    assert not torch.equal(
        randomness.uniform_grid(5 << 32, Stream.MASK, 0, rows, 8),
        randomness.uniform_grid(9 << 32, Stream.MASK, 0, rows, 8),
    )


def test_a_row_depends_on_its_own_number_only():
    whole = randomness.uniform_grid(3407, Stream.MASK, 7, torch.arange(16), 32)
    part = randomness.uniform_grid(3407, Stream.MASK, 7, torch.tensor([9, 2]), 32)
    assert torch.equal(part, whole[[9, 2]])
    longer = randomness.uniform_grid(3407, Stream.MASK, 7, torch.arange(16), 64)
    assert torch.equal(longer[:, :32], whole)


@pytest.mark.parametrize("stream", list(Stream))
def test_uniform_by_chi_squared(stream):
    draws = randomness.uniform_grid(3407, stream, 3, torch.arange(256), 256).flatten()
    assert draws.dtype == torch.float64 and float(draws.min()) >= 0 and float(draws.max()) < 1
    bins = 64
    counts = torch.bincount((draws * bins).long(), minlength=bins)
    expected = len(draws) / bins
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    # Mean 63, standard deviation 11.2: five of them.
    assert chi_squared < 63 + 5 * math.sqrt(2 * 63)


def test_neighbouring_steps_rows_and_streams_are_uncorrelated():
    rows = torch.arange(128)
    base = randomness.uniform_grid(0, Stream.MASK, 0, rows, 128)
    for other in (
        randomness.uniform_grid(0, Stream.MASK, 1, rows, 128),
        randomness.uniform_grid(0, Stream.MASK, 0, rows + 1, 128),
        randomness.uniform_grid(0, Stream.SAMPLER, 0, rows, 128),
        randomness.uniform_grid(1, Stream.MASK, 0, rows, 128),
    ):
        correlation = float(torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(base.numel())


@given(count=st.integers(1, 600), keys=st.lists(ANY_INT64, min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_permutation_hits_every_index_once(count, keys):
    assert sorted(randomness.permute_index(index, count, *keys) for index in range(count)) == list(range(count))


def test_permutation_of_a_huge_set_stays_inside_and_depends_on_its_keys():
    count = 10**12 + 39
    images = {randomness.permute_index(index, count, 1, 2) for index in range(200)}
    assert len(images) == 200 and all(0 <= image < count for image in images)
    assert images != {randomness.permute_index(index, count, 1, 3) for index in range(200)}


def test_permutations_of_three_are_all_about_equally_frequent():
    seen: dict[tuple[int, ...], int] = {}
    for key in range(6000):
        order = tuple(randomness.permute_index(index, 3, key) for index in range(3))
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 6 and min(seen.values()) > 600


def test_every_index_goes_everywhere_equally_often():
    count, keys = 10, 4000
    hits = torch.zeros(count, count)
    for key in range(keys):
        for index in range(count):
            hits[index, randomness.permute_index(index, count, key)] += 1
    expected = keys / count
    chi_squared = float(((hits - expected) ** 2 / expected).sum())
    # 81 degrees of freedom: 0.0001 of all draws lie above.
    assert chi_squared < 140
