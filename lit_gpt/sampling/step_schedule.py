"""Where each row of a denoising stands in time, and how much is left to write: what the host knows by itself.

Decisions: every row has its own clock (block, step within the block, times), so a batch-mate changes nothing, not even
when a cache is read anew. How many positions a step writes follows from the clock, which ones they are may be known to
the device alone; so this is NumPy on the host, and nothing here ever waits for the device. Imports nothing of the package.

B rows, T tokens, P blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Flags = NDArray[np.bool_]
Counts = NDArray[np.int64]
Times = NDArray[np.float32]

NOWHERE = -1
"""The block of a position that is not to be written."""
_LAST_TIME = 1e-5
"""Where the published time grid ends: linspace(1, 1e-5, steps + 1)."""


class Clock:
    """Each row's block and step, and the masked positions of each of its blocks.

    Attributes:
        rank: (B, T), the number of a free position within its row.
        block_of: (B, T), the number of its block; NOWHERE where a position is given or padding.
        block: (B,), the block that each row is writing.
        missing: (B, P), positions of each block that are not written.
    """

    def __init__(self, free: Flags, steps: int, block_length: int, remask: bool) -> None:
        """Before the first step.

        Args:
            free: (B, T), what is to be written.
            steps: of a whole row, shared evenly by its blocks.
            block_length: positions of a block; 0 is all.
            remask: what is written may be masked again until its block's last step is done.
        """
        counts = free.sum(1)
        block_length = block_length or max(1, int(counts.max()))
        blocks = np.maximum(-(-counts // block_length), 1)
        self.rank = free.cumsum(1) - 1
        self.block_of = np.where(free, self.rank // block_length, NOWHERE)
        self.missing = np.zeros((len(free), int(blocks.max())), dtype=np.int64)
        self.see(~free)
        self.block, self._step, self._readings = np.zeros((3, len(free)), dtype=np.int64)
        self._remask = remask
        own_steps = -(-steps // blocks)
        self._last_step = own_steps - 1
        # float32, as published: the greedy count int(n (1 - s / t)) depends on it.
        self._times = np.zeros((len(free), int(own_steps.max()) + 1), dtype=np.float32)
        for row, own in enumerate(own_steps.tolist()):
            self._times[row, : own + 1] = torch.linspace(1, _LAST_TIME, own + 1).numpy()

    def see(self, written: Flags) -> None:
        """Count what is missing, given what is written, (B, T)."""
        missing = (self.block_of != NOWHERE) & ~written
        rows = np.nonzero(missing)[0]
        size = self.missing.size
        self.missing = np.bincount(rows * self.missing.shape[1] + self.block_of[missing], minlength=size).reshape(
            self.missing.shape
        )

    def wrote(self, count: Counts) -> None:
        """Take note that so many positions, (B,), of each row's block have been written."""
        self.missing[np.arange(len(count)), self.block] -= count

    @property
    def masked(self) -> Counts:
        """(B,): positions of each row's block that are not written."""
        return self.missing[np.arange(len(self.block)), self.block]

    def turn(self) -> bool:
        """Move every row whose block is done to its next one; False when nothing is left."""
        over = self._step > self._last_step if self._remask else self.masked == 0
        later = np.arange(self.missing.shape[1]) > self.block[:, None]
        more = (self.missing * later).any(1)
        move = over & more
        while move.any():
            self.block = self.block + move
            self._step, self._readings = np.where(move, 0, self._step), np.where(move, 0, self._readings)
            move = move & (self.masked == 0)
        return bool((more | ~over).any())

    def tick(self) -> tuple[Times, Times]:
        """One step of every row: the times (B,) from which and to which it leads, 0 for the end of the last one."""
        rows, index = np.arange(len(self._step)), np.minimum(self._step, self._last_step)
        t, s = self._times[rows, index], self._times[rows, index + 1]
        s = np.where(self._step >= self._last_step, np.float32(0), s)
        self._step = self._step + 1
        return t, s

    def own_block(self) -> Flags:
        """(B, T): the free positions of each row's block."""
        return self.block_of == self.block[:, None]

    def window(self, reading: Flags, dual: bool, refresh: int) -> Flags | None:
        """What a cache must compute anew in this step, and count the reading.

        Args:
            reading: (B,), rows of which anything is read.
            dual: only the block, else all from it on.
            refresh: read everything again after so many readings; 0 only at each block's start.

        Returns:
            (B, T); None for everything.
        """
        anew = (self._readings % refresh if refresh else self._readings) == 0
        self._readings = self._readings + reading
        if anew.all():
            return None
        own = self.own_block() if dual else self.block_of >= self.block[:, None]
        return own | anew[:, None]
