"""Devices, processes, precision, signals and memory: what a program asks of the machine that it runs on.

Decisions: whatever devices there are, not eight; one device needs no strategy, several GPUs shard with FSDP2, several CPU
processes use DDP (or FSDP2 by flag); under the launcher its environment decides and flags may not contradict it. Lightning
is imported late, so that a program without training does not wait for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from lit_gpt.processes import EVALUATION_TIMEOUT_S, LaunchedWorld, connect_after_restart, launched_world

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# More than any machine has cores; a slip of the hand would start them all.
_MOST_CPU_PROCESSES = 512


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


def start_fabric(accelerator: str, devices: str, num_nodes: int, strategy: str, precision: str) -> Fabric:
    """Create Fabric for what is there and start its processes.

    Args:
        accelerator: `auto`, `cpu`, `cuda` (or `gpu`).
        devices: `auto` (all GPUs, or one CPU process) or a count.
        num_nodes: machines.
        strategy: one of `training.settings.STRATEGIES`.
        precision: one of `training.settings.PRECISIONS`.

    Raises:
        ValueError: CUDA asked for but absent, more devices than there are, or a flag contradicts the launcher.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    # Its "Initializing distributed" lines would stand around our one-line errors.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    through_fabric = os.environ.get("LT_CLI_USED") == "1"
    values = {"accelerator": accelerator, "devices": devices, "precision": precision}
    if through_fabric:
        values = {name: _launcher_value(name, value) for name, value in values.items()}
        # Fabric refuses a strategy object beside the launcher's word for it, so the word is taken away.
        launched_strategy = os.environ.pop("LT_STRATEGY", None)
        if strategy == "auto" and launched_strategy:
            strategy = launched_strategy
    world = launched_world()
    if world is not None:
        values["devices"] = _world_devices(world, values["devices"])
        num_nodes = _world_nodes(world, num_nodes)
    kind, count = _resolve_devices(values["accelerator"], values["devices"])
    if values["precision"] == "auto":
        values["precision"] = default_precision(kind)
    fabric = Fabric(
        accelerator=kind if "LT_ACCELERATOR" not in os.environ or not through_fabric else "auto",
        devices=count if "LT_DEVICES" not in os.environ or not through_fabric else "auto",
        num_nodes=num_nodes,
        strategy=_strategy(strategy, kind, count, num_nodes),
        precision=values["precision"],  # type: ignore[arg-type]
        plugins=[TorchElasticEnvironment() if world is not None else LightningEnvironment()],
    )
    if not through_fabric:
        if "LOCAL_RANK" in os.environ:
            threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        if world is not None:
            connect_after_restart(group_backend(kind))
        fabric.launch()
        # Everyone is connected before anyone may fail: who waits for a process that is gone waits for half an hour.
        fabric.barrier()
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    return fabric


def _world_devices(world: LaunchedWorld, devices: str) -> str:
    """How many devices of this machine the launcher's processes use, one each."""
    count = str(len(devices.split(","))) if re.fullmatch(r"\d+(,\d+)+", devices) else devices
    if count not in ("auto", "-1", str(world.local_size)):
        raise ValueError(
            f"--devices {devices} but {world.launcher} started {world.local_size} process(es) on this machine: leave it out"
        )
    return str(world.local_size)


def _world_nodes(world: LaunchedWorld, num_nodes: int) -> int:
    """How many machines the launcher's processes are on."""
    if num_nodes not in (1, world.nodes):
        raise ValueError(f"--nodes_num {num_nodes} but {world.launcher} started {world.nodes} node(s): leave it out")
    return world.nodes


def _strategy(name: str, kind: str, count: int, num_nodes: int) -> Any:
    """Fabric's strategy: what `--strategy` says, or FSDP2 on GPUs and DDP elsewhere; `auto` for one process."""
    from lightning_fabric.strategies import DDPStrategy

    if name == "auto" and count * num_nodes > 1:
        name = "fsdp" if kind == "cuda" else "ddp"
    backend = group_backend(kind)
    if name in ("fsdp", "hybrid"):
        return _sharded(count * num_nodes, num_nodes if name == "hybrid" else 1, backend)
    # Views: gradients lie in what is sent, instead of beside it.
    return DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True) if name == "ddp" else name


def group_backend(device_type: str) -> str:
    """What connects the processes of devices of a type: gloo for what is on CPUs, NCCL for what is on GPUs."""
    return "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"


def _end_with_parent(parent: int) -> None:
    """End this process when the one that started it is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _launcher_value(name: str, flag: str) -> str:
    """The launcher's setting, or the flag's where the launcher says nothing."""
    given = os.environ.get(f"LT_{name.upper()}")
    if given is None:
        return flag
    if flag != "auto" and flag != given:
        raise ValueError(f"--{name} {flag} contradicts the launcher's --{name}={given}: give it in one place")
    return given


def _resolve_devices(accelerator: str, devices: str) -> tuple[str, int]:
    """The device type and how many of this machine's are used."""
    if accelerator not in ("auto", "cpu", "cuda", "gpu"):
        raise ValueError(f"--accelerator {accelerator} is unknown: choose from auto, cpu, cuda")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator in ("cuda", "gpu") and not gpus:
        raise ValueError(
            f"--accelerator {accelerator}: no CUDA device is visible to torch {torch.__version__}; use cpu or auto"
        )
    kind = "cuda" if gpus and accelerator != "cpu" else "cpu"
    if re.fullmatch(r"\d+(,\d+)+", devices):
        devices = str(len(devices.split(",")))  # a launcher's list of device numbers
    if devices in ("auto", "-1"):
        return kind, max(1, gpus) if kind == "cuda" else 1
    if not re.fullmatch("[0-9]{1,18}", devices) or int(devices) < 1:
        raise ValueError(f"--devices {devices}: expected auto or a count of at least 1")
    if kind == "cpu" and int(devices) > _MOST_CPU_PROCESSES:
        raise ValueError(f"--devices {devices}: at most {_MOST_CPU_PROCESSES} processes on a machine's CPU")
    if kind == "cuda" and int(devices) > gpus:
        raise ValueError(f"--devices {devices}: this machine has {gpus} CUDA device(s)")
    return kind, int(devices)


def _sharded(world_size: int, replicas: int, backend: str) -> Any:
    """FSDP2: every block and the rest of the model are sharded over all processes, or over each of `replicas` equal runs."""
    from lightning_fabric.strategies import ModelParallelStrategy

    return ModelParallelStrategy(
        parallelize_fn=functools.partial(_shard, replicas=replicas),
        data_parallel_size=world_size,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
        process_group_backend=backend,
    )


def _shard(model: Any, mesh: Any, replicas: int) -> Any:
    """Shard a `model.layers.Transformer` by block; consecutive processes hold one of several replicas."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    data_mesh = mesh["data_parallel"]
    if replicas > 1:
        shape, names = (replicas, data_mesh.size() // replicas), ("replicate", "shard")
        data_mesh = init_device_mesh(mesh.device_type, shape, mesh_dim_names=names)
    for block in model.transformer.h:
        fully_shard(block, mesh=data_mesh)
    fully_shard(model, mesh=data_mesh)
    register_fsdp_forward_method(model, "weighted_nll")
    return model


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
    if fabric.world_size == 1:
        return flag
    flags = torch.tensor(int(flag))
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=_hosts())
    return bool(flags)


@functools.cache
def _hosts() -> Any:
    """All processes, connected for tensors in host memory."""
    return torch.distributed.new_group(backend="gloo")


def on_rank_zero(fabric: Fabric, work: Callable[[], Any]) -> Any:
    """Do file work on the first process; its result, or its error, is every process's."""
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
