"""The checkpoints of a run folder as files: which are whole, which to delete, what they say.

A run folder holds `iter-{iter_num:06d}-ckpt.pth` (the published name and keys), beside each a `.json` of the same stem,
the *marker*, which is written last and says that the checkpoint is complete: step, size, SHA-256, and the run's record;
`run.json`, what the run is (`run_record`); `run.lock`, who writes. Decision: a marker never describes a file that is not
there yet.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_gpt.checkpoints.run_record import shortened
from lit_gpt.checkpoints.torch_files import open_torch_file
from lit_gpt.files import TEMPORARY_SUFFIX, FileStamp, file_sha256, read_json_object, write_json

FORMAT_VERSION = 1
# Source: what the published scripts save.
PUBLISHED_KEYS = ("model", "optimizer", "hparams", "iter_num", "step_count")
_FILE_NAME = re.compile(r"iter-(\d{6,})-ckpt\.pth")

_log = logging.getLogger("lit_gpt")


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint."""

    path: Path
    """The .pth file."""
    step: int
    """Optimizer steps done."""
    iter_num: int
    """Micro steps done (the published count)."""
    size: int
    """Bytes."""
    sha256: str | None = None
    """Of the file; None where no marker says it (a published file)."""
    record: dict[str, Any] = field(default_factory=dict)
    """What the run wrote down about itself; empty for a published file."""

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that changed numbers; empty where the file records none."""
        return dict(self.record.get("settings") or {})


class _BrokenError(ValueError):
    """Why a checkpoint cannot be used."""


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
        if until_iter_num is not None and _number(path) > until_iter_num:
            continue
        try:
            found = _examine(path)
        except _BrokenError as error:
            warn(f"skipping {path}: {error}")
            continue
        if found.sha256 is None:
            warn(f"{path} has no completion marker, but opens and has all keys: taken as a published checkpoint")
        return found
    return None


def open_checkpoint(path: Path) -> CheckpointInfo:
    """One checkpoint by its path, or the newest complete one of a run folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is broken (the line says how).
    """
    path = Path(path)
    if path.is_dir():
        found = newest_complete(path, _log.warning)
        if found is None:
            raise FileNotFoundError(f"{path} holds no complete checkpoint (iter-*-ckpt.pth)")
        return found
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}: no such file")
    try:
        return _examine(path)
    except _BrokenError as error:
        raise ValueError(f"checkpoint {path} cannot be used: {error}") from error


def list_checkpoints(run_dir: Path) -> list[Path]:
    """A folder's `iter-*-ckpt.pth` files, oldest first, whole or not."""
    found = [path for path in Path(run_dir).glob("iter-*-ckpt.pth") if _FILE_NAME.fullmatch(path.name)]
    return sorted(found, key=_number)


def marker_path(path: Path) -> Path:
    """Where a checkpoint's completion marker is."""
    return path.with_suffix(".json")


def _number(path: Path) -> int:
    match = _FILE_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _examine(path: Path) -> CheckpointInfo:
    """Check one checkpoint against its marker.

    Raises:
        _BrokenError: it is not whole, or cannot be read.
    """
    try:
        size = path.stat().st_size
        if not marker_path(path).exists():
            return _examine_unmarked(path, size)
        candidates = _read_marker(path)
        fitting = [marker for marker in candidates if marker["size"] == size]
        if not fitting:
            raise _BrokenError(f"it has {size} bytes, its marker says {candidates[0]['size']}")
        digest = file_sha256(path)
    except OSError as error:
        raise _BrokenError(f"it cannot be read: {error.strerror}") from error
    for marker in fitting:
        if marker["sha256"] == digest:
            return CheckpointInfo(path, marker["step"], marker["iter_num"], size, digest, marker["record"])
    raise _BrokenError("its bytes are not those that were written (SHA-256 differs from its marker's)")


