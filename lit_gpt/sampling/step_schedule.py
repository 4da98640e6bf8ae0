"""When each row of a batch is denoised: its block, and the times between which its next step leads.

Every row has its own block and step, so that a batch-mate changes nothing, not even when a cache is computed anew. All of
it is on the device, and nothing here waits for it but the construction.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LAST_TIME = 1e-5
"""Where the published time grid ends: t = linspace(1, 1e-5, steps + 1) (SMDM's sampling code)."""
_NO_BLOCK = -1
"""The block of a position that is given or padding."""


class StepSchedule:
    """Each row's block, and its step within the block.

    Attributes:
        block_of: (B, T) int64, the number of each position's block.
        block: (B,) int64, the block that each row denoises.
        unfinished: (B,) bool, rows that have anything left to do.
    """

    def __init__(self, free: Tensor, steps: Callable[[int], int], block_length: int, full_blocks: bool) -> None:
        """Before the first step.

        Args:
            free: (B, T) bool, the positions to denoise.
            steps: a row's free positions to the steps of the whole row, shared evenly by its blocks.
            block_length: positions of a block; 0 is all.
            full_blocks: a block ends with the last of its steps, not with the last of its masks.
        """
        counts = free.sum(1).tolist()
        block_length = block_length or max(1, *counts)
        row_steps = [-(-steps(count) // max(1, -(-count // block_length))) for count in counts]
        times = torch.zeros(len(counts), max(row_steps) + 1)
        for row, own in enumerate(row_steps):
            # float32, as published: the greedy count int(n (1 - s / t)) depends on it. The last step leads to 0.
            times[row, :own] = torch.linspace(1, _LAST_TIME, own + 1)[:-1]
        self._times, self._last_step = times.to(free.device), torch.tensor(row_steps).to(free.device) - 1
        self._full_blocks = full_blocks
        self.block_of = torch.where(free, (free.cumsum(1) - 1) // block_length, _NO_BLOCK)
        self.block, self._step, self._forward_passes = torch.zeros_like(self._last_step).expand(3, -1)
        self.unfinished = torch.ones_like(self.block, dtype=torch.bool)

    def advance(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Begin a step of every row, in its next block if it has done its own.

        Args:
            masked: (B, T) bool.

        Returns:
            The times t and s, (B,) float32, between which the step leads.
        """
        later = masked & (self.block_of > self.block[:, None])
        done = self._step > self._last_step if self._full_blocks else ~(masked & self.in_block()).any(1)
        self.unfinished = later.any(1) | ~done
        move = done & later.any(1)
        next_block = torch.where(later, self.block_of, masked.size(1)).amin(1)
        self.block = torch.where(move, next_block, self.block)
        self._step, self._forward_passes = self._step.masked_fill(move, 0), self._forward_passes.masked_fill(move, 0)
        # A row that is finished stays at its last step.
        index = torch.minimum(self._step, self._last_step)[:, None]
        self._step = self._step + 1
        return self._times.gather(1, index)[:, 0], self._times.gather(1, index + 1)[:, 0]

    def regroup(self, kept: Tensor, joined: StepSchedule | None) -> None:
        """Go on with some rows (n,) alone, and with those of another schedule behind them."""
        steps = self._times.size(1) if joined is None else max(self._times.size(1), joined._times.size(1))
        for name in ("_times", "_last_step", "block_of", "block", "_step", "_forward_passes", "unfinished"):
            parts = [getattr(self, name)[kept]] + ([] if joined is None else [getattr(joined, name)])
            if name == "_times":
                parts = [torch.nn.functional.pad(part, (0, steps - part.size(1))) for part in parts]
            setattr(self, name, torch.cat(parts))

    def in_block(self) -> Tensor:
        """(B, T) bool: the positions of each row's block."""
        return self.block_of == self.block[:, None]

    def recomputed(self, candidates: Tensor, cache: str, refresh: int) -> Tensor:
        """The positions whose keys and values a cache must compute anew in this step; counts the forward pass.

        Args:
            candidates: (B, T) bool, the positions that are predicted.
            cache: `dual`, which computes each row's block, `prefix`, all from the block on, or `none`, everything.
            refresh: compute everything again after so many forward passes; 0 only at each block's start.

        Returns:
            (B, T) bool; all of a row where its keys and values are computed anew.
        """
        if cache == "none":
            return torch.ones_like(candidates)
        passes = self._forward_passes % refresh if refresh else self._forward_passes
        self._forward_passes = self._forward_passes + candidates.any(1)
        changing = self.in_block() if cache == "dual" else self.block_of >= self.block[:, None]
        return changing | (passes == 0)[:, None]
