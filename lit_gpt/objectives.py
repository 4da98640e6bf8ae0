"""What is learnt: one small class per kind of training, from a batch to what the model reads, predicts and is scored on.

An objective returns the terms of the loss unreduced, as weights per position; their sum over micro batches and devices is
the step's loss, the mean over groups of (weighted sum / denominator). It knows no device, optimizer or file. May import
batching, diffusion and noise.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lit_gpt import diffusion
from lit_gpt.batching import Batch, Group
from lit_gpt.noise import Stream, hash_int, uniform_grid


@dataclass(frozen=True)
class Scored:
    """What the model reads and where it is scored."""

    input_ids: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64."""
    weights: Tensor
    """(B, T) float32: loss = sum(weights * CE); 0 where nothing is scored."""
    counted: Tensor
    """(B, T) bool: the target tokens that the denominator counts."""
    key_mask: Tensor | None
    """(B, T) bool, False at padding; None where there is none."""


class Objective(Protocol):
    """One kind of training."""

    @property
    def estimator(self) -> str:
        """What the validation loss is, in words for the console and the records."""
        ...

    @property
    def is_bound(self) -> bool:
        """Whether the validation loss is an upper bound of the negative log-likelihood, not the thing itself."""
        ...

    @property
    def fixed_draws(self) -> int | None:
        """Validation draws per sequence that make sense; None where more draws are more exact."""
        ...

    def group(self, step: int, group: int, lengths: Sequence[int]) -> Group:
        """Cut and denominator of a group; see `batching.GroupRule`."""
        ...

    def training(self, batch: Batch) -> Scored:
        """A training micro batch, with the run's noise."""
        ...

    def validation(self, batch: Batch, draw: int, draws: int) -> Scored:
        """A validation batch with the fixed noise of one draw; weights sum to nats, not to a mean."""
        ...


@dataclass(frozen=True)
class NextToken:
    """ARM pretraining: mean cross-entropy of the next token."""

    block_size: int
    """Input tokens of a full row."""
    estimator = "exact next-token cross-entropy"
    is_bound = False
    fixed_draws = 1

    def group(self, step: int, group: int, lengths: Sequence[int]) -> Group:
        """The whole row; every token but the first of a row is predicted."""
        return Group(self.block_size, sum(length - 1 for length in lengths))

    def training(self, batch: Batch) -> Scored:
        """Read tokens 0 .. T-1, predict 1 .. T."""
        targets = batch.tokens[:, 1:]
        counted = _before(torch.minimum(batch.lengths - 1, batch.cuts), targets.size(1))
        # Padding lies behind everything that is scored, so a causal model needs no key mask.
        return Scored(batch.tokens[:, :-1], targets, counted * batch.row_weights.float()[:, None], counted, None)

    def validation(self, batch: Batch, draw: int, draws: int) -> Scored:
        """As in training; there is no noise."""
        return self.training(batch)


@dataclass(frozen=True)
class MaskedDiffusion:
    """MDM pretraining: sum of CE / p over masked tokens, divided by the tokens of the group (SMDM, eq. 4).

    With `ssl_ratio` above 0 this is stochastic length training: that share of the groups is cut to a random length.
    """

    block_size: int
    """Input tokens of a full row."""
    mask_id: int
    """Id of [MASK]."""
    seed: int
    """The run's seed, for times, masks and random lengths."""
    global_batch_size: int
    """Rows of a step: the number of strata of t."""
    ssl_ratio: float = 0.0
    """Share of groups with a random length, uniform in [1, block_size]."""
    is_bound = True
    fixed_draws = None

    @property
    def estimator(self) -> str:
        """Law of the validation noise, as published but for the low-discrepancy times."""
        return f"masked-diffusion bound, mc with low-discrepancy t, eps {diffusion.EPS:g}, fixed noise"

    def group(self, step: int, group: int, lengths: Sequence[int]) -> Group:
        """The block, or a random length; all real tokens count."""
        length = self.block_size
        if self.ssl_ratio:
            chance = hash_int(self.seed, Stream.RANDOM_LENGTH, step, group, 0) / 2**64
            if chance < self.ssl_ratio:
                length = 1 + hash_int(self.seed, Stream.RANDOM_LENGTH, step, group, 1) % self.block_size
        return Group(length, sum(min(own, length) for own in lengths))

    def training(self, batch: Batch) -> Scored:
        """Mask with times stratified over the step's rows."""
        t = diffusion.diffusion_times(self.seed, batch.step, batch.rows, self.global_batch_size)
        uniforms = uniform_grid(self.seed, Stream.MASK, batch.step, batch.rows, batch.tokens.size(1) - 1)
        return self._masked(batch, t, uniforms)

    def validation(self, batch: Batch, draw: int, draws: int) -> Scored:
        """Mask with noise that is the same for every run: a function of the sequence's number and the draw."""
        t = diffusion.low_discrepancy_times(batch.rows, draw, draws)
        uniforms = uniform_grid(0, Stream.VALIDATION, draw, batch.rows, batch.tokens.size(1) - 1)
        return self._masked(batch, t, uniforms)

    def _masked(self, batch: Batch, t: Tensor, uniforms: Tensor) -> Scored:
        clean = batch.tokens[:, :-1]
        real = _before(torch.minimum(batch.lengths, batch.cuts), clean.size(1))
        p_mask = diffusion.masking_probability(t)
        noisy_input, mask = diffusion.forward_process(clean, p_mask, uniforms, self.mask_id, real)
        weights = diffusion.loss_weights(mask, p_mask, batch.row_weights)
        return Scored(noisy_input, clean, weights, real, None if bool(real.all()) else real)


def _before(lengths: Tensor, columns: int) -> Tensor:
    """(B, columns) bool, True in the first lengths[i] columns of row i."""
    return torch.arange(columns, device=lengths.device)[None, :] < lengths[:, None]
