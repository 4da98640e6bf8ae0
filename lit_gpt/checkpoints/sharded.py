"""Large checkpoints: every process writes its share into a folder, in the background, and any number of processes reads it.

Decisions: torch.distributed.checkpoint plans who writes and who reads which rows, so that what four processes saved is
restored by two, by one, or under another strategy; the state is copied to host memory, which is all that training waits
for, and written by a thread that has a process group of its own (two threads must not share one: their messages would meet
in any order); the folder gets its marker and its name when all have written, so a kill never leaves a half one.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_gpt import devices
from lit_gpt.checkpoints.markers import checkpoint_path, marker_path, new_marker
from lit_gpt.checkpoints.optimizer_state import MOMENTS, check_moment, keep_speed, misfit, read_optimizer_state
from lit_gpt.checkpoints.run_files import PUBLISHED_KEYS, CheckpointInfo, finish_folder, temporary_folder
from lit_gpt.checkpoints.shard_files import SavedTensor, read_index, read_tensor
from lit_gpt.checkpoints.tensor_checks import check_finite, check_state
from lit_gpt.files import FileStamp, read_json_object

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Names in the shards: `model.{parameter}` and `optimizer.{parameter}.{entry}`.
_MODEL, _OPTIMIZER = "model.", "optimizer."


def state_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of a run by their names in the shards; DTensors where FSDP2 holds them. They are not copied."""
    tensors = {f"{_MODEL}{name}": value for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        entries = optimizer.state.get(parameter, {})
        tensors.update({f"{_OPTIMIZER}{name}.{entry}": value for entry, value in entries.items()})
    return tensors


# --- saving -------------------------------------------------------------------------------------------------------


class ShardedSaves:
    """Saves a run's sharded checkpoints in the background, one at a time."""

    def __init__(self) -> None:
        self._thread: _SaveThread | None = None
        self._group: Any = None
        self._stager: Any = None

    @property
    def written(self) -> bool:
        """Whether this process has nothing left to do for the pending save."""
        return self._thread is None or not self._thread.is_alive()

    def start(
        self,
        fabric: Fabric,
        run_dir: Path,
        state: dict[str, Any],
        record: dict[str, Any],
        committed: Callable[[Path], object],
        alone: bool = False,
    ) -> None:
        """Copy the state to the host, and have it written from there; every process calls it, or with `alone` the first.

        Args:
            fabric: one device, DDP, or FSDP2.
            run_dir: all processes see it; its lock is held by the first.
            state: `model` and `optimizer`, neither wrapped; and plain values: hparams, iter_num, step_count ...
            record: what the run is, as JSON values.
            committed: called with the folder when it is whole, on the first process, in the background.
            alone: the other processes do not take part; the model is not sharded.

        Raises:
            SaveError: the folder cannot be made; on every process.
        """
        assert self._thread is None, "the save before was not looked at"
        module, optimizer = state["model"], state["optimizer"]
        path = checkpoint_path(run_dir, state["iter_num"], sharded=True)
        description = {
            "values": {key: value for key, value in state.items() if key not in ("model", "optimizer")},
            "param_groups": _named_groups(module, optimizer),
        }
        json.dumps([description, record])  # fails here, before anything is written, if a value is no JSON
        unfinished = temporary_folder(path) if alone else devices.on_rank_zero(fabric, lambda: temporary_folder(path))
        if self._group is None and fabric.world_size > 1 and not alone:
            self._group = torch.distributed.new_group(backend="gloo")
        share = (0, 1) if alone else (fabric.global_rank, fabric.world_size)
        staged = self._staged(_own_share(state_tensors(module, optimizer), *share), fabric.device)

        def commit(stamps: dict[str, FileStamp]) -> None:
            marker = new_marker(state["step_count"], state["iter_num"], record, stamps)
            finish_folder(unfinished, path, {**marker, **description})
            committed(path)

        group = None if alone else self._group
        self._thread = _SaveThread(staged, unfinished, commit, group, leads=alone or fabric.is_global_zero)
        self._thread.start()

    def wait(self) -> float:
        """Wait until the pending save is written by all processes.

        Returns:
            Seconds that it took in all.

        Raises:
            SaveError: it could not be written; on every process. Earlier checkpoints are untouched.
        """
        assert self._thread is not None
        thread = self._thread
        thread.join()
        self._thread = None
        if thread.error is not None:
            raise thread.error
        return thread.seconds

    def _staged(self, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Copies in host memory, which is kept for the next save."""
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        if self._stager is None:
            gpu = device.type == "cuda"
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=gpu
                )
            )
        return dict(self._stager.stage(tensors))


class _SaveThread(threading.Thread):
    """Writes what is staged; a daemon, so that a second Ctrl-C ends the process at once."""

    def __init__(
        self,
        staged: dict[str, Tensor],
        folder: Path,
        commit: Callable[[dict[str, FileStamp]], None],
        group: Any,
        leads: bool,
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._staged, self._folder, self._commit, self._group, self._leads = staged, folder, commit, group, leads
        self._started_at = time.perf_counter()
        self.seconds = 0.0
        self.error: BaseException | None = None

    def run(self) -> None:
        """Write, commit; the error of any process becomes everyone's."""
        from torch.distributed import checkpoint as dcp

        from lit_gpt.checkpoints.sharded_storage import ShardWriter

        try:
            if self._group is None:
                _allow_without_group()
            writer = ShardWriter(self._folder, self._commit)
            dcp.save(self._staged, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except BaseException as error:
            self.error = _cause(error)
            if self._leads:
                shutil.rmtree(self._folder, ignore_errors=True)
        self.seconds = time.perf_counter() - self._started_at


def _named_groups(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimizer's parameter groups, with parameters by name."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [{**group, "params": [names[one] for one in group["params"]]} for group in optimizer.param_groups]


def _own_share(tensors: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """What a process copies and writes: its shards, and of what all have (DDP's whole model) about as much as the others."""
    from torch.distributed.tensor import DTensor

    share: dict[str, Tensor] = {}
    loads = [0] * world_size
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        tensor = tensors[name]
        if isinstance(tensor, DTensor):
            share[name] = tensor
            continue
        least = loads.index(min(loads))
        loads[least] += tensor.nbytes + 1
        if least == rank:
            share[name] = tensor
    return share


def _allow_without_group() -> None:
    """Keep torch from warning that a single process saves or loads."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _cause(error: BaseException) -> BaseException:
    """The first process's own error where torch reports which processes failed."""
    failures = getattr(error, "failures", None)
    return failures[min(failures)][0] if failures else error


# --- restoring ----------------------------------------------------------------------------------------------------


def load_sharded(
    info: CheckpointInfo, module: nn.Module, optimizer: torch.optim.Optimizer, world_size: int
) -> dict[str, Any]:
    """Restore model and optimizer in place; every process calls it.

    Shapes and dtypes are compared before anything is read, values as they are read.

    Args:
        info: a folder of shards, whatever processes and strategy wrote it.
        module: neither wrapped; sharded by FSDP2, or whole.
        optimizer: its AdamW.
        world_size: processes that load.

    Returns:
        The plain values: hparams, iter_num, step_count, record ...

    Raises:
        ValueError: it does not fit the model, or holds what no run saves; the first fault is named.
    """
    values, groups = _read_values(info)
    index = read_index(info.shards)
    parameters = dict(module.named_parameters())
    entries = _checked_entries(info, index, groups, module, optimizer)
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": {}, "param_groups": entries["param_groups"]})
    for number, parameter in enumerate(one for group in optimizer.param_groups for one in group["params"]):
        if found := entries["state"].get(number):
            moments = {entry: torch.zeros_like(parameter).detach() for entry in MOMENTS}
            optimizer.state[parameter] = {"step": found["step"], **moments}
    keep_speed(optimizer, before)
    wanted = state_tensors(module, optimizer)
    steps = [f"{_OPTIMIZER}{name}.step" for name in parameters]  # read already
    _load(info, index, {name: value for name, value in wanted.items() if name not in steps}, world_size)
    return values


def _read_values(info: CheckpointInfo) -> tuple[dict[str, Any], Any]:
    """A folder's plain values, its record among them; and the optimizer's parameter groups, unchecked."""
    description = read_json_object(marker_path(info.path))
    values = description.get("values")
    plain = [key for key in PUBLISHED_KEYS if key not in ("model", "optimizer")]
    if not isinstance(values, dict) or any(key not in values for key in plain):
        raise ValueError(f"{info.path} is no checkpoint: its marker lacks {', '.join(plain)}")
    if values["step_count"] != info.step or type(values["step_count"]) is not int:
        raise ValueError(
            f"{info.path} is of step {str(values['step_count'])[:40]}, its marker says {info.step}: one is damaged"
        )
    return {**values, "record": info.record}, description.get("param_groups")


def _checked_entries(
    info: CheckpointInfo,
    index: dict[str, SavedTensor],
    groups: Any,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """The optimizer's state with steps read and moments still on the meta device, after all shapes were compared."""
    described = {name: torch.empty(saved.shape, dtype=saved.dtype, device="meta") for name, saved in index.items()}
    model = {name.removeprefix(_MODEL): value for name, value in described.items() if name.startswith(_MODEL)}
    check_state(info.path, model, {name: tuple(value.shape) for name, value in module.state_dict().items()})
    state: dict[str, dict[str, Tensor]] = {}
    for name, value in described.items():
        if name.startswith(_OPTIMIZER):
            parameter, _, entry = name.removeprefix(_OPTIMIZER).rpartition(".")
            is_step = entry == "step" and not value.shape
            state.setdefault(parameter, {})[entry] = read_tensor(index[name], name) if is_step else value
        elif not name.startswith(_MODEL):
            raise ValueError(f"{info.path} is no checkpoint of a run: it holds {name[:80]}")
    saved = {"state": state, "param_groups": groups}
    return read_optimizer_state(info.path, saved, module, optimizer, info.step)


def _load(info: CheckpointInfo, index: dict[str, SavedTensor], into: dict[str, Any], world_size: int) -> None:
    """Read tensors in place, each process its rows."""
    from torch.distributed import checkpoint as dcp

    from lit_gpt.checkpoints.sharded_storage import ShardReader

    def check(name: str, rows: Tensor) -> None:
        if not rows.numel():
            return
        if name.startswith(_MODEL):
            check_finite(info.path, {name.removeprefix(_MODEL): rows})
            return
        parameter, _, entry = name.removeprefix(_OPTIMIZER).rpartition(".")
        try:
            check_moment(entry, parameter, rows)
        except ValueError as error:
            raise misfit(info.path, error) from error

    if world_size == 1:
        _allow_without_group()
    try:
        dcp.load(into, storage_reader=ShardReader(index, check), no_dist=world_size == 1)
    except BaseException as error:
        cause = _cause(error)
        if cause is error:
            raise
        raise cause from None


def read_model_state(info: CheckpointInfo) -> dict[str, Tensor]:
    """The whole parameters of a folder of shards by name, in host memory; the optimizer's state is not read.

    Raises:
        ValueError: a shard is damaged.
    """
    index = read_index(info.shards)
    return {
        name.removeprefix(_MODEL): read_tensor(saved, name) for name, saved in index.items() if name.startswith(_MODEL)
    }
