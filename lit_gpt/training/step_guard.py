"""The numbers of training steps, kept on the device until the log, and the rule that no bad one moves a parameter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StepNumbers(NamedTuple):
    """What is known of a step once the host asks."""

    step: int
    """From 1."""
    loss: float
    """Mean over the step's groups."""
    grad_norm: float
    """Before clipping."""


class StepGuard:
    """Judges every step on the device, so that the host can go on and ask at the next line of the log.

    A step is bad when its loss or gradient norm is not finite, or when it has a loss and no gradient (where nothing is
    scored both are 0, rightly). From the first bad step on `skip` is 1, and the optimizer leaves parameters and state as
    they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.skip = torch.zeros((), device=device)
        """1 where no update may happen: what a fused optimizer of torch knows as `found_inf`."""
        # Step, loss and norm of the first bad step (step 0: none) and of the newest, in one tensor: one copy to the host.
        self._numbers = torch.zeros((2, 3), dtype=torch.float64, device=device)

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Take a step's loss and gradient norm (scalars on the device) in.

        Args:
            step: from 1.
            loss: the same on every process.
            grad_norm: likewise.
        """
        newest = torch.stack((torch.full_like(loss, step, dtype=torch.float64), loss.double(), grad_norm.double()))
        bad = ~newest.isfinite().all() | ((grad_norm == 0) & (loss != 0))
        first = torch.where(bad & (self.skip == 0), newest, self._numbers[0])
        self._numbers = torch.stack((first, newest))
        self.skip.copy_(torch.where(bad, 1.0, self.skip))

    def read(self) -> tuple[StepNumbers, StepNumbers | None]:
        """The newest step's numbers, and those of the first bad one, if there is any; the host waits here."""
        first, newest = (StepNumbers(int(step), *rest) for step, *rest in self._numbers.tolist())
        return newest, first if first.step else None
