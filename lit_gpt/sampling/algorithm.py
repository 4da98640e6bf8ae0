"""What a denoising algorithm is: which masked positions of a step are predicted, and which of those are revealed.

An algorithm is one class in a file of its own, named in `settings.ALGORITHMS`. It sees one step of a batch, all of it on
the device, and waits for nothing. The loop around it, with blocks, caches, guidance and filters, is the same for all
(`denoising`).

B rows, T tokens, n positions, K vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pkgutil import resolve_name

import torch
from torch import Tensor

from lit_gpt.sampling.settings import ALGORITHMS, Sampling


@dataclass(frozen=True)
class DenoisingStep:
    """What is known of a step before the model is asked."""

    masked: Tensor
    """(B, T) bool: the masked positions of each row's block."""
    unmasked: Tensor
    """(B, T) bool: the other positions of that block, without given tokens."""
    t: Tensor
    """(B,) float32: the time at which the step begins, 1 where everything is masked."""
    s: Tensor
    """(B,) float32: the time to which it leads, below t; 0 at a block's last step."""
    uniforms: Callable[[int], Tensor]
    """A number that stands for a purpose to (B, T) float64 in [0, 1), which no other step and purpose share."""

    @property
    def last(self) -> Tensor:
        """(B, 1) bool: whether nothing may stay masked."""
        return (self.s == 0)[:, None]


@dataclass(frozen=True)
class Predictions:
    """What the model says of the candidates of a step; 0 at all other positions."""

    token_ids: Tensor
    """(B, T) int64: the sampled tokens."""
    confidence: Tensor
    """(B, T) float64: their probabilities at temperature 1."""
    measure: Tensor | None
    """(B, T) float32: the algorithm's own measure of each distribution; None if it has none."""
    finite: Tensor
    """Scalar bool: whether all logits were finite numbers."""


@dataclass(frozen=True)
class Algorithm:
    """A rule of which positions a step reveals. Its fields are its parameters, settings of the same names."""

    @property
    def measure(self) -> Callable[[Tensor], Tensor] | None:
        """Log-probabilities (n, K) to what `revealed` must know of each distribution, (n,); None for nothing more."""
        return None

    @property
    def remasks(self) -> bool:
        """Whether tokens may be masked again, until the last step of their block is done."""
        return False

    def remasked(self, step: DenoisingStep) -> Tensor:
        """The positions that are masked again before the step, (B, T) bool; they wait for the next one."""
        return torch.zeros_like(step.masked)

    def candidates(self, step: DenoisingStep) -> Tensor:
        """The masked positions that the model predicts, (B, T) bool; fewer cost less."""
        return step.masked

    def revealed(self, step: DenoisingStep, candidates: Tensor, predictions: Predictions) -> Tensor:
        """The candidates that keep their predicted tokens, (B, T) bool."""
        raise NotImplementedError


def make_algorithm(sampling: Sampling) -> Algorithm:
    """The algorithm of some settings, with its parameters."""
    kind: type[Algorithm] = resolve_name(ALGORITHMS[sampling.algorithm])
    return kind(**{field.name: getattr(sampling, field.name) for field in fields(kind)})


def ranks(score: Tensor, candidates: Tensor) -> Tensor:
    """Each candidate's place in its row, 0 for the highest score, earlier positions first among equals.

    Args:
        score: (B, T).
        candidates: (B, T) bool.

    Returns:
        (B, T) int64; other positions come behind the candidates.
    """
    order = score.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(score.size(1), device=score.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)
