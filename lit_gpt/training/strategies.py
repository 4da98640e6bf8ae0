"""How the processes of a run are started and share a model: Fabric on the devices that there are, with DDP, FSDP2 or neither.

Decisions: one device needs no strategy; several hold a model each (DDP) or, from a size on, shards of one (FSDP2),
whatever kind of devices they are; under a launcher its environment decides, and flags may not contradict it. Lightning is
imported late, so that a program without training does not wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_gpt import processes
from lit_gpt.devices import (
    default_precision,
    group_backend,
    keep_freed_memory,
    use_expandable_segments,
)
from lit_gpt.model.layers import Transformer, rope_tables
from lit_gpt.processes import LaunchedWorld, connect_after_restart, launched_world, training_timeout

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.precision import Precision

SHARD_FROM_PARAMETERS = 10**9
"""Parameters, embedding and head included, from which `--strategy auto` shards. Weights, gradients and AdamW's moments take
16 bytes of each on every device of DDP: 16 GB here, a fifth of an H100. Below, DDP's one all-reduce a step is the least
to send; above, what sharding frees holds larger micro batches."""

# More than any machine has cores; a slip of the hand would start them all.
_MOST_CPU_PROCESSES = 512


def start_fabric(
    accelerator: str, devices: str, num_nodes: int, strategy: str, precision: str, parameters: int = 0
) -> Fabric:
    """Create Fabric for what is there and start its processes.

    Args:
        accelerator: `auto`, `cpu`, `cuda` (or `gpu`).
        devices: `auto` (all GPUs, or one CPU process) or a count.
        num_nodes: machines.
        strategy: one of `training.settings.STRATEGIES`.
        precision: one of `training.settings.PRECISIONS`.
        parameters: of the model, embedding and head included: decides what `auto` is.

    Raises:
        ValueError: CUDA asked for but absent, more devices than there are, or a flag contradicts the launcher.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    # Its "Initializing distributed" lines would stand around our one-line errors.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    use_expandable_segments()
    through_fabric = os.environ.get("LT_CLI_USED") == "1"
    values = {"accelerator": accelerator, "devices": devices, "precision": precision}
    if through_fabric:
        values = {name: _launcher_value(name, value) for name, value in values.items()}
        # Fabric refuses objects beside the launcher's words for them, so the words are taken away.
        os.environ.pop("LT_PRECISION", None)
        launched_strategy = os.environ.pop("LT_STRATEGY", None)
        strategy = launched_strategy if strategy == "auto" and launched_strategy else strategy
    values["devices"] = _device_count(values["devices"])
    world = launched_world()
    if world is not None:
        values["devices"] = _world_devices(world, values["devices"])
        num_nodes = _world_nodes(world, num_nodes)
    kind, count = _resolve_devices(values["accelerator"], values["devices"])
    name = default_precision(kind) if values["precision"] == "auto" else values["precision"]
    environment: Any = TorchElasticEnvironment() if world is not None else LightningEnvironment()
    plugin = _precision(name, kind)
    fabric = Fabric(
        accelerator=kind if "LT_ACCELERATOR" not in os.environ or not through_fabric else "auto",
        devices=count if "LT_DEVICES" not in os.environ or not through_fabric else "auto",
        num_nodes=num_nodes,
        strategy=_strategy(strategy_name(strategy, count * num_nodes, parameters), kind, count, num_nodes, name),
        precision=name if plugin is None else None,  # type: ignore[arg-type]
        plugins=[environment] if plugin is None else [environment, plugin],
    )
    if not through_fabric:
        if world is not None:
            connect_after_restart(group_backend(kind))
        with _watch_start(getattr(fabric.strategy.launcher, "procs", [])):
            fabric.launch()
            # Everyone is connected before anyone may fail: who waits for a process that is gone waits for half an hour.
            fabric.barrier()
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    return fabric


