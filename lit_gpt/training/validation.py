"""Validation: the loss over fixed sequences with fixed noise, the same for any number of devices and any micro batch.

Its sums are of nats, tokens and bytes, so that they add up over batches and devices.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

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
    bits_per_byte: float | None
    """Nats over ln 2 and the UTF-8 bytes of exactly the scored tokens; None without a tokenizer."""
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
        found = {"metric/val_loss": self.loss, "metric/val_ppl": loggers.perplexity(self.loss)}
        return found if self.bits_per_byte is None else {**found, "metric/val_bpb": self.bits_per_byte}

    def record(self) -> dict[str, Any]:
        """As the run's record keeps it."""
        return {
            "val_loss": self.loss,
            "val_ppl": loggers.perplexity(self.loss),
            "val_bits_per_byte": self.bits_per_byte,
            "val_samples": self.samples,
            "val_draws": self.draws,
            "val_is_bound": self.is_bound,
            "estimator": self.estimator,
        }

    def line(self) -> str:
        """For the console."""
        bound = "<= " if self.is_bound else ""
        bits = "" if self.bits_per_byte is None else f", bits per byte {bound}{self.bits_per_byte:.4f}"
        draws = f", {self.draws} draws" if self.is_bound else ""
        return (
            f"val loss {bound}{self.loss:.4f}, val ppl {bound}{loggers.perplexity(self.loss):.2f}{bits} "
            f"({self.samples} sequences{draws}; {self.estimator})"
        )


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
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = text_bytes = 0.0
    started = shown = time.perf_counter()
    rounds = -(-count // (micro_batch_size * fabric.world_size))
    batches = batching.validation_batches(data, count, micro_batch_size, fabric.global_rank, fabric.world_size)
    model.eval()
    for number, batch in enumerate(batches):
        for draw in range(draws):
            # On the host while the device computes the draws before.
            host_terms = objective.validation(batch, draw, draws).prepared_for(device)
            terms = host_terms.to(device)
            _, nll, index = objectives.weighted_nll(fabric, model, terms)
            nats += nll.double() @ terms.weights.flatten().index_select(0, index).double() / draws
        counted = host_terms.targets[host_terms.in_denominator & (batch.row_weights > 0)[:, None]]
        tokens += counted.numel()
        if lengths is not None:
            text_bytes += float(lengths[counted].sum())
        if signals.agreed(fabric):
            return None
        if (now := time.perf_counter()) - shown > _PROGRESS_S:
            shown, done = now, (number + 1) / rounds
            devices.say(fabric, f"validation: {done:.0%}, {(now - started) * (1 / done - 1):.0f} s left")
    model.train()
    total, tokens, text_bytes = devices.all_reduce_sum(fabric, [float(nats), tokens, text_bytes])
    bits = total / (math.log(2) * text_bytes) if text_bytes else None
    return Validation(total / tokens, bits, count, draws, objective.estimator, objective.is_bound)
