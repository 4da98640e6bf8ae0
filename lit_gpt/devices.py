"""Devices, precision, agreement of processes, signals and memory: what a program asks of the machine that it runs on.

How training's processes are started and share a model is in `training.strategies`.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from lit_gpt.processes import EVALUATION_TIMEOUT_S, launched_world

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def has_native_bf16(device_type: str) -> bool:
    """Whether this machine's devices of a type (`cpu`, `cuda`) multiply bfloat16 in hardware; emulation does not count.

    CUDA: compute capability 8.0 (Ampere) and later, as torch says. CPU: AVX-512 bf16 or AMX.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def default_precision(device_type: str) -> str:
    """What `--precision auto` trains in: bf16-mixed where bfloat16 is native, else 32-true."""
    return "bf16-mixed" if has_native_bf16(device_type) else "32-true"


def use_expandable_segments() -> None:
    """Let a GPU's allocator grow its blocks in place, unless the user has configured it; call it before tensors are there.

    Micro batches of many lengths otherwise leave gaps that no later tensor fits into.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def choose_device(name: str | None) -> torch.device:
    """The device asked for by `--device` (cpu, cuda, cuda:N), or with `auto` or None a GPU if there is one.

    Raises:
        ValueError: CUDA was asked for and torch sees none, or the name is no device.
    """
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(str(name))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        use_expandable_segments()
        launched_world()  # srun's tasks learn their LOCAL_RANK
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s)")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    return device


def group_backend(device_type: str) -> str:
    """What connects the processes of devices of a type: gloo for what is on CPUs, NCCL for what is on GPUs."""
    return "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"


def join_processes() -> tuple[int, int]:
    """This process's number and how many there are, as a launcher (torchrun, srun, `lightning run model`) says, connected."""
    world = launched_world()
    if world is None:
        return 0, 1
    if world.size > 1 and not torch.distributed.is_initialized():
        backend = group_backend("cuda" if torch.cuda.is_available() else "cpu")
        timeout = datetime.timedelta(seconds=EVALUATION_TIMEOUT_S)
        torch.distributed.init_process_group(backend, timeout=timeout)
    return world.rank, world.size


def precision_name(fabric: Fabric) -> str:
    """One of `training.settings.PRECISIONS` without auto: what Fabric computes in."""
    return str(fabric.strategy.precision.precision)


def all_reduce_sum(fabric: Fabric, values: Sequence[float]) -> list[float]:
    """Sums over all processes, in float64; the same list on each."""
    if fabric.world_size == 1:
        return [float(value) for value in values]
    total = fabric.all_reduce(torch.tensor(values, dtype=torch.float64, device=fabric.device), reduce_op="sum")
    return [float(value) for value in total.tolist()]  # type: ignore[union-attr]


def any_process(fabric: Fabric, flag: bool) -> bool:
    """Whether the flag is set on a process; asks the hosts, so that no GPU is waited for."""
    return bool(largest_of_processes(fabric, [flag])[0])


def largest_of_processes(fabric: Fabric, values: Sequence[float]) -> list[float]:
    """Each value's largest over all processes, in float64; asks the hosts, so that no GPU is waited for."""
    if fabric.world_size == 1:
        return [float(value) for value in values]
    largest = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return [float(value) for value in largest.tolist()]


def on_rank_zero(fabric: Fabric, work: Callable[[], Any]) -> Any:
    """Do work on the first process; its result, or its error, is every process's."""
    outcome: tuple[Any, Exception | None] = (None, None)
    if fabric.is_global_zero:
        try:
            outcome = (work(), None)
        except (ValueError, OSError) as error:
            outcome = (None, error)
    result, failure = fabric.broadcast(outcome) if fabric.world_size > 1 else outcome
    if failure is not None:
        raise failure
    return result


def say(fabric: Fabric, line: str) -> None:
    """Print a line on the first process, at once; a full disk or a lost terminal behind standard output is no error."""
    if fabric.is_global_zero:
        try:
            print(line, flush=True)
        except BrokenPipeError:
            raise  # who reads the output has had enough
        except OSError:
            pass


class StopSignals:
    """Notes SIGTERM, Ctrl-C and a lost terminal for the loop, which looks between two steps.

    A second Ctrl-C raises KeyboardInterrupt. A lost terminal (SIGHUP) that `nohup` ignores stays ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}

    def agreed(self, fabric: Fabric) -> int:
        """The signal that came to any process, the same for all to act upon; 0 where none did."""
        return (self.received or signal.SIGTERM) if any_process(fabric, self.received is not None) else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def keep_freed_memory() -> None:
    """Let the C library keep blocks that are freed, for the next step to use; does nothing where it is not glibc.

    By default it gives large blocks back to the system and gets them again empty: 96,000 page faults in each step of size
    19 on 4x256 tokens, 452 ms instead of 348 in bf16. The peak of memory stays what it is.
    """
    # From malloc.h: the size from which a block gets pages of its own, and the free space at the top that is given back.
    mmap_threshold, trim_threshold = -3, -1
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch failed for want of memory, on either kind of device."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def check_halvable(error: RuntimeError, rows: int, length: int, device: torch.device | str) -> None:
    """Let a batch that failed be computed in halves, if memory was the reason and there is more than one row.

    Args:
        error: how it failed.
        rows: of the batch.
        length: tokens of its longest row.
        device: where it was computed.

    Raises:
        RuntimeError: the error itself, where memory was not the reason.
        ValueError: a single row does not fit into memory.
    """
    if not is_out_of_memory(error):
        raise error
    if rows == 1:
        raise ValueError(f"a row of {length} tokens does not fit into the memory of {device}") from None
