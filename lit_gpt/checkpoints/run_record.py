"""What a run says about itself: `run.json`, and how the settings of two runs differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_gpt.files import read_json_object, write_json

RUN_RECORD_NAME = "run.json"
# Of a long value (a hash), as much as tells two apart.
_SHOWN_CHARACTERS = 40
_REMEDY = "delete it, and the run goes on under a new id"


def read_run_record(run_dir: Path, texts: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `run.json` says; empty where there is none.

    Args:
        run_dir: the run's folder.
        texts: what it must have to go on with the run.

    Raises:
        ValueError: it is damaged.
    """
    path = Path(run_dir) / RUN_RECORD_NAME
    if not path.exists():
        return {}
    try:
        record = read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_REMEDY}") from error
    wrong = [name for name in texts if not isinstance(record.get(name), str)]
    wrong += [name for name in ("result", "settings", "config") if not isinstance(record.get(name, {}), dict)]
    if wrong:
        raise ValueError(f"{path} is damaged: it has no {wrong[0]}; {_REMEDY}")
    return record


def write_run_record(run_dir: Path, record: dict[str, Any]) -> None:
    """Replace `run.json` durably."""
    write_json(Path(run_dir) / RUN_RECORD_NAME, record)


def find_shorter_run(folder: Path, settings: dict[str, Any], length: tuple[str, ...]) -> Path | None:
    """The longest finished run in a folder that has these settings but fewer steps; None if there is none.

    Args:
        folder: holds run folders.
        settings: of a run, with `max_steps`.
        length: the names of those settings that its number of steps decides.
    """
    rest = {name: value for name, value in settings.items() if name not in length}
    found: list[tuple[int, Path]] = []
    for path in sorted(folder.glob(f"*/{RUN_RECORD_NAME}")):
        try:
            record = read_run_record(path.parent)
        except (OSError, ValueError):
            continue  # another run's trouble
        own = record.get("settings", {})
        steps = own.get("max_steps")
        if record.get("finished") is not True or not isinstance(steps, int) or steps >= settings["max_steps"]:
            continue
        if not differences({name: value for name, value in own.items() if name not in length}, rest):
            found.append((steps, path.parent))
    return max(found)[1] if found else None


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Compare a checkpoint's settings with a run's, nested dicts by their dotted names.

    Args:
        saved: the checkpoint's; empty (a published file has none) compares equal to everything.
        current: the run's.

    Returns:
        Lines such as `batch_size: checkpoint 256, now 128`, in the order of the names.
    """
    if not saved:
        return []
    before, after = dict(_flattened(saved)), dict(_flattened(current))
    absent = object()
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, absent), after.get(name, absent)
        if old != new or isinstance(old, bool) != isinstance(new, bool):
            shown = [shortened(value) if value is not absent else "does not have it" for value in (old, new)]
            lines.append(f"{name}: checkpoint {shown[0]}, now {shown[1]}")
    return lines


def _flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            # Markers are JSON: tuples come back as lists.
            yield f"{prefix}{name}", json.loads(json.dumps(value))


def shortened(value: Any) -> str:
    """A value of a file, for one line."""
    text = "none" if value is None else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
