"""The checkpoints of a run folder as files: which are whole, which to delete, what they say.

A run folder holds `iter-{iter_num:06d}-ckpt.pth` (the published name and keys), beside each a `.json` of the same stem,
the *marker*, which is written last and says that the checkpoint is complete: step, size, SHA-256, and the run's record;
`run.json`, what the run is (`run_record`); `run.lock`, who writes. A large checkpoint is a folder `iter-{iter_num:06d}-ckpt`
of shards, with its marker inside as `checkpoint.json`. Decisions: a marker never describes a file that is not there yet; a
folder gets its name when all of it is on the disk, and loses its marker before anything else of it is deleted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_gpt.checkpoints.markers import (
    DESCRIPTION_NAME,
    BrokenError,
    check_record,
    checkpoint_path,
    is_checkpoint_name,
    is_count,
    is_sharded,
    iter_num_of,
    marker_path,
    new_marker,
    read_marker,
)
from lit_gpt.checkpoints.torch_files import open_torch_file
from lit_gpt.files import (
    TEMPORARY_SUFFIX,
    FileStamp,
    cannot_write,
    file_sha256,
    sync_folder,
    write_json,
)

# Source: what the published scripts save.
PUBLISHED_KEYS = ("model", "optimizer", "hparams", "iter_num", "step_count")
_HASHING_THREADS = 8

_log = logging.getLogger("lit_gpt")


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint."""

    path: Path
    """The .pth file, or the folder of shards."""
    step: int
    """Optimizer steps done."""
    iter_num: int
    """Micro steps done (the published count)."""
    size: int
    """Bytes."""
    sha256: str | None = None
    """Of the file, or of a folder's marker; None where no marker says it (a published file)."""
    record: dict[str, Any] = field(default_factory=dict)
    """What the run wrote down about itself; empty for a published file."""
    shards: tuple[Path, ...] = ()
    """A folder's files."""

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that changed numbers; empty where the file records none."""
        return dict(self.record.get("settings") or {})


# --- finding ------------------------------------------------------------------------------------------------------


def newest_complete(
    run_dir: Path, warn: Callable[[str], object], until_iter_num: int | None = None
) -> CheckpointInfo | None:
    """The newest checkpoint whose bytes are those that were written.

    A published file has no marker; it counts if torch can open it and it has all published keys, which is said.

    Args:
        run_dir: may be missing.
        warn: called with a line for every newer one that is skipped, and why.
        until_iter_num: later ones are passed over.
    """
    for path in reversed(list_checkpoints(run_dir)):
        if until_iter_num is not None and iter_num_of(path) > until_iter_num:
            continue
        try:
            found = _examine(path)
        except BrokenError as error:
            warn(f"skipping {path}: {error}")
            continue
        if found.sha256 is None:
            warn(f"{path} has no completion marker, but opens and has all keys: taken as a published checkpoint")
        return found
    return None


def open_checkpoint(path: Path) -> CheckpointInfo:
    """One checkpoint by its path (a file, or a folder of shards), or the newest complete one of a run folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is broken (the line says how).
    """
    path = Path(path)
    if path.is_dir() and not is_sharded(path):
        found = newest_complete(path, _log.warning)
        if found is None:
            raise FileNotFoundError(f"{path} holds no complete checkpoint (iter-*-ckpt.pth or iter-*-ckpt)")
        return found
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}: no such file")
    try:
        return _examine(path)
    except BrokenError as error:
        raise ValueError(f"checkpoint {path} cannot be used: {error}") from error


def list_checkpoints(run_dir: Path) -> list[Path]:
    """A folder's checkpoints, `iter-*-ckpt.pth` files and `iter-*-ckpt` folders, oldest first, whole or not."""
    found = [path for path in Path(run_dir).glob("iter-*-ckpt*") if is_checkpoint_name(path.name)]
    return sorted(found, key=iter_num_of)


