"""Finished results of an evaluation, so that a killed one goes on where it stood.

One file of JSON lines per (checkpoint, settings), whose name is their hash and whose first line spells them out: another
checkpoint, estimator, version of it, device class or seed has another file, so nothing stale can be served. Results stand
behind a line that says which commit made them. Each process appends to a file of its own and reads those of all. A line
that a kill left half-written is passed over.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from lit_gpt.evaluation.versions import commit
from lit_gpt.files import cannot_write, make_folder, open_regular, parse_json

Value = TypeVar("Value")
# Of a result on its way to the disk: what a loss of power may cost.
_LONGEST_WAIT_S = 30.0
_UNKNOWN = "unknown"
_DEFAULT_FOLDER = Path("~/.cache/smdm/evaluation")


def results_folder(asked: str | None, default: Path | None = None) -> Path | None:
    """Where finished results are kept: the folder that was asked for, or nowhere for `off`; else the default.

    Args:
        asked: what the user said.
        default: None is the user's own cache.
    """
    if asked == "off":
        return None
    return Path(asked) if asked else default or _DEFAULT_FOLDER.expanduser()


class EvalCache:
    """Results by key, for one checkpoint and one set of settings.

    Args:
        folder: where the files lie; made if it is missing. None keeps nothing.
        settings: everything that changes a result, as JSON values.
        rank: this process's number.
        elsewhere: another folder whose results are found, too.
        writes: False only looks up what is there.

    Raises:
        SaveError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path | None,
        settings: dict[str, Any],
        rank: int = 0,
        elsewhere: Path | None = None,
        writes: bool = True,
    ) -> None:
        self.path: Path | None = None
        self._file: TextIO | None = None
        self._values: dict[str, Any] = {}
        self._makers: dict[str, str] = {}
        self._served: set[str] = set()
        self._maker_written = False
        if folder is None:
            return
        if writes:
            make_folder(folder)
        header = json.dumps(settings, sort_keys=True)
        name = hashlib.sha256(header.encode()).hexdigest()[:16]
        self.path = folder / f"{name}.{rank}.jsonl"
        for place in filter(None, dict.fromkeys((elsewhere, folder))):
            for path in sorted(place.glob(f"{name}.*.jsonl")):
                self._read(path)
        if not writes:
            return
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the evaluation runs)
        # A torn last line must not swallow the next one.
        self._file.write(f"\n{header}\n" if self._file.tell() else f"{header}\n")

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str, is_valid: Callable[[Any], bool] = lambda value: True) -> Any:
        """What was stored under a key; None if nothing was, or nothing that can be a result."""
        value = self._values.get(key)
        if not is_valid(value):
            return None
        self._served.add(key)
        return value

    def makers(self) -> dict[str, str]:
        """The commits that made the results of this evaluation, by key; `unknown` where a file does not say."""
        return {key: self._makers[key] for key in self._served if key in self._makers}

    def add(self, results: Sequence[tuple[str, Any]]) -> None:
        """Store results and put them on the disk.

        Raises:
            SaveError: they cannot be written.
        """
        self._write(results)
        self._sync()

    def keep(
        self, results: Iterable[tuple[str, Value]], as_json: Callable[[Value], Any], lot: int
    ) -> Iterator[tuple[str, Value]]:
        """Pass results on, and store each as it comes: a kill at any moment loses none that was passed on.

        Args:
            results: (key, value) pairs.
            as_json: a value as JSON values.
            lot: how many are put on the disk together, against a loss of power; after some seconds fewer.

        Raises:
            SaveError: they cannot be written.
        """
        waiting, since = 0, time.monotonic()
        try:
            for key, value in results:
                self._write([(key, as_json(value))])
                waiting += 1
                if waiting >= lot or time.monotonic() - since >= _LONGEST_WAIT_S:
                    self._sync()
                    waiting, since = 0, time.monotonic()
                yield key, value
        finally:
            self._sync()

    def _write(self, results: Sequence[tuple[str, Any]]) -> None:
        """Hand results to the operating system, which has them even if this process is killed."""
        maker = commit() or _UNKNOWN
        self._makers.update(dict.fromkeys((key for key, _ in results), maker))
        self._served.update(key for key, _ in results)
        if self._file is None or not results:
            return
        assert self.path is not None
        self._values.update(results)
        try:
            if not self._maker_written:
                self._file.write(json.dumps({"commit": maker}) + "\n")
                self._maker_written = True
            self._file.writelines(json.dumps([key, value]) + "\n" for key, value in results)
            self._file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _sync(self) -> None:
        """Put on the disk what was written."""
        if self._file is None:
            return
        assert self.path is not None
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path) -> None:
        with open_regular(path) as file:
            content = file.read().decode("utf-8", "replace")
        maker = _UNKNOWN
        for line in content.splitlines():
            try:
                entry = parse_json(line, finite=False)
            except ValueError:
                continue
            if isinstance(entry, dict):
                # The settings stand first wherever a process has begun.
                maker = entry["commit"] if isinstance(entry.get("commit"), str) else _UNKNOWN
            if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
                self._values[entry[0]], self._makers[entry[0]] = entry[1], maker


def is_estimate(value: Any) -> bool:
    """Whether a stored value is a finite negative log-likelihood and its standard error, NaN where that is unknown."""
    if not isinstance(value, list) or len(value) != 2 or not all(type(one) in (int, float) for one in value):
        return False
    nll, error = value
    return abs(nll) < math.inf and (0 <= error < math.inf or error != error)


def request_key(kind: str, *parts: Any) -> str:
    """The key of a request: a hash of what was asked (JSON values)."""
    return hashlib.sha256(json.dumps([kind, *parts]).encode()).hexdigest()[:32]
