"""Saving and restoring a training run through Fabric, on one device, with DDP and with FSDP2.

Decisions: one file for every strategy, streamed to the disk and hashed on the way (Fabric's own saving builds a copy in
memory and writes it by way of the system's temporary folder); a checkpoint of one strategy loads under another; a save
that fails on the first process fails on all, with the last good checkpoint named. Large states are saved as folders of
shards (`sharded`), and restored here like files. How files are named, marked and found is in `markers` and `run_files`.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lit_gpt import devices
from lit_gpt.checkpoints.markers import checkpoint_path, is_sharded, marker_path, new_marker
from lit_gpt.checkpoints.optimizer_state import keep_speed, read_optimizer_state
from lit_gpt.checkpoints.run_files import (
    PUBLISHED_KEYS,
    CheckpointInfo,
    newest_complete,
    open_checkpoint,
    remove_replaced,
)
from lit_gpt.checkpoints.shard_files import total_bytes
from lit_gpt.checkpoints.sharded import load_sharded, state_tensors
from lit_gpt.checkpoints.tensor_checks import check_finite, check_state
from lit_gpt.checkpoints.torch_files import clean_names, open_torch_file
from lit_gpt.files import FileStamp, SaveError, read_json_object, write_file, write_json

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# --- saving -------------------------------------------------------------------------------------------------------


def save_checkpoint(
    fabric: Fabric,
    run_dir: Path,
    state: dict[str, Any],
    record: dict[str, Any],
    keep: int | None = None,
    alone: bool = False,
) -> Path:
    """Write a checkpoint, then delete older ones; every process calls it, or with `alone` the first one.

    Args:
        fabric: one device, DDP, or FSDP2 (ModelParallelStrategy).
        run_dir: exists; its lock is held by the first process.
        state: model and optimizer as Fabric set them up, and plain values: hparams, iter_num (micro steps), step_count
            (optimizer steps) ...
        record: what the run is, as JSON values (kind, config, tokenizer, run_id, settings ...); it goes into the file
            and into the marker.
        keep: how many checkpoints up to this one stay; None or 0 keeps all.
        alone: the other processes do not take part (they may be gone).

    Returns:
        The .pth file.

    Raises:
        ValueError: alone, while the others have parts of the model.
        SaveError: the disk is full, not writable ...; on every process. Earlier checkpoints are untouched and no
            temporary file is left.
    """
    missing = [key for key in PUBLISHED_KEYS if key not in state]
    assert not missing, f"state lacks {missing}"
    if alone:
        check_alone(fabric, state)
    content = {**_gather(fabric, state), "record": record}

    def work() -> Path:
        path = checkpoint_path(run_dir, state["iter_num"])
        _write(path, content, state["step_count"], state["iter_num"], record)
        remove_replaced(path, keep)
        return path

    path = work() if alone else devices.on_rank_zero(fabric, work)
    assert isinstance(path, Path)
    return path


def check_alone(fabric: Fabric, state: dict[str, Any]) -> None:
    """Refuse to save without the other processes where they have parts of the model.

    Raises:
        ValueError: they have.
    """
    if fabric.world_size > 1 and _is_distributed(_module(state["model"])):
        raise ValueError("the model is sharded over processes that may be gone")


def unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """A run's state with the model and the optimizer that Fabric wrapped."""
    return {**state, "model": _module(state["model"]), "optimizer": _optimizer(state["optimizer"])}


def state_bytes(state: dict[str, Any]) -> int:
    """What the tensors of a run's state take in a checkpoint."""
    plain = unwrapped(state)
    return total_bytes(state_tensors(plain["model"], plain["optimizer"]).values())


def _gather(fabric: Fabric, state: dict[str, Any]) -> dict[str, Any]:
    """Replace model and optimizer by whole state dicts; the values count on the first process only."""
    module = _module(state["model"])
    if _is_distributed(module):
        from torch.distributed.checkpoint import state_dict as sharded

        options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
        optimizer = _optimizer(state["optimizer"])
        model_state: Any = sharded.get_model_state_dict(module, options=options)
        optimizer_state: Any = sharded.get_optimizer_state_dict(module, optimizer, options=options)
    elif fabric.is_global_zero:
        model_state, optimizer_state = module.state_dict(), state["optimizer"].state_dict()
    else:
        model_state, optimizer_state = {}, {}
    return {**state, "model": dict(model_state), "optimizer": optimizer_state}


