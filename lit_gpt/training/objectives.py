"""What is learnt: one small class per kind of training, from a batch to what the model reads, predicts and is scored on.

An objective returns the terms of the loss unreduced, as weights per position; their sum over micro batches and devices is
the step's loss, the mean over groups of (weighted sum / denominator). It knows no device, optimizer or file.

B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lit_gpt import diffusion
from lit_gpt.data.batching import Group, MicroBatch
from lit_gpt.data.packed_dataset import Extent
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.model.visibility import Visibility
from lit_gpt.randomness import Stream, hash_int, uniform, uniform_grid
from lit_gpt.training import schedule

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Objective(Protocol):
    """One kind of training."""

    @property
    def lengths_vary(self) -> bool:
        """Whether groups may differ in length."""
        ...

    def group(self, step: int, group: int, extents: Sequence[Extent]) -> Group:
        """Cut and denominator of a group; see `batching.GroupRule`."""
        ...

    def training(self, batch: MicroBatch) -> LossTerms:
        """A training micro batch, with the run's noise."""
        ...


@runtime_checkable
class ValidatedObjective(Objective, Protocol):
    """One that says how its validation loss is estimated, too."""

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

    def validation(self, batch: MicroBatch, draw: int, draws: int) -> LossTerms:
        """A validation batch with the fixed noise of one draw; weights sum to nats, not to a mean."""
        ...


@dataclass(frozen=True)
class NextToken:
    """ARM pretraining: mean cross-entropy of the next token."""

    block_size: int
    """Input tokens of a full row."""
    lengths_vary = False
    estimator = "exact next-token cross-entropy"
    is_bound = False
    fixed_draws = 1

    def group(self, step: int, group: int, extents: Sequence[Extent]) -> Group:
        """The whole row; every token but the first of a row is predicted."""
        return Group(self.block_size, sum(row.length - 1 for row in extents))

    def training(self, batch: MicroBatch) -> LossTerms:
        """Read tokens 0 .. T-1, predict 1 .. T."""
        targets = batch.tokens[:, 1:]
        counted = _before(batch.lengths - 1, targets.size(1))
        # Padding lies behind everything that is scored, so a causal model attends to none of it.
        return LossTerms(batch.tokens[:, :-1], targets, counted * batch.row_weights.float()[:, None], counted)

    def validation(self, batch: MicroBatch, draw: int, draws: int) -> LossTerms:
        """As in training; there is no noise."""
        return self.training(batch)


@dataclass(frozen=True)
class MaskedDiffusion:
    """MDM pretraining: sum of CE / p over masked tokens, divided by the tokens of the group (SMDM, eq. 4).

    With `ssl_ratio` above 0 this is stochastic length training: that share of the groups is cut to a random length.
    What else can be learnt from (`loss_weight`, `row_lengths`) changes training alone: validation is the bound at full length.
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
    loss_weight: str = "elbo"
    """`elbo`: CE / p, the bound; `cross_entropy`: the mean CE of masked tokens (`diffusion.cross_entropy_weights`)."""
    row_lengths: tuple[tuple[int, int], ...] = ()
    """(length, step) pairs: before that step every row is read as rows of this length; whole rows behind the last pair."""
    is_bound = True
    fixed_draws = None

    @property
    def training_is_bound(self) -> bool:
        """Whether the training loss is the bound, too; an objective that does not say means yes (`scripts/certify.py`)."""
        return self.loss_weight == "elbo"

    @property
    def lengths_vary(self) -> bool:
        """With random lengths only."""
        return self.ssl_ratio > 0

    @property
    def estimator(self) -> str:
        """Law of the validation noise, as published but for the low-discrepancy times."""
        return f"masked-diffusion bound, mc with low-discrepancy t, eps {diffusion.EPS:g}, fixed noise"

    def group(self, step: int, group: int, extents: Sequence[Extent]) -> Group:
        """The block, or a random length; all real tokens count."""
        length = self.block_size
        if self.ssl_ratio:
            chance = hash_int(self.seed, Stream.RANDOM_LENGTH, step, group, 0) / 2**64
            if chance < self.ssl_ratio:
                length = 1 + hash_int(self.seed, Stream.RANDOM_LENGTH, step, group, 1) % self.block_size
        return Group(length, sum(min(row.length, length) for row in extents))

    def training(self, batch: MicroBatch) -> LossTerms:
        """Mask with times stratified over the step's rows."""
        pieces = self.block_size // schedule.row_length(batch.step, self.row_lengths, self.block_size)
        batch = _cut_rows(batch, pieces) if pieces > 1 else batch
        t, uniforms = _training_noise(batch, self.seed, self.global_batch_size * pieces)
        terms = self._masked(batch, t, uniforms)
        if self.loss_weight == "cross_entropy":
            terms = terms._replace(weights=diffusion.cross_entropy_weights(terms.weights > 0, batch.row_weights))
        return terms

    def validation(self, batch: MicroBatch, draw: int, draws: int) -> LossTerms:
        """Mask with noise that is the same for every run: a function of the sequence's number and the draw."""
        t = diffusion.low_discrepancy_times(batch.rows, draw, draws)
        uniforms = uniform_grid(0, Stream.VALIDATION, draw, batch.rows, batch.tokens.size(1) - 1)
        return self._masked(batch, t, uniforms)

    def _masked(self, batch: MicroBatch, t: Tensor, uniforms: Tensor) -> LossTerms:
        clean = batch.tokens[:, :-1]
        real = _before(batch.lengths, clean.size(1))
        p_mask = diffusion.masking_probability(t)
        noisy_input, mask = diffusion.forward_process(clean, p_mask, uniforms, self.mask_id, real)
        weights = diffusion.loss_weights(mask, p_mask, batch.row_weights)
        return LossTerms(noisy_input, clean, weights, real, visibility=_without_padding(real))


