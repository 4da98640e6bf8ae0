"""Validation: the loss over fixed sequences with fixed noise, the same for any number of devices and any micro batch.

Every sequence's nats, draw by draw, reach every process, and are summed in the sequences' order: the loss and its standard
errors do not depend on who computed what. Two errors are told apart. The spread over sequences says how well this text stands
for all text like it. The spread of the draws within a sequence says how far an estimated bound is from the exact bound of this
very text; runs that are validated on the same text differ by chance in that part alone.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_gpt import devices
from lit_gpt.data import batching
from lit_gpt.training import loggers, objectives
from lit_gpt.training.objectives import ValidatedObjective

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from lit_gpt.training.experiment import Experiment


# Seconds between two lines of progress.
_PROGRESS_S = 10.0


@dataclass(frozen=True)
class Validation:
    """One validation's result."""

    loss: float
    """Nats per token."""
    loss_se: float | None
    """Standard error of the loss as that of all such text: the spread over sequences, the draws' noise included; None of one
    sequence."""
    loss_draws_se: float | None
    """Standard error of the loss as an estimate of the bound of this text; 0 where nothing is drawn, None where one draw or
    one sequence cannot tell (see `draws_standard_error`)."""
    bits_per_byte: float | None
    """Nats over ln 2 and the UTF-8 bytes of exactly the scored tokens; None without a tokenizer."""
    bits_per_byte_se: float | None
    """As `loss_se`."""
    samples: int
    """Sequences."""
    draws: int
    """Noise draws per sequence."""
    estimator: str
    """In words."""
    is_bound: bool
    """Whether loss and bits per byte are upper bounds."""

    def metrics(self) -> dict[str, float]:
        """Under the published names."""
        found = {
            "metric/val_loss": self.loss,
            "metric/val_loss_se": self.loss_se,
            "metric/val_loss_draws_se": self.loss_draws_se,
            "metric/val_ppl": loggers.perplexity(self.loss),
            "metric/val_bpb": self.bits_per_byte,
        }
        return {name: value for name, value in found.items() if value is not None}

    def record(self) -> dict[str, Any]:
        """As the run's record keeps it."""
        return {
            "val_loss": self.loss,
            "val_loss_se": self.loss_se,
            "val_loss_draws_se": self.loss_draws_se,
            "val_ppl": loggers.perplexity(self.loss),
            "val_bits_per_byte": self.bits_per_byte,
            "val_bits_per_byte_se": self.bits_per_byte_se,
            "val_samples": self.samples,
            "val_draws": self.draws,
            "val_is_bound": self.is_bound,
            "estimator": self.estimator,
        }

    def line(self) -> str:
        """For the console."""
        bound = "<= " if self.is_bound else ""
        error = "" if self.loss_se is None else f" (standard error {self.loss_se:.4f})"
        bits = "" if self.bits_per_byte is None else f", bits per byte {bound}{self.bits_per_byte:.4f}"
        return (
            f"val loss {bound}{self.loss:.4f}{error}, val ppl {bound}{loggers.perplexity(self.loss):.2f}{bits}; "
            f"{self.samples} sequences{self._draws_words()}; {self.estimator}"
        )

    def _draws_words(self) -> str:
        if not self.is_bound:
            return ""
        draws = f", {self.draws} {'draw' if self.draws == 1 else 'draws'} each"
        return draws if self.loss_draws_se is None else f"{draws}, whose own standard error is {self.loss_draws_se:.4f}"


@dataclass(frozen=True)
class ValidationSize:
    """How much is validated."""

    samples: int
    """Sequences, over all devices."""
    draws: int
    """Noise draws per sequence, where the objective has noise."""
    micro_batch_size: int
    """Rows of a forward pass; changes the speed only."""