def _examine(path: Path) -> CheckpointInfo:
    """Check one checkpoint against its marker.

    Raises:
        BrokenError: it is not whole, or cannot be read.
    """
    try:
        if is_sharded(path):
            return _examine_shards(path)
        size = path.stat().st_size
        if not marker_path(path).exists():
            return _examine_unmarked(path, size)
        candidates = read_marker(path)
        fitting = [marker for marker in candidates if marker["size"] == size]
        if not fitting:
            raise BrokenError(f"it has {size} bytes, its marker says {candidates[0]['size']}")
        digest = file_sha256(path)
    except OSError as error:
        raise BrokenError(f"it cannot be read: {error.strerror}") from error
    for marker in fitting:
        if marker["sha256"] == digest:
            return CheckpointInfo(path, marker["step"], marker["iter_num"], size, digest, marker["record"])
    raise BrokenError("its bytes are not those that were written (SHA-256 differs from its marker's)")


def _examine_shards(path: Path) -> CheckpointInfo:
    """Check a folder of shards against its marker.

    Raises:
        BrokenError: it is not whole.
        OSError: it cannot be read.
    """
    if not path.is_dir() or not marker_path(path).exists():
        raise BrokenError(f"it has no {DESCRIPTION_NAME}, which is written last")
    marker = read_marker(path)[0]
    stamps = {path / name: stamp for name, stamp in marker["shards"].items()}
    _check_sizes(stamps)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # hashing does not hold Python's lock
        digests = pool.map(file_sha256, stamps)
    for (file, stamp), digest in zip(stamps.items(), digests, strict=True):
        if stamp["sha256"] != digest:
            raise BrokenError(
                f"the bytes of {file.name} are not those that were written (SHA-256 differs from its marker's)"
            )
    size = sum(stamp["size"] for stamp in stamps.values())
    digest = file_sha256(marker_path(path))
    return CheckpointInfo(path, marker["step"], marker["iter_num"], size, digest, marker["record"], tuple(stamps))


def _check_sizes(stamps: dict[Path, dict[str, Any]]) -> None:
    """The quick half of a check of shards.

    Raises:
        BrokenError: one has another size than its marker says, or is missing.
    """
    for file, stamp in stamps.items():
        if not file.exists():
            raise BrokenError(f"{file.name} is missing")
        if (size := file.stat().st_size) != stamp["size"]:
            raise BrokenError(f"{file.name} has {size} bytes, its marker says {stamp['size']}")


def _has_right_size(path: Path) -> bool:
    """The quick half of `_examine`."""
    try:
        markers = read_marker(path)
        if is_sharded(path):
            _check_sizes({path / name: stamp for name, stamp in markers[0]["shards"].items()})
            return True
        return path.stat().st_size in [marker["size"] for marker in markers]
    except (OSError, BrokenError):
        return False