@dataclass(frozen=True)
class NextResponseToken:
    """ARM fine-tuning: mean cross-entropy of the response's tokens, over all of a group's rows."""

    lengths_vary = True

    def group(self, step: int, group: int, extents: Sequence[Extent]) -> Group:
        """Up to the longest row; every token behind a prompt is predicted."""
        # A row's first token has nothing before it to be predicted from.
        predicted = sum(row.length - max(row.prompt_length, 1) for row in extents)
        return Group(max(row.length for row in extents) - 1, predicted)

    def training(self, batch: MicroBatch) -> LossTerms:
        """Read tokens 0 .. T-1, predict 1 .. T, where that is response."""
        targets = batch.tokens[:, 1:]
        columns = targets.size(1)
        counted = _before(batch.lengths - 1, columns) & ~_before(batch.prompt_lengths - 1, columns)
        return LossTerms(batch.tokens[:, :-1], targets, counted * batch.row_weights.float()[:, None], counted)


@dataclass(frozen=True)
class MaskedResponse:
    """MDM fine-tuning: sum of CE / p over masked response tokens, divided by the group's tokens that are no prompt.

    Padding is response: masked and scored like any token, it teaches where to stop.
    """

    mask_id: int
    """Id of [MASK]."""
    seed: int
    """The run's seed, for times, masks and dropped prompts."""
    global_batch_size: int
    """Rows of a step: the number of strata of t."""
    row_length: int | None = None
    """Tokens of every row; None cuts a group to its longest row."""
    prompt_drop: float = 0.0
    """Probability that a row's prompt becomes [MASK], for classifier-free guidance later."""

    @property
    def lengths_vary(self) -> bool:
        """Unless it is fixed."""
        return self.row_length is None

    def group(self, step: int, group: int, extents: Sequence[Extent]) -> Group:
        """The fixed length or the longest row's; rows * length - prompt tokens count."""
        length = self.row_length or max(row.length for row in extents)
        return Group(length, sum(length - min(row.prompt_length, length) for row in extents))

    def training(self, batch: MicroBatch) -> LossTerms:
        """Mask everything behind the prompts at rate p, drop some prompts."""
        t, uniforms = _training_noise(batch, self.seed, self.global_batch_size)
        clean, columns = batch.tokens[:, :-1], batch.tokens.size(1) - 1
        response = ~_before(batch.prompt_lengths, columns)
        p_mask = diffusion.masking_probability(t)
        noisy_input, mask = diffusion.forward_process(clean, p_mask, uniforms, self.mask_id, response)
        if self.prompt_drop:
            dropped = uniform(self.seed, int(Stream.PROMPT_DROP), batch.step, batch.rows) < self.prompt_drop
            noisy_input = noisy_input.masked_fill(dropped[:, None] & ~response, self.mask_id)
        weights = diffusion.loss_weights(mask, p_mask, batch.row_weights)
        return LossTerms(noisy_input, clean, weights, response)


def _cut_rows(batch: MicroBatch, pieces: int) -> MicroBatch:
    """Every row as so many rows of its own, numbered on; those without a real token are left out."""
    length = (batch.tokens.size(1) - 1) // pieces
    starts = torch.arange(pieces) * length
    # (B, pieces, length + 1): the token behind a piece comes with it, as with a row.
    tokens = batch.tokens[:, starts[:, None] + torch.arange(length + 1)]
    lengths = (batch.lengths[:, None] - starts).flatten()
    kept = lengths > 0
    return replace(
        batch,
        tokens=tokens.flatten(0, 1)[kept],
        lengths=lengths[kept],
        prompt_lengths=batch.prompt_lengths.repeat_interleave(pieces)[kept],
        rows=(batch.rows[:, None] * pieces + torch.arange(pieces)).flatten()[kept],
        row_weights=batch.row_weights.repeat_interleave(pieces)[kept],
    )


def _training_noise(batch: MicroBatch, seed: int, global_batch_size: int) -> tuple[Tensor, Tensor]:
    """Times (B,), stratified over the step's rows, and uniform numbers (B, T)."""
    t = diffusion.diffusion_times(seed, batch.step, batch.rows, global_batch_size)
    return t, uniform_grid(seed, Stream.MASK, batch.step, batch.rows, batch.tokens.size(1) - 1)


def _before(lengths: Tensor, columns: int) -> Tensor:
    """(B, columns) bool, True in the first lengths[i] columns of row i."""
    return torch.arange(columns, device=lengths.device)[None, :] < lengths[:, None]


def _without_padding(real: Tensor) -> Visibility | None:
    """Full visibility of the tokens (B, T) that are True; None, for the fastest kernels, where all of them are."""
    return None if bool(real.all()) else Visibility(key_mask=real)


def weighted_nll(fabric: Fabric, model: Any, terms: LossTerms) -> tuple[Tensor, Tensor, Tensor]:
    """`Transformer.weighted_nll` of a set-up model, in the run's precision.

    Fabric turns autocast on in `forward` alone, unless it wraps the model for several devices: without this, one device
    would compute in float32 whatever --precision says.
    """
    with fabric.autocast():
        return model.weighted_nll(terms)  # type: ignore[no-any-return]


OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": NextToken,
    "masked_diffusion": MaskedDiffusion,
    "next_response_token": NextResponseToken,
    "masked_response": MaskedResponse,
}
"""All kinds of training by name; what is here is checked by `scripts/certify.py`."""