@torch.no_grad()
def validate(
    fabric: Fabric, model: Any, experiment: Experiment, size: ValidationSize, signals: devices.StopSignals
) -> Validation | None:
    """Mean loss over the first validation sequences; says now and then how far it is.

    Args:
        fabric: launched.
        model: the set-up model.
        experiment: for the objective, the validation data and the tokens' bytes.
        size: how much is validated.
        signals: looked at between batches.

    Returns:
        The result, or None when a signal cut it short.
    """
    objective, data = experiment.objective, experiment.val_data
    assert data is not None and isinstance(objective, ValidatedObjective)
    count, micro_batch_size = size.samples, size.micro_batch_size
    draws = objective.fixed_draws or size.draws
    lengths = None if experiment.token_bytes is None else torch.as_tensor(experiment.token_bytes)
    device = fabric.device
    started = shown = time.perf_counter()
    rounds = -(-count // (micro_batch_size * fabric.world_size))
    # Rows behind `count` fill up the last batches.
    rows = rounds * micro_batch_size * fabric.world_size
    nats = torch.zeros(draws, rows, dtype=torch.float64, device=device)
    tokens, text_bytes = torch.zeros(2, rows, dtype=torch.float64).unbind()
    batches = batching.validation_batches(data, count, micro_batch_size, fabric.global_rank, fabric.world_size)
    model.eval()
    for number, batch in enumerate(batches):
        own = slice(int(batch.rows[0]), int(batch.rows[-1]) + 1)
        for draw in range(draws):
            # On the host while the device computes the draws before.
            host_terms = objective.validation(batch, draw, draws).prepared_for(device)
            terms = host_terms.to(device)
            _, nll, index = objectives.weighted_nll(fabric, model, terms)
            weighted = torch.zeros(terms.weights.numel(), dtype=torch.float64, device=device)
            weighted[index] = nll.double() * terms.weights.flatten().index_select(0, index).double()
            nats[draw, own] = weighted.view(len(batch.rows), -1).sum(1)
        counted = host_terms.in_denominator
        tokens[own] = counted.sum(1).double()
        if lengths is not None:
            text_bytes[own] = (lengths[host_terms.targets.where(counted, 0)] * counted).sum(1).double()
        if signals.agreed(fabric):
            return None
        if (now := time.perf_counter()) - shown > _PROGRESS_S:
            shown, done = now, (number + 1) / rounds
            devices.say(fabric, f"validation: {done:.0%}, {(now - started) * (1 / done - 1):.0f} s left")
    model.train()
    # Every entry is one process's; zero is added to it exactly.
    flat = devices.all_reduce_sum(fabric, torch.cat([nats.flatten().cpu(), tokens, text_bytes]).tolist())
    table = torch.tensor(flat, dtype=torch.float64).view(draws + 2, rows)[:, :count]
    return _summary(objective, table[:-2], table[-2], None if lengths is None else table[-1])


def _summary(objective: ValidatedObjective, nats: Tensor, tokens: Tensor, text_bytes: Tensor | None) -> Validation:
    """The result, from nats (D, S) of D draws of S sequences, and each sequence's tokens and bytes (S,), float64."""
    draws, count = nats.shape
    means = nats.mean(0)
    bits = bits_se = None
    if text_bytes is not None and text_bytes.sum():
        bits, bits_se = float(means.sum() / text_bytes.sum()), ratio_standard_error(means, text_bytes)
    return Validation(
        loss=float(means.sum() / tokens.sum()),
        loss_se=ratio_standard_error(means, tokens),
        loss_draws_se=draws_standard_error(nats, tokens) if objective.is_bound else 0.0,
        bits_per_byte=None if bits is None else bits / math.log(2),
        bits_per_byte_se=None if bits_se is None else bits_se / math.log(2),
        samples=count,
        draws=draws,
        estimator=objective.estimator,
        is_bound=objective.is_bound,
    )


def ratio_standard_error(values: Tensor, sizes: Tensor) -> float | None:
    """Standard error of sum(values) / sum(sizes) over independent sequences, by linearisation (Cochran 1977, section 6.3).

    Args:
        values: (S,) float64, such as nats.
        sizes: (S,) float64, such as tokens.

    Returns:
        The error; None of one sequence.
    """
    count = len(values)
    if count < 2:
        return None
    residuals = values - values.sum() / sizes.sum() * sizes
    return float((residuals.square().sum() * count / (count - 1)).sqrt() / sizes.sum())


def draws_standard_error(nats: Tensor, tokens: Tensor) -> float | None:
    """Standard error that the draws of noise give to the loss of a fixed text.

    Draw d of every sequence lies in the same stratum of times, so draws differ in mean; sequences do too. What is left of
    each number without the mean of its stratum and of its sequence is noise. Its squares, over (1 - 1/S) (1 - 1/D),
    estimate the sum of the numbers' variances without bias where these additions describe the means, whatever variance
    each stratum has; where a sequence's loss rises otherwise with t than another's, the estimate is too large. The times of
    the sequences fill each stratum more evenly than by chance, which it does not see either: it is an upper bound.

    Args:
        nats: (D, S) float64, of draw and sequence.
        tokens: (S,) float64.

    Returns:
        Nats per token; None of one draw or one sequence.
    """
    draws, count = nats.shape
    if draws < 2 or count < 2:
        return None
    residuals = nats - nats.sum(1, keepdim=True) / tokens.sum() * tokens
    residuals = residuals - residuals.mean(0)
    variance = residuals.square().sum() / ((1 - 1 / draws) * (1 - 1 / count)) / draws**2
    return float(variance.sqrt() / tokens.sum())