def _read_marker(path: Path) -> list[dict[str, Any]]:
    """What a marker says the file may be: one description, or two where a save over an earlier one was cut short."""
    try:
        marker = read_json_object(marker_path(path))
        found = [marker, *([marker["successor"]] if "successor" in marker else [])]
        for one in found:
            if one["format"] != FORMAT_VERSION:
                raise _BrokenError(f"its marker has format {one['format']}, expected {FORMAT_VERSION} (a later one?)")
            for key, kind in {"step": int, "iter_num": int, "size": int, "sha256": str, "record": dict}.items():
                value = one[key]
                if type(value) is not kind or (kind is int and not _is_count(value)):
                    raise _BrokenError(
                        f"its marker {marker_path(path).name} is damaged: {key} is {shortened(repr(value))}"
                    )
            _check_record(one["record"])
    except _BrokenError:
        raise
    except KeyError as error:
        raise _BrokenError(f"its marker {marker_path(path).name} is damaged: {error} is missing") from error
    except (AttributeError, TypeError) as error:
        raise _BrokenError(f"its marker {marker_path(path).name} is damaged: a part of it is no object") from error
    except ValueError as error:
        raise _BrokenError(f"its marker {marker_path(path).name} is damaged: {error}") from error
    return found


def _has_right_size(path: Path) -> bool:
    """The quick half of `_examine`."""
    try:
        return path.stat().st_size in [marker["size"] for marker in _read_marker(path)]
    except (OSError, _BrokenError):
        return False


def _examine_unmarked(path: Path, size: int) -> CheckpointInfo:
    """A published checkpoint, or one of ours whose marker a kill prevented."""
    try:
        content = open_torch_file(path)
    except ValueError as error:
        raise _BrokenError(f"it has no completion marker, and {error}") from error
    missing = [key for key in PUBLISHED_KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise _BrokenError(f"it has no completion marker and lacks {', '.join(missing)}")
    record = content.get("record") if isinstance(content.get("record"), dict) else {}
    _check_record(record)
    step, iter_num = content["step_count"], content["iter_num"]
    if not _is_count(step) or not _is_count(iter_num):
        raise _BrokenError("it has no completion marker, and its step_count or iter_num is no number of steps")
    return CheckpointInfo(path, step, iter_num, size, None, record)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _check_record(record: dict[str, Any]) -> None:
    """Refuse what a resumed run would trip over.

    Raises:
        _BrokenError: settings or run are no objects, or the run's numbers are none.
    """
    for key in ("settings", "run"):
        if not isinstance(record.get(key), dict | None):
            raise _BrokenError(f"its record is damaged: {key} is {shortened(repr(record[key]))}")
    for key, value in (record.get("run") or {}).items():
        if not _is_count(value) or value < 1:
            raise _BrokenError(f"its record is damaged: {shortened(str(key))} is {shortened(repr(value))}")


# --- deleting ------------------------------------------------------------------------------------------------------


def remove_older(newest: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints up to and including `newest`, which is complete.

    Later ones are left alone: they are what a resumed run skipped as broken and will write again.
    """
    older = [path for path in list_checkpoints(newest.parent) if _number(path) < _number(newest)]
    ours = [path for path in older if marker_path(path).exists()]
    whole = [path for path in ours if _has_right_size(path)]
    kept = set(whole[len(whole) - (keep - 1) :]) if keep > 1 else set()
    for path in ours:
        if path not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    """The marker goes last: a file without one would pass for a published checkpoint."""
    for file in (path, marker_path(path)):
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("cannot delete the old checkpoint %s: %s", file, error.strerror)


def remove_checkpoints(run_dir: Path, after_iter_num: int = -1, but: Path | None = None) -> None:
    """Delete a run's checkpoints, or those after a micro step, except for one; markers included."""
    for path in list_checkpoints(run_dir):
        if _number(path) > after_iter_num and path != but:
            _remove(path)


def remove_temporary(run_dir: Path) -> None:
    """Put in order what a kill left behind; needs the folder's lock.

    Unfinished files and markers without a checkpoint are deleted. A checkpoint of ours that only lacks its marker is
    whole (it was on the disk before it got its name) and gets one; else it would never be counted, nor deleted.
    """
    for path in Path(run_dir).glob(f"*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)
    for path in Path(run_dir).glob("iter-*-ckpt.json"):
        if not path.with_suffix(".pth").exists():
            path.unlink(missing_ok=True)
    for path in list_checkpoints(run_dir):
        if not marker_path(path).exists():
            with contextlib.suppress(_BrokenError, OSError):
                found = _examine_unmarked(path, path.stat().st_size)
                if found.record:
                    stamp = FileStamp(found.size, file_sha256(path))
                    write_json(marker_path(path), new_marker(found.step, found.iter_num, found.record, stamp))


def new_marker(step: int, iter_num: int, record: dict[str, Any], stamp: FileStamp) -> dict[str, Any]:
    """What a marker says of a complete checkpoint."""
    return {"format": FORMAT_VERSION, "step": step, "iter_num": iter_num, "record": record, **vars(stamp)}
