"""Counter-based randomness: every random number of a run is a hash of where it is used.

A draw is a pure function of (seed, stream, counters...), so no generator has a state that a resume, another number of
processes or another batch could put out of step. The hash is splitmix64 (Steele, Lea & Flood 2014) chained over the
counters, in wrapping int64 tensor operations that give the same bits on every device; torch's own CPU generator keeps
only 32 bits of its seed.

B rows, T columns.
"""

from __future__ import annotations

import functools
from enum import IntEnum

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
# The three constants of splitmix64.
_GAMMA = 0x9E3779B97F4A7C15
_MUL1 = 0xBF58476D1CE4E5B9
_MUL2 = 0x94D049BB133111EB


class Stream(IntEnum):
    """What a random number is for; two purposes never share numbers. Values are part of what makes a run repeatable."""

    DIFFUSION_TIME = 1
    TIME_STRATA = 2
    MASK = 3
    RANDOM_LENGTH = 4
    DATA_ORDER = 5
    DATA_MIXTURE = 6
    SAMPLER = 7
    PROMPT_DROP = 8
    VALIDATION = 9
    LIKELIHOOD = 10


def hash_int(*keys: int) -> int:
    """Hash whole numbers to one in [0, 2**64): the scalar twin of `hash_tensor`.

    Args:
        *keys: any integers; they are taken modulo 2**64, order matters.
    """
    state = 0
    for key in keys:
        state = _mix(state ^ (key & _MASK64))
    return state


def hash_tensor(*keys: int | Tensor) -> Tensor:
    """Hash whole numbers elementwise, with broadcasting.

    Args:
        *keys: integers or int64 tensors, at least one tensor; order matters.

    Returns:
        int64 tensor of the broadcast shape; its 64 bits equal `hash_int` of the same keys.
    """
    position = next(index for index, key in enumerate(keys) if isinstance(key, Tensor))
    lead = [key for key in keys[:position] if not isinstance(key, Tensor)]
    state = torch.full_like(torch.as_tensor(keys[position]), _signed(hash_int(*lead)))
    for key in keys[position:]:
        z = (state ^ (key if isinstance(key, Tensor) else _signed(key & _MASK64))) + _signed(_GAMMA)
        z = (z ^ _shift_right(z, 30)) * _signed(_MUL1)
        z = (z ^ _shift_right(z, 27)) * _signed(_MUL2)
        state = z ^ _shift_right(z, 31)
    return state


def uniform(*keys: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1): the upper 53 bits of `hash_tensor(*keys)`, float64, same shape."""
    return _shift_right(hash_tensor(*keys), 11).to(torch.float64) * 2.0**-53


def uniform_grid(seed: int, stream: Stream, step: int, rows: Tensor, columns: int) -> Tensor:
    """Uniform numbers in [0, 1) for every column of some rows.

    Args:
        seed: the run's seed.
        stream: the purpose.
        step: any counter shared by all rows (the optimizer step, a draw's number).
        rows: (B,) int64, each row's own number; the result for a row depends on no other row.
        columns: T.

    Returns:
        (B, T) float64.
    """
    column = torch.arange(columns, device=rows.device)
    return uniform(seed, int(stream), step, rows[:, None], column[None, :])


def permute_index(index: int, count: int, *keys: int) -> int:
    """The image of `index` under a pseudo-random permutation of range(count), in O(1) memory.

    A Feistel network on the smallest even number of bits that holds count, walked until it lands below count (cycle
    walking, Black & Rogaway 2002): under four walks on average. Four rounds are measurably uneven at small counts; six
    are not.

    Args:
        index: in [0, count).
        count: size of the set.
        *keys: integers that choose the permutation.
    """
    assert 0 <= index < count
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    round_keys = _round_keys(keys)
    while True:
        left, right = index >> half, index & mask
        for key in round_keys:
            left, right = right, left ^ (_mix(key ^ right) & mask)
        index = left << half | right
        if index < count:
            return index


@functools.lru_cache(maxsize=64)
def _round_keys(keys: tuple[int, ...]) -> tuple[int, ...]:
    """The six keys of a permutation; an epoch uses one set of them throughout."""
    return tuple(hash_int(*keys, number) for number in range(6))


def _mix(state: int) -> int:
    """One step of splitmix64 on a 64-bit number."""
    z = state + _GAMMA & _MASK64
    z = (z ^ (z >> 30)) * _MUL1 & _MASK64
    z = (z ^ (z >> 27)) * _MUL2 & _MASK64
    return z ^ (z >> 31)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) shift of 64-bit values held as int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
