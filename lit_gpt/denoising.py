"""Masked-diffusion sampling: how a canvas is revealed, step by step.

Decisions: every row has its own clock (block, step within the block, times), so a batch-mate changes nothing, not even
when a cache is read anew; a step that reveals nothing is not computed; the model is asked for the logits of those
positions only that the step may reveal. May import algorithms, canvas, drawing, noise and reading.

B rows, T tokens, N positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_gpt.algorithms import ALGORITHMS, Candidates, greedy_count
from lit_gpt.canvas import Canvas, State
from lit_gpt.drawing import Drawing, Drawn, draw
from lit_gpt.noise import Stream, uniform
from lit_gpt.reading import LogitsFn, ReadBatch

if TYPE_CHECKING:
    from lit_gpt.sampling import Sampling

_LAST_TIME = 1e-5
"""Where the published time grid ends (SPEC 2)."""
TOKEN = 0
"""What a random number is for, in the place of its last key; these two decide what `origin` reveals and masks again."""
_REVEAL, _REMASK = -1, -2


@torch.no_grad()
def denoise(logits_fn: LogitsFn, canvas: Canvas, sampling: Sampling, vocab_size: int) -> Iterator[State]:
    """Reveal a canvas block by block, each block over t = linspace(1, 1e-5, steps + 1).

    Args:
        logits_fn: logits of chosen positions from the whole canvas, see `sampling.mdm_logits`.
        canvas: what to fill; [MASK] is wherever a token is neither given nor padding.
        sampling: algorithm, steps and everything else.
        vocab_size: K; ids from here on are never sampled.

    Yields:
        The state before the first step, then one after each.

    Raises:
        ValueError: the model's logits are no finite numbers.
    """
    board = _Board(logits_fn, canvas, sampling, vocab_size)
    yield board.state(0)
    step = 0
    while board.turn():
        board.advance(step)
        step += 1
        yield board.state(step)


class _Board:
    """A canvas while it is being written.

    Attributes:
        free: (B, T) bool, what is to be written; written: what is.
        rank, block_of: (B, T) int64, the number of a free position within its row, and of its block.
        block_number, step, age: (B,) int64, each row's clock: block, step within it, readings of it.
        live: (B,) bool, rows that are not done.
        times: (B, steps of a block + 1) float32, each row's times.
    """

    def __init__(self, logits_fn: LogitsFn, canvas: Canvas, sampling: Sampling, vocab_size: int) -> None:
        self.logits_fn, self.canvas, self.sampling, self.vocab_size = logits_fn, canvas, sampling, vocab_size
        self.input_ids, self.confidence = canvas.input_ids.clone(), canvas.prompt_mask.float()
        self.free = canvas.key_mask & ~canvas.prompt_mask
        self.written = torch.zeros_like(self.free)
        self.rank = self.free.cumsum(1) - 1
        self.key_mask = canvas.attention_mask()
        counts = self.free.sum(1)
        block_length = sampling.block_length or max(1, int(counts.max()))
        self.block_of = self.rank // block_length
        blocks = (-(-counts // block_length)).clamp(min=1)
        steps = (-(-sampling.steps // blocks)).tolist()
        # float32, as published: the greedy count int(n (1 - s / t)) depends on it.
        self.times = torch.zeros(len(steps), max(steps) + 1, device=counts.device)
        for row, own in enumerate(steps):
            self.times[row, : own + 1] = torch.linspace(1, _LAST_TIME, own + 1)
        self.last_step = torch.tensor(steps, device=counts.device) - 1
        self.block_number, self.step = torch.zeros_like(counts), torch.zeros_like(counts)
        self.age = torch.zeros_like(counts)
        self.live = counts > 0

    @property
    def block(self) -> Tensor:
        """(B, T) bool: each row's current block."""
        return self.free & (self.block_of == self.block_number[:, None])

    def state(self, step: int) -> State:
        """What stands there now."""
        return State(step, self.input_ids.clone(), self.confidence.clone(), self.canvas.key_mask)

    def turn(self) -> bool:
        """Move every row whose block is done to its next one; False when nothing is left."""
        missing = self.free & ~self.written
        if self.sampling.remask:
            # What is written may be masked again until a block's last step is done.
            over = self.step > self.last_step
            more = (self.free & (self.block_of > self.block_number[:, None])).any(1)
            live = more | ~over
        else:
            over = ~(missing & self.block).any(1)
            live = missing.any(1)
        move = over & live
        while bool(move.any()):
            self.block_number = self.block_number + move
            self.step, self.age = self.step.masked_fill(move, 0), self.age.masked_fill(move, 0)
            move = move & ~(missing & self.block).any(1)
        self.live = live
        return bool(live.any())

    def advance(self, number: int) -> None:
        """One step of every row: `number` counts them for the random numbers."""
        sampling, algorithm = self.sampling, ALGORITHMS[self.sampling.algorithm]
        mask = self.block & ~self.written & self.live[:, None]
        last = self.step >= self.last_step
        index = torch.minimum(self.step, self.last_step)[:, None]
        t, s = (self.times.gather(1, at).squeeze(1) for at in (index, index + 1))
        fraction = torch.where(last, 1.0, 1 - s / t)
        if algorithm is None:
            where = self._origin(number, mask, t, torch.where(last, 0.0, s))
        elif sampling.algorithm == "greedy":
            # A row that reveals nothing in this step need not be read.
            where = mask & (greedy_count(mask, fraction) > 0)[:, None]
        else:
            where = mask
        self.step = self.step + 1
        if not bool(where.any()):
            return
        drawn = self._read(number, where)
        shape = where.shape
        token_ids, confidence = (
            self.input_ids.clone(),
            torch.full(shape, -1.0, dtype=torch.float64, device=where.device),
        )
        token_ids[where], confidence[where] = drawn.token_ids, drawn.confidence
        revealed = where
        if algorithm is not None:
            entropy = torch.full(shape, torch.inf, device=where.device)
            if drawn.entropy is not None:
                entropy[where] = drawn.entropy
            care = sampling.threshold if sampling.algorithm == "threshold" else sampling.entropy_bound
            revealed = algorithm(Candidates(where, confidence, entropy, fraction, care)) | (where & last[:, None])
        self.input_ids = torch.where(revealed, token_ids, self.input_ids)
        self.confidence = torch.where(revealed, confidence.float(), self.confidence)
        self.written = self.written | revealed
        if sampling.early_stop and sampling.stop_id is not None:
            self._stop_early(sampling.stop_id)

    def _origin(self, number: int, mask: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """What `origin` reveals, and with remasking what it masks again, before the model is read.

        A masked position is revealed with probability 1 - s / t. ReMDM-cap (Wang et al. 2025, arXiv 2503.00307) masks a
        written one again with probability sigma = min(remask, s / (1 - t)) and reveals a masked one with probability
        ((1 - s) - (1 - sigma) (1 - t)) / t, which leaves the share of masked positions at every time what it was.
        """
        uniforms = self._uniforms(number, _REVEAL)
        if not self.sampling.remask:
            # The published expression to the last bit.
            return mask & (uniforms < torch.where(s > 0, 1 - s / t, 1.0)[:, None])
        sigma = torch.where(t < 1, torch.minimum(torch.full_like(s, self.sampling.remask), s / (1 - t)), 0.0)
        reveal = torch.where(s > 0, ((1 - s) - (1 - sigma) * (1 - t)) / t, 1.0)
        again = self.written & self.block & (self._uniforms(number, _REMASK) < sigma[:, None]) & self.live[:, None]
        self.input_ids = torch.where(again, self.canvas.input_ids, self.input_ids)
        self.confidence = self.confidence.masked_fill(again, 0.0)
        self.written = self.written & ~again
        return mask & (uniforms < reveal[:, None])

    def _read(self, number: int, where: Tensor) -> Drawn:
        """The model's tokens at some positions."""
        sampling, window = self.sampling, None
        if sampling.cache != "none":
            anew = self.age == 0
            if sampling.refresh:
                anew = self.age % sampling.refresh == 0
            self.age = self.age + where.any(1)
            if not bool(anew.all()):
                later = self.free & (self.block_of >= self.block_number[:, None])
                window = (self.block if sampling.cache == "dual" else later) | anew[:, None]
        flat = where.flatten().nonzero().squeeze(1)
        batch = ReadBatch(
            self.input_ids, self.key_mask, self.canvas.prompt_mask, flat, self.canvas.positions, window=window
        )
        forbidden = None
        if sampling.min_new_tokens and sampling.stop_id is not None:
            forbidden = (self.rank < sampling.min_new_tokens)[where], sampling.stop_id
        uniforms = self._uniforms(number, TOKEN)[where]
        how = Drawing(sampling.temperature, sampling.top_k, sampling.top_p)
        chunks = self.logits_fn(batch)
        return draw(chunks, uniforms, how, self.vocab_size, forbidden, sampling.algorithm == "entropy")

    def _stop_early(self, stop: int) -> None:
        """Fill what stands behind an end token that has nothing masked before it."""
        open_before = (self.free & ~self.written).cumsum(1) > 0
        ended = (self.free & self.written & (self.input_ids == stop) & ~open_before).cumsum(1) > 0
        rest = self.free & ~self.written & ended
        self.input_ids = self.input_ids.masked_fill(rest, stop)
        self.written = self.written | rest

    def _uniforms(self, number: int, purpose: int) -> Tensor:
        """(B, T) float64: one random number per position."""
        canvas = self.canvas
        return uniform(self.sampling.seed, int(Stream.SAMPLER), number, canvas.rows[:, None], canvas.positions, purpose)
