"""Masked-diffusion sampling: the loop that turns masks into tokens, step by step.

Decisions: all state is on the device, and a step waits for it once, to learn how many positions are predicted and whether
anything is left to do; the model computes the logits of those positions only that the step may reveal, and a step without
any is not computed; a random number depends on (seed, step, row, position in the row, purpose), so that a row's tokens do
not depend on its batch.

B rows, T tokens, N predicted positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from lit_gpt.model.logits import LogitsBatch, LogitsFn
from lit_gpt.randomness import Stream, uniform
from lit_gpt.sampling.algorithm import DenoisingStep, Predictions, make_algorithm
from lit_gpt.sampling.categorical import TOKEN, sample_tokens
from lit_gpt.sampling.sequence import PartialSequences, State
from lit_gpt.sampling.settings import Sampling
from lit_gpt.sampling.step_schedule import StepSchedule


def denoise(
    logits_fn: LogitsFn, sequences: PartialSequences, sampling: Sampling, vocab_size: int, stop_id: int | None = None
) -> Iterator[State]:
    """Reveal the masked positions block by block, each block over t = linspace(1, 1e-5, steps + 1).

    Args are those of `Denoising`.

    Yields:
        The state before the first step, then one after each.

    Raises:
        ValueError: the model's logits are no finite numbers.
    """
    denoising = Denoising(logits_fn, sequences, sampling, vocab_size, stop_id)
    yield denoising.state()
    while denoising.step():
        yield denoising.state()


class Denoising:
    """A batch of sequences between two steps.

    Args:
        logits_fn: logits of chosen positions from whole rows, see `sample.mdm_logits`.
        sequences: [MASK] is wherever a token is neither given nor padding.
        sampling: algorithm, steps and everything else.
        vocab_size: K; ids from here on are never sampled.
        stop_id: the end token, for `early_stop` and `min_new_tokens`.
    """

    def __init__(
        self,
        logits_fn: LogitsFn,
        sequences: PartialSequences,
        sampling: Sampling,
        vocab_size: int,
        stop_id: int | None = None,
    ) -> None:
        self._logits_fn, self._sampling, self._vocab_size, self._stop_id = logits_fn, sampling, vocab_size, stop_id
        self._algorithm, self._sequences = make_algorithm(sampling), sequences
        self._input_ids, self._masked = sequences.input_ids, sequences.key_mask & ~sequences.prompt_mask
        self._confidence = sequences.prompt_mask.float()
        self._finite = torch.ones((), dtype=torch.bool, device=self._masked.device)
        self._schedule = StepSchedule(self._masked, sampling.row_steps, sampling.block_length, self._algorithm.remasks)
        self._steps, self._most_steps = torch.zeros_like(sequences.rows), 0
        self._predictor = self._make_predictor()

    def _make_predictor(self) -> Predictor:
        return Predictor(
            self._logits_fn, self._sequences, self._sampling, self._vocab_size, self._stop_id, self._algorithm.measure
        )

    def state(self) -> State:
        """The sequences now; its step is that of the row that began first."""
        schedule = self._schedule
        changeable = None
        if self._algorithm.remasks:
            changeable = (schedule.block_of >= schedule.block[:, None]) & schedule.unfinished[:, None]
        key_mask = self._sequences.key_mask
        return State(self._most_steps, self._input_ids, self._confidence, key_mask, self._finite, changeable)

    @torch.no_grad()
    def step(self) -> bool:
        """Do a step; False, and nothing is done, if every row is finished.

        Raises:
            ValueError: the model's logits are no finite numbers.
        """
        sampling, schedule, algorithm = self._sampling, self._schedule, self._algorithm
        t, s = schedule.advance(self._masked)
        in_block, uniforms = schedule.in_block(), partial(_uniforms, self._sequences, sampling.seed, self._steps)
        step = DenoisingStep(in_block & self._masked, in_block & ~self._masked, t, s, uniforms)
        candidates = algorithm.candidates(step)
        if algorithm.remasks:
            again = algorithm.remasked(step)
            self._input_ids = torch.where(again, self._sequences.input_ids, self._input_ids)
            self._masked, self._confidence = self._masked | again, self._confidence.masked_fill(again, 0.0)
        recomputed = schedule.recomputed(candidates, sampling.cache, sampling.refresh)
        # The one time that a step waits for the device.
        flags = torch.stack((schedule.unfinished, self._finite.expand_as(t)))
        *counts, unfinished, all_finite = torch.stack((candidates.sum(1), recomputed.sum(1), *flags)).tolist()
        if not all(all_finite):
            self.state().check()
        if not any(unfinished):
            return False
        if any(counts[0]):
            predictions = self._predictor.predict(self._input_ids, candidates, recomputed, counts, uniforms)
            revealed = algorithm.revealed(step, candidates, predictions)
            self._input_ids = torch.where(revealed, predictions.token_ids, self._input_ids)
            self._confidence = torch.where(revealed, predictions.confidence.float(), self._confidence)
            self._masked, self._finite = self._masked & ~revealed, self._finite & predictions.finite
        if sampling.early_stop and self._stop_id is not None:
            prompt_mask = self._sequences.prompt_mask
            self._input_ids, self._masked = _fill_behind_end(self._input_ids, self._masked, prompt_mask, self._stop_id)
        self._steps, self._most_steps = self._steps + 1, self._most_steps + 1
        return True

    def regroup(self, kept: Sequence[int], joined: Denoising | None = None) -> None:
        """Go on with some rows alone, and with those of another batch of the same width behind them; without a cache.

        A row's tokens do not change: its own steps count for its random numbers.
        """
        assert self._sampling.cache == "none"
        places = torch.tensor(list(kept), dtype=torch.int64, device=self._masked.device)
        self._sequences = self._sequences.regrouped(places, joined._sequences if joined else None)
        self._schedule.regroup(places, joined._schedule if joined else None)
        for name in ("_input_ids", "_masked", "_confidence", "_steps"):
            parts = [getattr(self, name)[places]] + ([] if joined is None else [getattr(joined, name)])
            setattr(self, name, torch.cat(parts))
        self._predictor = self._make_predictor()


class Predictor:
    """A model, and how tokens are sampled from its logits."""

    def __init__(
        self,
        logits_fn: LogitsFn,
        sequences: PartialSequences,
        sampling: Sampling,
        vocab_size: int,
        stop_id: int | None,
        measure: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """Arguments are those of `denoise`, and the algorithm's measure."""
        self.logits_fn, self.sequences, self.sampling = logits_fn, sequences, sampling
        self.vocab_size, self.stop_id, self.measure = vocab_size, stop_id, measure
        self.key_mask = sequences.attention_mask()
        free = sequences.key_mask & ~sequences.prompt_mask
        # Where the end token may not stand yet.
        self.too_early = (free.cumsum(1) <= sampling.min_new_tokens).flatten()

    def predict(
        self,
        input_ids: Tensor,
        candidates: Tensor,
        recomputed: Tensor,
        counts: list[list[int]],
        uniforms: Callable[[int], Tensor],
    ) -> Predictions:
        """Sample a token at every candidate.

        Args:
            input_ids: (B, T) int64.
            candidates: (B, T) bool, at least one.
            recomputed: (B, T) bool, what a cache must compute anew.
            counts: of the candidates and of those computed anew, in each row.
            uniforms: as `DenoisingStep.uniforms`.
        """
        # The indices of N candidates, whose number is known: they come first, in their order.
        indices = (~candidates).flatten().to(torch.int8).argsort(stable=True)[: sum(counts[0])]
        everything = min(counts[1]) == input_ids.size(1)
        batch = LogitsBatch(
            input_ids,
            self.key_mask,
            self.sequences.prompt_mask,
            indices,
            self.sequences.positions,
            recompute=None if everything else recomputed,
            max_per_row=max(counts[0] if everything else counts[1]),
        )
        forbidden = None
        if self.sampling.min_new_tokens and self.stop_id is not None:
            forbidden = self.too_early[indices], self.stop_id
        random_numbers = uniforms(TOKEN).flatten()[indices] if self.sampling.temperature else None
        sampled = sample_tokens(
            self.logits_fn(batch), random_numbers, self.sampling, self.vocab_size, forbidden, self.measure
        )

        def scattered(values: Tensor) -> Tensor:
            return values.new_zeros(candidates.numel()).scatter(0, indices, values).view(candidates.shape)

        measure = None if sampled.measure is None else scattered(sampled.measure)
        return Predictions(scattered(sampled.token_ids), scattered(sampled.confidence), measure, sampled.finite)


def _fill_behind_end(input_ids: Tensor, masked: Tensor, prompt_mask: Tensor, stop_id: int) -> tuple[Tensor, Tensor]:
    """End tokens for the masks behind a sampled end token that has no mask before it: new `input_ids` and `masked`."""
    ends = (input_ids == stop_id) & ~prompt_mask & ~masked & (masked.cumsum(1) == 0)
    rest = masked & (ends.cumsum(1) > 0)
    return input_ids.masked_fill(rest, stop_id), masked & ~rest


def _uniforms(sequences: PartialSequences, seed: int, steps: Tensor, purpose: int) -> Tensor:
    """(B, T) float64 in [0, 1): the random numbers of each row's step (B,) for one purpose."""
    return uniform(seed, int(Stream.SAMPLER), steps[:, None], sequences.rows[:, None], sequences.positions, purpose)
