"""Masked-diffusion sampling: the loop that turns masks into tokens, step by step.

Decisions: all state is on the device, and a step waits for it once, to learn how many positions are predicted and whether
anything is left to do; the model computes the logits of those positions only that the step may reveal, and a step without
any is not computed; a random number depends on (seed, step, row, position in the row, purpose), so that a row's tokens do
not depend on its batch.

B rows, T tokens, N predicted positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
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


@torch.no_grad()
def denoise(
    logits_fn: LogitsFn, sequences: PartialSequences, sampling: Sampling, vocab_size: int, stop_id: int | None = None
) -> Iterator[State]:
    """Reveal the masked positions block by block, each block over t = linspace(1, 1e-5, steps + 1).

    Args:
        logits_fn: logits of chosen positions from whole rows, see `sample.mdm_logits`.
        sequences: [MASK] is wherever a token is neither given nor padding.
        sampling: algorithm, steps and everything else.
        vocab_size: K; ids from here on are never sampled.
        stop_id: the end token, for `early_stop` and `min_new_tokens`.

    Yields:
        The state before the first step, then one after each.

    Raises:
        ValueError: the model's logits are no finite numbers.
    """
    algorithm = make_algorithm(sampling)
    input_ids, masked = sequences.input_ids, sequences.key_mask & ~sequences.prompt_mask
    confidence, finite = sequences.prompt_mask.float(), torch.ones((), dtype=torch.bool, device=masked.device)
    schedule = StepSchedule(masked, sampling.row_steps, sampling.block_length, algorithm.remasks)
    predictor = Predictor(logits_fn, sequences, sampling, vocab_size, stop_id, algorithm.measure)
    for number in itertools.count():
        changeable = schedule.block_of >= schedule.block[:, None] if algorithm.remasks else None
        state = State(number, input_ids, confidence, sequences.key_mask, finite, changeable)
        yield state
        t, s = schedule.advance(masked)
        in_block, uniforms = schedule.in_block(), partial(_uniforms, sequences, sampling.seed, number)
        step = DenoisingStep(in_block & masked, in_block & ~masked, t, s, uniforms)
        candidates = algorithm.candidates(step)
        if algorithm.remasks:
            again = algorithm.remasked(step)
            input_ids, masked = torch.where(again, sequences.input_ids, input_ids), masked | again
            confidence = confidence.masked_fill(again, 0.0)
        recomputed = schedule.recomputed(candidates, sampling.cache, sampling.refresh)
        # The one time that a step waits for the device.
        flags = torch.stack((schedule.unfinished, finite.expand_as(t)))
        *counts, unfinished, all_finite = torch.stack((candidates.sum(1), recomputed.sum(1), *flags)).tolist()
        if not all(all_finite):
            state.check()
        if not any(unfinished):
            return
        if any(counts[0]):
            predictions = predictor.predict(input_ids, candidates, recomputed, counts, uniforms)
            revealed = algorithm.revealed(step, candidates, predictions)
            input_ids = torch.where(revealed, predictions.token_ids, input_ids)
            confidence = torch.where(revealed, predictions.confidence.float(), confidence)
            masked, finite = masked & ~revealed, finite & predictions.finite
        if sampling.early_stop and stop_id is not None:
            input_ids, masked = _fill_behind_end(input_ids, masked, sequences.prompt_mask, stop_id)


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


def _uniforms(sequences: PartialSequences, seed: int, number: int, purpose: int) -> Tensor:
    """(B, T) float64 in [0, 1): the random numbers of a step for one purpose."""
    return uniform(seed, int(Stream.SAMPLER), number, sequences.rows[:, None], sequences.positions, purpose)