@contextlib.contextmanager
def _watch_start(started: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Until all processes are connected: end the run, in one line, when one that Lightning has started from here ends.

    Lightning's own watch would kill this process without a word, later on while it saves the last step, too. It is
    relieved of its list. Once connected, the next collective tells that a process is gone.
    The processes are noted, because one of them may tell of an error before this one does.

    Args:
        started: Lightning's list, still empty.
    """
    connected, children = threading.Event(), []

    def watch() -> None:
        while not connected.wait(0.2):
            while started:
                children.append(started.pop(0))
            codes = {rank: code for rank, child in enumerate(children, start=1) if (code := child.poll())}
            for rank, code in codes.items():
                if code < 0:  # otherwise it has said why itself
                    name = signal.Signals(-code).name
                    line = f"error: process {rank} was ended by {name} while the processes were starting"
                    print(line, file=sys.stderr, flush=True)
                processes.end_children()
                os._exit(max(code, 1))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        connected.set()
        thread.join()
        processes.note_started(child.pid for child in (*children, *started))
        started.clear()


# --- what the flags and the launcher say ------------------------------------------------------------------------------


def _device_count(devices: str) -> str:
    """`--devices`, with a launcher's list of device numbers as their count."""
    return str(len(devices.split(","))) if re.fullmatch(r"\d+(,\d+)+", devices) else devices


def _world_devices(world: LaunchedWorld, devices: str) -> str:
    """How many devices of this machine the launcher's processes use, one each."""
    if devices not in ("auto", "-1", str(world.local_size)):
        raise ValueError(
            f"--devices {devices} but {world.launcher} started {world.local_size} process(es) on this machine: leave it out"
        )
    return str(world.local_size)


def _world_nodes(world: LaunchedWorld, num_nodes: int) -> int:
    """How many machines the launcher's processes are on."""
    if num_nodes not in (1, world.nodes):
        raise ValueError(f"--nodes_num {num_nodes} but {world.launcher} started {world.nodes} node(s): leave it out")
    return world.nodes


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
    if devices in ("auto", "-1"):
        return kind, max(1, gpus) if kind == "cuda" else 1
    if not re.fullmatch("[0-9]{1,18}", devices) or int(devices) < 1:
        raise ValueError(f"--devices {devices}: expected auto or a count of at least 1")
    if kind == "cpu" and int(devices) > _MOST_CPU_PROCESSES:
        raise ValueError(f"--devices {devices}: at most {_MOST_CPU_PROCESSES} processes on a machine's CPU")
    if kind == "cuda" and int(devices) > gpus:
        raise ValueError(f"--devices {devices}: this machine has {gpus} CUDA device(s)")
    return kind, int(devices)


# --- precision --------------------------------------------------------------------------------------------------------


def _precision(name: str, kind: str) -> Precision | None:
    """Fabric's plugin of a precision that leaves a batch as it is; None where Fabric's own does.

    Fabric's own round a batch's numbers to bfloat16 where DDP wraps the model: the loss's weights would lose up to 0.4 %.
    """
    from lightning_fabric.plugins.precision import HalfPrecision, MixedPrecision

    class Autocast(MixedPrecision):
        def convert_input(self, data: Any) -> Any:
            return data

    class Bfloat16(HalfPrecision):
        def convert_input(self, data: Any) -> Any:
            return data

    if name == "bf16-mixed":
        return Autocast("bf16-mixed", kind)
    return Bfloat16("bf16-true") if name == "bf16-true" else None


# --- strategies -------------------------------------------------------------------------------------------------------


def strategy_name(asked: str, processes: int, parameters: int) -> str:
    """What `--strategy` says; for `auto` on several devices DDP, or FSDP2 for a large model."""
    if asked != "auto" or processes == 1:
        return asked
    return "fsdp" if parameters >= SHARD_FROM_PARAMETERS else "ddp"


def _strategy(name: str, kind: str, count: int, num_nodes: int, precision: str) -> Any:
    """Fabric's strategy of a name."""
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

    backend, timeout = group_backend(kind), training_timeout()
    if name in ("fsdp", "hybrid"):
        return ModelParallelStrategy(
            parallelize_fn=functools.partial(
                _shard, replicas=num_nodes if name == "hybrid" else 1, mixed=precision == "bf16-mixed"
            ),
            data_parallel_size=count * num_nodes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
            timeout=timeout,
        )
    if name != "ddp":
        return name
    # Views: gradients lie in what is sent, instead of beside it. The buffers are the rotary tables, which are constants.
    # No static graph: torch 2.13 fails with it (an assertion of its own) where the first step has several micro batches, and
    # what it spares, the search for parameters without gradients, is off.
    return DDPStrategy(
        process_group_backend=backend, timeout=timeout, gradient_as_bucket_view=True, forward_sync_buffers=False
    )


def _shard(model: Any, mesh: Any, replicas: int, mixed: bool) -> Any:
    """Shard a `model.layers.Transformer` by block; consecutive processes hold one of several replicas.

    With `mixed`, blocks are gathered in bfloat16 while shards, gradients that accumulate and their reduction stay float32.
    Autocast then finds the blocks' matrices in bfloat16 and casts activations only. Embedding, final norm and head are
    gathered as they are: the residual stream starts from the one, the loss adds up the other's gradient in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    data_mesh = mesh["data_parallel"]
    if replicas > 1:
        shape, names = (replicas, data_mesh.size() // replicas), ("replicate", "shard")
        data_mesh = init_device_mesh(mesh.device_type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy()
    if mixed:
        # Inputs stay: the residual stream and the rotary tables are float32.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=data_mesh, mp_policy=policy)
    fully_shard(model, mesh=data_mesh)
    if model.lm_head.weight.is_meta:
        # Memory for the shards, before Fabric has every linear layer draw weights of its own.
        model.to_empty(device=data_mesh.device_type)
    register_fsdp_forward_method(model, "weighted_nll")
    return model


def set_up_model(fabric: Fabric, module: Transformer) -> Any:
    """The module as Fabric trains it, with its loss among the methods that it wraps.

    One on the meta device gets memory (under FSDP2 this process's shards alone) without values: `fill_weights` is next.
    """
    from lightning_fabric.strategies import ModelParallelStrategy

    if module.lm_head.weight.is_meta and not isinstance(fabric.strategy, ModelParallelStrategy):
        module.to_empty(device=fabric.device)
    model = fabric.setup_module(module)
    model.mark_forward_method("weighted_nll")
    return model


@torch.no_grad()
def fill_weights(module: Transformer, value: Callable[[str], Tensor] | None) -> None:
    """Compute the rotary tables, and set every parameter, or this process's rows of it.

    Args:
        module: as `set_up_model` left it.
        value: a parameter's name to all its values on the host, one parameter at a time; None sets zeros.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    for table, angles in zip((module.rope_cos, module.rope_sin), rope_tables(module.config), strict=True):
        table.copy_(angles)
    for name, parameter in module.named_parameters():
        if value is None:
            parameter.zero_()
        elif isinstance(parameter, DTensor):
            # All processes have the same values, so each takes its rows of its own.
            parameter.copy_(
                distribute_tensor(value(name), parameter.device_mesh, parameter.placements, src_data_rank=None)
            )
        else:
            parameter.copy_(value(name))


def keep_gathered(model: Any, after_forward: bool, after_backward: bool) -> None:
    """Let the blocks of a sharded model keep their gathered parameters after passes; does nothing to other models.

    Between micro batches of a step the parameters do not change: gathering them once is enough.

    Args:
        model: as Fabric set it up.
        after_forward: keep them for the backward pass.
        after_backward: keep them, and the rest of the model's, for the next micro batch.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model.module, FSDPModule):
        return
    model.module.set_reshard_after_backward(not after_backward)
    for block in model.transformer.h:
        block.set_reshard_after_forward(not after_forward)
