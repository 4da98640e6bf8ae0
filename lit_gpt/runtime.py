"""The machine a run is on: devices, processes, precision, signals, memory, and where metrics are written.

Decisions: whatever devices there are, not eight; one device needs no strategy, several GPUs shard with FSDP2, several CPU
processes use DDP (or FSDP2 by flag); under the launcher its environment decides and flags may not contradict it. Metrics
always go to a CSV that a resumed run continues; TensorBoard and W&B only when asked for. Lightning is imported late, so
that `--help` is quick. May import files and nothing above.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import importlib.util
import io
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from lit_gpt.files import write_file

if TYPE_CHECKING:
    from lightning_fabric import Fabric

LOGGERS = ("csv", "tensorboard", "wandb")
# Memory that a micro batch may fill on a CPU, of what the machine has; the rest is for weights, files and other programs.
_CPU_MEMORY_SHARE = 0.4
# Tokens in a CPU's micro batch beyond which nothing gets faster (its caches are long exceeded).
_CPU_MICRO_BATCH_TOKENS = 8192


def default_precision(device_type: str) -> str:
    """bf16-mixed where the device multiplies bfloat16 natively (CUDA with bf16; CPU with AVX-512 bf16 or AMX), else float32."""
    if device_type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return "bf16-mixed"
    return "32-true"


def start_fabric(accelerator: str, devices: str, num_nodes: int, strategy: str, precision: str) -> Fabric:
    """Create Fabric for what is there and start its processes.

    Args:
        accelerator: `auto`, `cpu`, `cuda` (or `gpu`).
        devices: `auto` (all GPUs, or one CPU process) or a count.
        num_nodes: machines.
        strategy: one of `train_config.STRATEGIES`.
        precision: one of `train_config.PRECISIONS`.

    Raises:
        ValueError: CUDA asked for but absent, more devices than there are, or a flag contradicts the launcher.
    """
    from lightning_fabric import Fabric

    # Its "Initializing distributed" lines would stand around our one-line errors.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    launched = os.environ.get("LT_CLI_USED") == "1"
    values = {"accelerator": accelerator, "devices": devices, "precision": precision}
    if launched:
        values = {name: _launcher_value(name, value) for name, value in values.items()}
        launched_nodes = int(os.environ.get("LT_NUM_NODES", "1"))
        if num_nodes != launched_nodes:
            raise ValueError(
                f"--nodes_num {num_nodes} but the launcher started {launched_nodes} node(s): make them equal"
            )
        # Fabric refuses a strategy object beside the launcher's word for it, so the word is taken away.
        launched_strategy = os.environ.pop("LT_STRATEGY", None)
        if strategy == "auto" and launched_strategy:
            strategy = launched_strategy
    kind, count = _resolve_devices(values["accelerator"], values["devices"])
    if values["precision"] == "auto":
        values["precision"] = default_precision(kind)
    world_size = count * num_nodes
    if strategy == "auto" and world_size > 1:
        strategy = "fsdp" if kind == "cuda" else "ddp"
    fabric = Fabric(
        accelerator=kind if not launched or "LT_ACCELERATOR" not in os.environ else "auto",
        devices=count if not launched or "LT_DEVICES" not in os.environ else "auto",
        num_nodes=num_nodes,
        strategy=_sharded(world_size) if strategy == "fsdp" else strategy,
        precision=values["precision"],  # type: ignore[arg-type]
    )
    if not launched:
        if "LOCAL_RANK" in os.environ:
            threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        fabric.launch()
        # Everyone is connected before anyone may fail: who waits for a process that is gone waits for half an hour.
        fabric.barrier()
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    return fabric


def join_processes() -> tuple[int, int]:
    """This process's number and how many there are, as a launcher (torchrun, `lightning run model`) says, connected."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return int(os.environ.get("RANK", "0")), world_size


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
        raise ValueError(f"--device {name}: expected cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: torch sees no CUDA device here; use --device cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    return device


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
    if not devices.isdigit() or int(devices) < 1:
        raise ValueError(f"--devices {devices}: expected auto or a count of at least 1")
    if kind == "cuda" and int(devices) > gpus:
        raise ValueError(f"--devices {devices}: this machine has {gpus} CUDA device(s)")
    return kind, int(devices)


def _sharded(world_size: int) -> Any:
    """FSDP2: every block and the rest of the model are sharded over all processes."""
    from lightning_fabric.strategies import ModelParallelStrategy

    return ModelParallelStrategy(
        parallelize_fn=_shard, data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def _shard(model: Any, mesh: Any) -> Any:
    """Shard a `layers.Transformer` by block."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    data_mesh = mesh["data_parallel"]
    for block in model.transformer.h:
        fully_shard(block, mesh=data_mesh)
    fully_shard(model, mesh=data_mesh)
    register_fsdp_forward_method(model, "weighted_nll")
    return model


def all_reduce_sum(fabric: Fabric, values: Sequence[float]) -> list[float]:
    """Sums over all processes, in float64; the same list on each."""
    if fabric.world_size == 1:
        return [float(value) for value in values]
    total = fabric.all_reduce(torch.tensor(values, dtype=torch.float64, device=fabric.device), reduce_op="sum")
    return [float(value) for value in total.tolist()]  # type: ignore[union-attr]


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


def weighted_nll(fabric: Fabric, model: Any, *batch: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """`Transformer.weighted_nll` of a set-up model, in the run's precision.

    Fabric turns autocast on in `forward` alone, unless it wraps the model for several devices: without this, one device
    would compute in float32 whatever --precision says.
    """
    with fabric.autocast():
        return model.weighted_nll(*batch)  # type: ignore[no-any-return]


def precision_name(fabric: Fabric) -> str:
    """One of `train_config.PRECISIONS` without auto: what Fabric computes in."""
    return str(fabric.strategy.precision.precision)


class StopSignals:
    """Turns SIGTERM and Ctrl-C into a wish that the loop looks at between steps; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    @property
    def came(self) -> bool:
        """Whether a signal came to this process."""
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch failed for want of memory, on either kind of device."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def largest_that_fits(candidates: Iterable[int], attempt: Callable[[int], object]) -> int:
    """The last of ascending sizes for which `attempt` does not run out of memory.

    Raises:
        ValueError: not even the first fits.
    """
    best = 0
    for size in candidates:
        try:
            attempt(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            break
        best = size
    if not best:
        raise ValueError(
            "not even one sequence fits into memory: use --activation_checkpointing true or a smaller model"
        )
    return best


def micro_batch_candidates(device_rows: int, tokens: int, bytes_per_token: float, device: torch.device) -> list[int]:
    """Divisors of a device's rows, ascending, that are worth trying.

    On a GPU all of them (memory is found by trying); on a CPU the largest whose activations fit a share of the machine's
    memory by estimate, since running out of it would not raise but end the process, up to the size where speed levels
    off. It depends on the machine, not on its load, so that the same command makes the same choice.
    """
    divisors = [size for size in range(1, device_rows + 1) if device_rows % size == 0]
    if device.type == "cuda":
        return divisors
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    fits = int(memory * _CPU_MEMORY_SHARE / processes / (bytes_per_token * tokens))
    limit = max(1, min(fits, _CPU_MICRO_BATCH_TOKENS // tokens))
    return [max(size for size in divisors if size <= limit)]


class MetricsCsv:
    """One row per logged step in a CSV; reopening it at a step drops the rows behind that step and goes on."""

    def __init__(self, path: Path, columns: Sequence[str], resume_step: int | None) -> None:
        self.path, self.columns = path, list(columns)
        rows: list[dict[str, str]] = []
        if resume_step is not None and path.exists():
            with path.open(newline="") as file:
                # A row that a kill cut short has no step or too few columns.
                rows = [
                    row
                    for row in csv.DictReader(file)
                    if None not in row.values() and (row["step"] or "x").isdigit() and int(row["step"]) <= resume_step
                ]
        path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_file(path, lambda file: file.write(text.getvalue().encode()))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append a row; columns without a value stay empty."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, extrasaction="ignore").writerow({"step": step, **metrics})


class WandbLogger:
    """A run in W&B's project `scaling`; a resumed run of the same folder goes on in it."""

    def __init__(self, folder: Path, run_name: str, settings: dict[str, Any]) -> None:
        import wandb

        run_id = re.sub(r"\W", "-", f"{run_name}-{folder.name}")
        self._run = wandb.init(project="scaling", name=run_name, id=run_id, dir=folder, config=settings, resume="allow")

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""
        self._run.log(metrics, step=step)

    def finalize(self, status: str) -> None:
        """Send what is left."""
        self._run.finish()


def next_version(folder: Path) -> Path:
    """`version_N` for the first N that no earlier run used."""
    used = [int(path.name[8:]) for path in folder.glob("version_*") if path.name[8:].isdigit()]
    return folder / f"version_{max(used, default=-1) + 1}"


def extra_loggers(names: Sequence[str], folder: Path, run_name: str, settings: dict[str, Any]) -> list[Any]:
    """TensorBoard and W&B loggers, if asked for.

    Args:
        names: of LOGGERS; `csv` is always on.
        folder: the run's log folder.
        run_name: the name in W&B's project `scaling`.
        settings: shown beside the run.

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    loggers: list[Any] = []
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"--logger {name} is unknown: choose from {', '.join(LOGGERS)}")
        if name != "csv" and not importlib.util.find_spec(name):
            raise ValueError(f"--logger {name}: the package is not installed; pip install 'smdm[loggers]'")
        if name == "tensorboard":
            from lightning_fabric.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(root_dir=folder, name="tensorboard", version=""))
        elif name == "wandb":
            loggers.append(WandbLogger(folder, run_name, settings))
    return loggers


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
