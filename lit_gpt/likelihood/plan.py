"""What an estimator of an MDM's likelihood is: which tokens are masked in which forward pass, and how losses are summed.

The bound on the negative log-likelihood of a target of L tokens, in nats (SMDM, arXiv 2410.18514, section 3; as a sum
over numbers of masked tokens: Ou et al. 2024, arXiv 2406.03736), with CE_i the cross-entropy of token i:

    integral over t in (0, 1) of E[sum over masked i of CE_i / t]  =  sum_{k=1..L} (1/k) E_{|M| = k}[sum_{i in M} CE_i(M)]

An estimator is one class, in a file of its own, registered in `estimators`. Its fields are its parameters. Its plan is a
function of (target length, parameters, keys of the random numbers) and does not see the model. The standard error is the
estimator's own, 0 where nothing is random.

R rows (masks, one forward pass each), L tokens of the target.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True)
class MaskingPlan:
    """The masks of a target, which tokens are scored under each, and the estimate as a function of their losses."""

    masks: Tensor
    """(R, L) bool: True becomes [MASK]."""
    scored: Tensor
    """(R, L) bool: True where the cross-entropy is wanted; only within `masks`."""
    reduce: Callable[[Tensor], tuple[float, float]]
    """Cross-entropies (R, L) float64, 0 where not scored, to (negative log-likelihood, standard error) in nats."""


@dataclass(frozen=True)
class Estimator(ABC):
    """An estimator of the negative log-likelihood; the fields of a subclass are its parameters.

    A subclass raises ValueError for a parameter that is out of range.
    """

    name: ClassVar[str]
    """What users type."""
    is_bound: ClassVar[bool] = True
    """Whether it estimates the bound above; False for another quantity."""
    version: ClassVar[int] = 1
    """Raised whenever its numbers change: results of another version are computed again."""
    passes_parameter: ClassVar[str] = ""
    """The parameter that chooses the number of forward passes; empty where the target alone decides it."""

    @abstractmethod
    def plan(self, length: int, *keys: int) -> MaskingPlan:
        """The plan of a target of `length` tokens; `keys` are what its random numbers are a function of."""

    @abstractmethod
    def passes(self, length: int) -> int:
        """Forward passes for a target of `length` tokens, at most."""

    def identity(self) -> dict[str, Any]:
        """What tells its results from those of another estimator, as JSON values; it names caches, so it never changes."""
        return {"estimator": self.name, **dataclasses.asdict(self)}

    def description(self) -> str:
        """The estimator and its parameters in one line."""
        return ", ".join([self.name, *(f"{name} {value}" for name, value in dataclasses.asdict(self).items())])
