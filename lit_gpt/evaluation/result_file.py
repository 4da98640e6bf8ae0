"""Results of a long evaluation as JSON lines: on the disk as they come, continued after a kill, never twice the same.

Decisions: the file holds results alone, in whatever format its readers expect; the settings that they were made with lie
beside it (`NAME.settings.json`), so that results of other settings are refused, not mixed; a line that a kill left
half-written is dropped and computed again; a lock keeps a second writer out.
"""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lit_gpt.files import (
    cannot_write,
    lock_file,
    make_folder,
    open_regular,
    parse_json,
    read_json_object,
    write_file,
    write_json,
)

EXISTING = ("continue", "refuse", "overwrite")
"""What to do with a file that is there already: the values of the scripts' `--existing`; None if it was not given."""

_SHOWN_CHARACTERS = 200

_log = logging.getLogger("lit_gpt")


class ResultFile:
    """An open file of results, a context.

    Args:
        path: ends in `.jsonl`; its folder is made.
        settings: everything that changes a result, as JSON values.
        key: what a result is of, such as its question's number.
        existing: None keeps the results that are there, if they were made with these settings; `continue` also those of
            which nothing says how they were made; `refuse` and `overwrite` say it themselves.
        writes: False only looks up what is there.

    Raises:
        ValueError: the file was made with other settings (the differences are named), a line is no JSON object or has
            no key (file and line), nothing says how its results were made and `existing` is None, it exists and
            `existing` is `refuse`, another process writes to it.
        SaveError: it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        key: Callable[[dict[str, Any]], Hashable],
        existing: str | None = None,
        writes: bool = True,
    ) -> None:
        if existing not in (None, *EXISTING):
            raise ValueError(f"--existing {existing}: choose from {', '.join(EXISTING)}")
        self.path, self._key = path, key
        self._settings_path = path.with_suffix(".settings.json")
        self._results: dict[Hashable, dict[str, Any]] = {}
        self._writing, self._writes = threading.Lock(), writes
        if writes:
            make_folder(path.parent)
        # As JSON gives them back: a tuple is a list there.
        settings = json.loads(json.dumps(settings))
        try:
            self._file: IO[bytes] = path.open("a+b") if writes else _readable(path)
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            if writes:
                lock_file(path, self._file.fileno())
            if path.exists() and path.stat().st_size:
                self._take_over(settings, existing)
            if writes:
                write_json(self._settings_path, settings)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError as failed:
            # What could not be written is written once more; the first failure has said so.
            if error is None:
                raise cannot_write(self.path, failed) from failed

    def __contains__(self, key: Hashable) -> bool:
        return key in self._results

    def __len__(self) -> int:
        return len(self._results)

    @property
    def results(self) -> list[dict[str, Any]]:
        """All results so far, one for each key (the last that was written)."""
        return list(self._results.values())

    def add(self, result: dict[str, Any]) -> None:
        """Append a result and put it on the disk; threads may call it.

        Raises:
            SaveError: it cannot be written.
        """
        line = json.dumps(result, ensure_ascii=False) + "\n"
        with self._writing:
            try:
                self._file.write(line.encode())
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise cannot_write(self.path, error) from error
            self._results[self._key(result)] = result

    def sort(self, order: Callable[[dict[str, Any]], Any]) -> None:
        """Rewrite the file in an order, one line for each key; the last thing that is done with it."""
        with self._writing:
            lines = [json.dumps(result, ensure_ascii=False) + "\n" for result in sorted(self.results, key=order)]
            write_file(self.path, lambda file: file.write("".join(lines).encode()))

    def _take_over(self, settings: dict[str, Any], existing: str | None) -> None:
        """Keep, refuse or drop what the file holds."""
        if existing == "refuse":
            raise ValueError(f"{self.path} exists: give another file, or --existing continue or overwrite")
        if existing == "overwrite":
            if self._writes:
                self._file.truncate(0)
            return
        if self._settings_path.exists():
            self._check_settings(read_json_object(self._settings_path), settings)
        elif existing is None:
            raise ValueError(
                f"{self.path} has no {self._settings_path.name} beside it, which says how its results were made: give "
                "another file, or --existing continue to count them as made with these settings, or overwrite"
            )
        else:
            _log.warning("%s does not say how its results were made; they are kept", self.path)
        self._read()

    def _check_settings(self, held: dict[str, Any], settings: dict[str, Any]) -> None:
        different = [
            f"{_shown(name)} {_shown(held.get(name))} there, {_shown(settings.get(name))} here"
            for name in sorted(held.keys() | settings.keys())
            if held.get(name) != settings.get(name)
        ]
        if different:
            raise ValueError(
                f"{self.path} was made with other settings ({'; '.join(different)}): give another file, or "
                "--existing overwrite"
            )

    def _read(self) -> None:
        """Read the results; a torn last line is cut off."""
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                if self._writes:
                    self._file.truncate(whole)
                return
            whole += len(line)
            if not line.strip():
                continue
            try:
                result = parse_json(line)
                if not isinstance(result, dict):
                    raise ValueError(f"it is a JSON {type(result).__name__}, expected an object")
                self._results[self._key(result)] = result
            except (ValueError, KeyError, TypeError, IndexError) as error:
                reason = str(error) if isinstance(error, ValueError) else repr(error)
                raise ValueError(f"{self.path}:{number} is no result ({reason}): mend or remove that line") from error


def _readable(path: Path) -> IO[bytes]:
    """A file for reading, an empty one if there is none."""
    return open_regular(path) if path.exists() else io.BytesIO()


def _shown(value: Any) -> str:
    """A value of a user's file for one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
