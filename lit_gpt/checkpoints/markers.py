"""How checkpoints are named and marked: the small JSON file that is written last and says what a whole one consists of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lit_gpt.checkpoints.run_record import shortened
from lit_gpt.files import FileStamp, read_json_object

FORMAT_VERSION = 1
_NAME = re.compile(r"iter-(\d{6,})-ckpt(?:\.pth)?")
# The marker inside of a folder of shards, and how these may be called.
DESCRIPTION_NAME = "checkpoint.json"
_SHARD_NAME = re.compile(r"shard-\d{5,}-of-\d{5,}\.safetensors")
_STAMP_KINDS: dict[str, type] = {"size": int, "sha256": str}


class BrokenError(ValueError):
    """Why a checkpoint cannot be used."""


def checkpoint_path(run_dir: Path, iter_num: int, sharded: bool = False) -> Path:
    """What the checkpoint of a micro step is called."""
    return Path(run_dir) / f"iter-{iter_num:06d}-ckpt{'' if sharded else '.pth'}"


def marker_path(path: Path) -> Path:
    """Where a checkpoint's completion marker is."""
    return path / DESCRIPTION_NAME if is_sharded(path) else path.with_suffix(".json")


def is_checkpoint_name(name: str) -> bool:
    """Whether a checkpoint of a run may be called so."""
    return _NAME.fullmatch(name) is not None


def is_sharded(path: Path) -> bool:
    """Whether a path is of a checkpoint that is a folder of shards, whatever the folder is called."""
    is_named_so = _NAME.fullmatch(path.name) is not None and not path.suffix
    return (is_named_so or (path / DESCRIPTION_NAME).exists()) and not path.is_file()


def iter_num_of(path: Path) -> int:
    """Micro steps done, as a checkpoint's name says."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def read_marker(path: Path) -> list[dict[str, Any]]:
    """What a marker says the file may be: one description, or two where a save over an earlier one was cut short."""
    try:
        marker = read_json_object(marker_path(path))
        found = [marker, *([marker["successor"]] if "successor" in marker else [])]
        for one in found:
            if one["format"] != FORMAT_VERSION:
                raise BrokenError(f"its marker has format {one['format']}, expected {FORMAT_VERSION} (a later one?)")
            kinds = {"step": int, "iter_num": int, "record": dict}
            _check_kinds(path, one, {**kinds, "shards": dict} if is_sharded(path) else {**kinds, **_STAMP_KINDS})
            for name, stamp in one.get("shards", {}).items():
                if not _SHARD_NAME.fullmatch(name):
                    raise BrokenError(f"its marker {marker_path(path).name} names a shard {shortened(name)}")
                _check_kinds(path, stamp, _STAMP_KINDS)
            check_record(one["record"])
    except BrokenError:
        raise
    except KeyError as error:
        raise BrokenError(f"its marker {marker_path(path).name} is damaged: {error} is missing") from error
    except (AttributeError, TypeError) as error:
        raise BrokenError(f"its marker {marker_path(path).name} is damaged: a part of it is no object") from error
    except ValueError as error:
        raise BrokenError(f"its marker {marker_path(path).name} is damaged: {error}") from error
    return found


def _check_kinds(path: Path, values: dict[str, Any], kinds: dict[str, type]) -> None:
    """Refuse a part of a marker whose values are of other kinds."""
    for key, kind in kinds.items():
        value = values[key]
        if type(value) is not kind or (kind is int and not is_count(value)):
            raise BrokenError(f"its marker {marker_path(path).name} is damaged: {key} is {shortened(repr(value))}")


def is_count(value: Any) -> bool:
    """Whether a value of a file is a number of steps or bytes."""
    return type(value) is int and 0 <= value < 1 << 62


def check_record(record: dict[str, Any]) -> None:
    """Refuse what a resumed run would trip over.

    Raises:
        BrokenError: settings or run are no objects, or the run's numbers are none.
    """
    for key in ("settings", "run"):
        if not isinstance(record.get(key), dict | None):
            raise BrokenError(f"its record is damaged: {key} is {shortened(repr(record[key]))}")
    for key, value in (record.get("run") or {}).items():
        if not is_count(value) or value < 1:
            raise BrokenError(f"its record is damaged: {shortened(str(key))} is {shortened(repr(value))}")


def new_marker(
    step: int, iter_num: int, record: dict[str, Any], stamp: FileStamp | dict[str, FileStamp]
) -> dict[str, Any]:
    """What a marker says of a complete checkpoint: a file, or shards by their names."""
    marker = {"format": FORMAT_VERSION, "step": step, "iter_num": iter_num, "record": record}
    if isinstance(stamp, FileStamp):
        return {**marker, **vars(stamp)}
    return {**marker, "shards": {name: vars(one) for name, one in stamp.items()}}
