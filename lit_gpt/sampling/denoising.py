"""Masked-diffusion sampling: how a canvas is revealed, step by step.

Decisions: the canvas is on the device, each row's clock on the host (`clock`), and no step waits for the device where
the schedule decides how much is written: the host knows how many positions are read, and what `origin` picks at random,
since random numbers are the same everywhere. A step that reveals nothing is not computed; the model is asked for the
logits of those positions only that the step may reveal. May import algorithms, canvas, clock, drawing, noise and reading.

B rows, T tokens, N positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lit_gpt.model.logits import LogitsBatch, LogitsFn
from lit_gpt.randomness import Stream, uniform
from lit_gpt.sampling.algorithms import ALGORITHMS, Candidates, greedy_count
from lit_gpt.sampling.categorical import Drawing, Drawn, draw
from lit_gpt.sampling.sequence import Canvas, State
from lit_gpt.sampling.step_schedule import NOWHERE, Clock, Counts, Flags, Times

if TYPE_CHECKING:
    from lit_gpt.sampling.settings import Sampling

TOKEN = 0
"""What a random number is for, in the place of its last key; these two decide what `origin` reveals and masks again."""
_REVEAL, _REMASK = -1, -2


@torch.no_grad()
def denoise(
    logits_fn: LogitsFn, canvas: Canvas, sampling: Sampling, vocab_size: int, stop_id: int | None = None
) -> Iterator[State]:
    """Reveal a canvas block by block, each block over t = linspace(1, 1e-5, steps + 1).

    The steps of `origin` and `greedy` are handed to the device without waiting for it. `threshold`, `entropy` and early
    stopping let the model decide how much is left to do: there one small transfer a step tells the host. That all logits
    were finite numbers is looked at once, after the last step, and whenever a state's tokens are.

    Args:
        logits_fn: logits of chosen positions from the whole canvas, see `sampling.mdm_logits`.
        canvas: what to fill; [MASK] is wherever a token is neither given nor padding.
        sampling: algorithm, steps and everything else.
        vocab_size: K; ids from here on are never sampled.
        stop_id: the end token, which early stopping needs.

    Yields:
        The state before the first step, then one after each.

    Raises:
        ValueError: the model's logits are no finite numbers.
    """
    board = _Board(logits_fn, canvas, sampling, vocab_size, stop_id)
    yield board.state(0)
    step = 0
    while board.clock.turn():
        board.advance(step)
        step += 1
        yield board.state(step)
    board.state(step).check()


class _Board:
    """A canvas while it is being written.

    Attributes:
        clock: each row's time, on the host.
        done: (B, T) on the host, False where something is to be written; kept for `origin`, which needs it.
        written: (B, T) bool on the device, the same for every algorithm.
        block_of: (B, T) int64 on the device, as the clock's.
        early: (B * T,) bool on the device, where no end token may stand.
        finite: scalar bool on the device, whether all logits so far were finite numbers.
    """

    def __init__(
        self, logits_fn: LogitsFn, canvas: Canvas, sampling: Sampling, vocab_size: int, stop_id: int | None
    ) -> None:
        self.stop_id = stop_id
        self.logits_fn, self.canvas, self.sampling, self.vocab_size = logits_fn, canvas, sampling, vocab_size
        self.device = canvas.input_ids.device
        self.origin = sampling.algorithm == "origin"
        self.asks = sampling.early_stop or sampling.algorithm in ("threshold", "entropy")
        self.host = canvas.cpu()
        free = (self.host.key_mask & ~self.host.prompt_mask).numpy()
        self.clock = Clock(free, sampling.steps, sampling.block_length, sampling.remask > 0)
        self.done: Flags = ~free
        self.key_mask = None if self.host.attention_mask() is None else canvas.key_mask
        self.input_ids, self.confidence = canvas.input_ids, canvas.prompt_mask.float()
        self.block_of = self._to_device(self.clock.block_of)
        self.written = self.block_of == NOWHERE
        self.early = self._to_device(self.clock.rank < sampling.min_new_tokens).flatten()
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)

    def state(self, step: int) -> State:
        """What stands there now."""
        return State(step, self.input_ids, self.confidence, self.canvas.key_mask, self.finite)

    def advance(self, number: int) -> None:
        """One step of every row: `number` counts them for the random numbers."""
        sampling, shape = self.sampling, self.input_ids.shape
        chosen = self._choose_by_chance(number) if self.origin else self._choose_by_schedule()
        if chosen is None:
            return
        mask, read, count = chosen
        # The places of N known positions: masked ones first, in their order.
        places = (~mask).flatten().to(torch.int8).argsort(stable=True)[: int(read.sum())]
        drawn = self._read(number, places, read)
        self.finite = self.finite & drawn.finite

        def spread(values: Tensor, elsewhere: float) -> Tensor:
            everywhere = torch.full((mask.numel(),), elsewhere, dtype=values.dtype, device=self.device)
            return everywhere.scatter(0, places, values).view(shape)

        confidence = spread(drawn.confidence, -1.0)
        entropy = None if drawn.entropy is None else spread(drawn.entropy, torch.inf)
        care = sampling.threshold if sampling.algorithm == "threshold" else sampling.entropy_bound
        revealed = ALGORITHMS[sampling.algorithm](Candidates(mask, confidence, entropy, self._to_device(count), care))
        self.input_ids = torch.where(revealed, spread(drawn.token_ids, 0), self.input_ids)
        self.confidence = torch.where(revealed, confidence.float(), self.confidence)
        self.written = self.written | revealed
        if sampling.early_stop and self.stop_id is not None:
            self._stop_early(self.stop_id)
        if self.asks:
            self.done = self.written.cpu().numpy()
            self.clock.see(self.done)

    def _choose_by_chance(self, number: int) -> tuple[Tensor, Counts, Counts] | None:
        """What `origin` reveals: positions (B, T) on the device, and how many in each row; None for nothing.

        A masked position is revealed with probability 1 - s / t. With remasking some are masked again, here and now.
        ReMDM-cap (Wang et al. 2025, arXiv 2503.00307) masks a written one again with probability
        sigma = min(remask, s / (1 - t)) and reveals a masked one with probability ((1 - s) - (1 - sigma) (1 - t)) / t,
        which leaves the share of masked positions at every time what it was.
        """
        t, s = self.clock.tick()
        block = self.clock.own_block()
        masked = block & ~self.done
        # The published expression to the last bit.
        reveal = 1 - s / t
        if self.sampling.remask:
            # Nothing is written yet at time 1.
            share = np.divide(s, 1 - t, out=np.zeros_like(s), where=t < 1)
            sigma = np.minimum(np.float32(self.sampling.remask), share)
            reveal = np.where(s > 0, ((1 - s) - (1 - sigma) * (1 - t)) / t, np.float32(1))
            self._hide(self._hit(number, _REMASK, block & self.done, sigma))
        where = self._hit(number, _REVEAL, masked, reveal)
        self.done = self.done | where
        self.clock.see(self.done)
        count = where.sum(1)
        return (self._to_device(where), count, count) if where.any() else None

    def _hit(self, number: int, purpose: int, mask: Flags, probability: Times) -> Flags:
        """(B, T): those positions of a mask on the host whose random number is below their row's probability, (B,)."""
        places = np.flatnonzero(mask)
        rows = places // mask.shape[1]
        below = self._uniforms(number, purpose, torch.from_numpy(places), self.host).numpy() < probability[rows]
        hit = np.zeros_like(mask)
        hit.flat[places[below]] = True
        return hit

    def _hide(self, again: Flags) -> None:
        """Mask written positions again."""
        if not again.any():
            return
        self.done = self.done & ~again
        hidden = self._to_device(again)
        self.input_ids = torch.where(hidden, self.canvas.input_ids, self.input_ids)
        self.confidence, self.written = self.confidence.masked_fill(hidden, 0.0), self.written & ~hidden

    def _choose_by_schedule(self) -> tuple[Tensor, Counts, Counts] | None:
        """What the others rank: positions (B, T) on the device, how many in each row, and how many of them to reveal."""
        t, s = self.clock.tick()
        masked = self.clock.masked
        if self.sampling.algorithm == "greedy":
            count = greedy_count(masked, 1 - s / t)
            self.clock.wrote(count)
        else:
            count = np.where(s > 0, np.minimum(masked, 1), masked)
        if not count.any():
            return None
        # A row that reveals nothing in this step need not be read.
        block = self._to_device(np.where(count > 0, self.clock.block, NOWHERE))
        return (self.block_of == block[:, None]) & ~self.written, np.where(count > 0, masked, 0), count

    def _read(self, number: int, places: Tensor, read: Counts) -> Drawn:
        """The model's tokens at some positions, of which each row has so many."""
        sampling, canvas, window, most = self.sampling, self.canvas, None, int(read.max())
        if sampling.cache != "none":
            inside = self.clock.window(read > 0, sampling.cache == "dual", sampling.refresh)
            if inside is not None:
                window, most = self._to_device(inside), int(inside.sum(1).max())
        batch = LogitsBatch(
            self.input_ids,
            self.key_mask,
            canvas.prompt_mask,
            places,
            canvas.positions,
            recompute=window,
            max_per_row=most,
        )
        forbidden = None
        if sampling.min_new_tokens and self.stop_id is not None:
            forbidden = self.early[places], self.stop_id
        uniforms = self._uniforms(number, TOKEN, places, canvas) if sampling.temperature else None
        how = Drawing(sampling.temperature, sampling.top_k, sampling.top_p)
        return draw(self.logits_fn(batch), uniforms, how, self.vocab_size, forbidden, sampling.algorithm == "entropy")

    def _stop_early(self, stop: int) -> None:
        """Fill what stands behind an end token that has nothing masked before it."""
        masked = ~self.written
        ended = self.written & (self.block_of != NOWHERE) & (self.input_ids == stop) & (masked.cumsum(1) == 0)
        rest = masked & (ended.cumsum(1) > 0)
        self.input_ids = self.input_ids.masked_fill(rest, stop)
        self.written = self.written | rest

    def _uniforms(self, number: int, purpose: int, places: Tensor, canvas: Canvas) -> Tensor:
        """(N,) float64: the random numbers of some positions, on the device where the canvas is."""
        row, position = canvas.rows[places // self.input_ids.size(1)], canvas.positions.flatten()[places]
        return uniform(self.sampling.seed, int(Stream.SAMPLER), number, row, position, purpose)

    def _to_device(self, values: np.ndarray) -> Tensor:
        """An array on the device, without waiting for it."""
        tensor = torch.from_numpy(values)
        # A copy from memory that is not pinned waits until the device has done all that was asked of it before.
        tensor = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return tensor.to(self.device, non_blocking=True)