def _write(path: Path, content: dict[str, Any], step: int, iter_num: int, record: dict[str, Any]) -> None:
    """The file, then its marker; between the two a marker of an earlier file of that name knows both."""
    json.dumps(record)  # fails here, before anything is written, if a value is no JSON

    def announce(stamp: FileStamp) -> None:
        if path.exists() and marker_path(path).exists():
            with contextlib.suppress(ValueError, OSError):
                earlier = read_json_object(marker_path(path))
                write_json(marker_path(path), {**earlier, "successor": new_marker(step, iter_num, record, stamp)})

    try:
        # HashingFile has what torch.save needs of a file: write and flush.
        stamp = write_file(path, lambda file: torch.save(content, cast(IO[bytes], file)), announce)
        write_json(marker_path(path), new_marker(step, iter_num, record, stamp))
    except SaveError as error:
        raise SaveError(f"{error}; {last_good(path.parent)}") from error


def last_good(run_dir: Path) -> str:
    """What a user still has after a failed save."""
    found = newest_complete(run_dir, lambda line: None)
    return f"the last good checkpoint is {found.path}" if found else "there is no earlier checkpoint"


# --- restoring ----------------------------------------------------------------------------------------------------


def load_checkpoint(fabric: Fabric, checkpoint: CheckpointInfo | Path, state: dict[str, Any]) -> dict[str, Any]:
    """Restore model and optimizer in place; every process calls it.

    A checkpoint of one strategy loads under another, a file as well as a folder of shards: optimizer states by parameter
    number and by name are both read.

    Args:
        fabric: as in `save_checkpoint`.
        checkpoint: what `newest_complete` found, or a path.
        state: `model` and `optimizer` as Fabric set them up.

    Returns:
        Everything else in the file: hparams, iter_num, step_count, record ...

    Raises:
        ValueError: it does not fit the model (the first parameter that does not is named), or is no checkpoint.
    """
    module, optimizer = _module(state["model"]), _optimizer(state["optimizer"])
    found = checkpoint if isinstance(checkpoint, CheckpointInfo) else open_checkpoint(Path(checkpoint))
    path = found.path
    if is_sharded(path):
        return load_sharded(found, module, optimizer, fabric.world_size)
    content = open_torch_file(path)
    if missing := [key for key in PUBLISHED_KEYS if not isinstance(content, dict) or key not in content]:
        raise ValueError(f"{path} is no checkpoint: it lacks {', '.join(missing)}")
    if not isinstance(content["model"], dict) or type(content["step_count"]) is not int:
        raise ValueError(f"{path} is no checkpoint: its model or its step count is of another kind")
    if isinstance(checkpoint, CheckpointInfo) and content["step_count"] != checkpoint.step:
        raise ValueError(
            f"{path} is of step {content['step_count']}, its marker says {checkpoint.step}: one is damaged"
        )
    model_state = clean_names(content["model"], path)
    check_state(path, model_state, {name: tuple(value.shape) for name, value in module.state_dict().items()})
    check_finite(path, model_state)
    optimizer_state = read_optimizer_state(path, content["optimizer"], module, optimizer, content["step_count"])
    if _is_distributed(module):
        before = [dict(group) for group in optimizer.param_groups]
        fabric.load(path, {"model": state["model"], "optimizer": state["optimizer"]}, weights_only=True)
        keep_speed(optimizer, before)
    else:
        module.load_state_dict(model_state)
        # torch keeps tensors that need no conversion as they are: copies, lest they hang on the mapped file.
        for entries in optimizer_state["state"].values():
            entries.update({name: value.clone() for name, value in entries.items()})
        optimizer.load_state_dict(optimizer_state)
    return {key: value for key, value in content.items() if key not in ("model", "optimizer")}


def _module(model: Any) -> nn.Module:
    """The module that Fabric wrapped."""
    module = getattr(model, "module", model)
    assert isinstance(module, nn.Module)
    return module


def _optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that Fabric wrapped."""
    plain = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(plain, torch.optim.Optimizer)
    return plain


def _is_distributed(module: nn.Module) -> bool:
    """Whether FSDP2 holds the parameters."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in module.parameters())
