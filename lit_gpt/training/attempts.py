"""Work that may fail for want of memory, or of a compiler: it counts as done when every process has done it.

Processes that train together must make the same collective calls, so none may choose alone what to do after a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch

from lit_gpt.devices import is_out_of_memory

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Longer than processes are apart after compiling; shorter than half an hour's wait for one that failed alone.
_AGREEMENT_TIMEOUT = timedelta(minutes=10)


class Outcome(IntEnum):
    """How an attempt ended, the worst first: of several processes' the least counts."""

    NO_COMPILER = 0
    OUT_OF_MEMORY = 1
    DONE = 2


class Attempts:
    """Attempts of all processes together.

    Args:
        fabric: launched; every process makes one of these at the same time.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.compiler_error = ""
        """Name of the error by which torch.compile failed last."""
        # Of its own, and on CPUs: a process that failed must not meet the others in the middle of their collectives.
        self._group = None
        if fabric.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=_AGREEMENT_TIMEOUT)

    def outcome(self, work: Callable[[], object], compiler_may_fail: bool = False) -> Outcome:
        """Do some work and agree on how it ended.

        Raises:
            ValueError: only this process ran out of memory, while the others wait for it in the middle of the work.
        """
        own = Outcome.DONE
        try:
            work()
        except Exception as error:
            if is_out_of_memory(error):
                own = Outcome.OUT_OF_MEMORY
            elif compiler_may_fail and _is_compiler_error(error):
                own = Outcome.NO_COMPILER
                self.compiler_error = type(error).__name__
            else:
                raise
        # Behind the except clause: an error's traceback holds the tensors of the frames it went through.
        try:
            return Outcome(self.least(own))
        except RuntimeError:
            if own != Outcome.OUT_OF_MEMORY:
                raise
        raise ValueError(
            f"process {self.fabric.global_rank} alone ran out of memory: give a smaller --micro_batch_size, or leave its "
            "device to this run"
        )

    def least(self, value: int) -> int:
        """The least of all processes' values."""
        if self._group is None:
            return value
        least = torch.tensor(value)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=self._group)
        return int(least)


def reset_passes(fabric: Fabric, model: Any) -> bool:
    """Make a set-up model sound again after a forward or backward pass that an error ended; its gradients are lost.

    FSDP2 and DDP keep the state of a pass with the model, and an error leaves it halfway: FSDP2 would never reduce a
    gradient again, DDP would refuse the next pass.

    Returns:
        Whether it is sound. If not, Fabric has to set the module up anew, with nothing left of the old wrapper.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model.module, FSDPModule):
        model.module.reset_iter_state()
        return True
    return fabric.world_size == 1


def _is_compiler_error(error: BaseException) -> bool:
    """Whether torch.compile itself failed (no compiler, no headers), not the arithmetic."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