def _examine_unmarked(path: Path, size: int) -> CheckpointInfo:
    """A published checkpoint, or one of ours whose marker a kill prevented."""
    try:
        content = open_torch_file(path)
    except ValueError as error:
        raise BrokenError(f"it has no completion marker, and {error}") from error
    missing = [key for key in PUBLISHED_KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise BrokenError(f"it has no completion marker and lacks {', '.join(missing)}")
    record = content.get("record") if isinstance(content.get("record"), dict) else {}
    check_record(record)
    step, iter_num = content["step_count"], content["iter_num"]
    if not is_count(step) or not is_count(iter_num):
        raise BrokenError("it has no completion marker, and its step_count or iter_num is no number of steps")
    return CheckpointInfo(path, step, iter_num, size, None, record)


# --- deleting ------------------------------------------------------------------------------------------------------


def remove_replaced(newest: Path, keep: int | None) -> None:
    """Delete what a checkpoint that was just completed replaces: the same micro step's in the other form, and older ones.

    Args:
        newest: the checkpoint.
        keep: how many up to and including it stay; None or 0 keeps all. Later ones are left alone: they are what a resumed
            run skipped as broken and will write again. So is the last one of a finished run that was then extended.
    """
    other = checkpoint_path(newest.parent, iter_num_of(newest), sharded=not is_sharded(newest))
    if other.exists():
        _remove(other)
    if not keep:
        return
    older = [path for path in list_checkpoints(newest.parent) if iter_num_of(path) < iter_num_of(newest)]
    ours = [path for path in older if marker_path(path).exists() and not _ends_a_run(path)]
    whole = [path for path in ours if _has_right_size(path)]
    kept = set(whole[len(whole) - (keep - 1) :]) if keep > 1 else set()
    for path in ours:
        if path not in kept:
            _remove(path)


def _ends_a_run(path: Path) -> bool:
    """Whether a checkpoint's marker says that it was the last one of a run."""
    try:
        markers = read_marker(path)
    except (OSError, BrokenError):
        return False
    return any(marker["step"] == (marker["record"].get("settings") or {}).get("max_steps") for marker in markers)


def _remove(path: Path) -> None:
    """A file's marker goes last: without one it would pass for a published checkpoint; a folder's goes first."""
    if is_sharded(path):
        try:
            _discard_folder(path)
        except OSError as error:
            _log.warning("cannot delete the old checkpoint %s: %s", path, error.strerror)
        return
    for file in (path, marker_path(path)):
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("cannot delete the old checkpoint %s: %s", file, error.strerror)


def remove_checkpoints(run_dir: Path, after_iter_num: int = -1, but: Path | None = None) -> None:
    """Delete a run's checkpoints, or those after a micro step, except for one; markers included."""
    for path in list_checkpoints(run_dir):
        if iter_num_of(path) > after_iter_num and path != but:
            _remove(path)


def remove_temporary(run_dir: Path) -> None:
    """Put in order what a kill left behind; needs the folder's lock.

    Unfinished files and markers without a checkpoint are deleted. A checkpoint of ours that only lacks its marker, or a
    folder that only lacks its name, is whole and gets it; else it would never be counted, nor deleted.
    """
    for path in Path(run_dir).glob(f"*{TEMPORARY_SUFFIX}"):
        name = Path(run_dir) / path.name.split(".")[0]
        if path.is_dir() and is_sharded(name) and not name.exists() and _has_right_size(path):
            path.rename(name)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for path in Path(run_dir).glob("iter-*-ckpt.json"):
        if not path.with_suffix(".pth").exists():
            path.unlink(missing_ok=True)
    for path in list_checkpoints(run_dir):
        if not is_sharded(path) and not marker_path(path).exists():
            with contextlib.suppress(BrokenError, OSError):
                found = _examine_unmarked(path, path.stat().st_size)
                if found.record:
                    stamp = FileStamp(found.size, file_sha256(path))
                    write_json(marker_path(path), new_marker(found.step, found.iter_num, found.record, stamp))


# --- folders of shards --------------------------------------------------------------------------------------------


def temporary_folder(path: Path) -> Path:
    """An empty folder beside `path`, with the name of an unfinished one.

    Raises:
        SaveError: it cannot be made.
    """
    folder = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        folder.mkdir()
    except OSError as error:
        raise cannot_write(path, error) from error
    return folder


def finish_folder(unfinished: Path, path: Path, description: dict[str, Any]) -> None:
    """Write the marker of a folder whose shards are on the disk, and give it its name; one of that name goes.

    Args:
        unfinished: from `temporary_folder`.
        path: its name.
        description: the marker: `new_marker` and what else belongs to the checkpoint.

    Raises:
        SaveError: it could not be written.
    """
    write_json(unfinished / DESCRIPTION_NAME, description)
    try:
        if path.exists():
            # Killed here, the next start finds the new one, which has its marker.
            _discard_folder(path)
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def _discard_folder(path: Path) -> None:
    """Delete a folder of shards such that no part of it is ever taken for a checkpoint."""
    marker_path(path).unlink(missing_ok=True)
    away = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    path.rename(away)
    shutil.rmtree(away, ignore_errors=True)  # the next start deletes the rest
