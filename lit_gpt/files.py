"""Files that survive a kill, a full disk and a second writer: durable writes, hashes, a folder's lock.

Decisions: a file appears under its name only when all of it is on the disk (temporary name, flush, fsync, rename, fsync
of the folder), so a reader never sees half of one; the hash is of the bytes that were meant to be written, not of what
the disk gives back; the lock is the kernel's (`flock`), so that it ends with its process, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import socket
import stat
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

LOCK_NAME = "run.lock"
TEMPORARY_SUFFIX = ".tmp"
_READ_BYTES = 1 << 22
# Nothing of this project is nested so deep, and recursion over it would not end well.
_DEEPEST_JSON = 100
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What file systems without flock answer (some network file systems).
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_log = logging.getLogger("lit_gpt")


class SaveError(OSError):
    """A file could not be written; its argument is the line to print. Nothing of it is left behind."""


class FolderInUseError(ValueError):
    """Another process writes into this folder; its argument is the line to print."""


@dataclass(frozen=True)
class FileStamp:
    """What tells a whole file from a broken one."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal."""


class HashingFile:
    """A binary file that is only appended to, and hashed on the way; as much of a file as torch.save wants."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Append bytes; the first error is kept, since torch replaces it by one of its own."""
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.error = self.error or error
            raise
        self._hash.update(view)
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    @property
    def stamp(self) -> FileStamp:
        """Of all that was written."""
        return FileStamp(self._size, self._hash.hexdigest())


def write_file(
    path: Path, write: Callable[[HashingFile], object], before_rename: Callable[[FileStamp], object] | None = None
) -> FileStamp:
    """Write a file that is either whole and on the disk, or not there (an earlier one of that name stays).

    Args:
        path: the file's name; a temporary one ending in `.tmp` is used beside it.
        write: writes the contents.
        before_rename: called with the stamp when all is on the disk but the name.

    Returns:
        Size and hash of what was written.

    Raises:
        SaveError: the disk is full, the folder is not writable ...; the temporary file is gone.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    hashing: HashingFile | None = None
    try:
        with temporary.open("xb") as file:
            hashing = HashingFile(file)
            write(hashing)
            file.flush()
            os.fsync(file.fileno())
        if before_rename is not None:
            before_rename(hashing.stamp)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except SaveError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from error
    except RuntimeError as error:
        if hashing is None or hashing.error is None:
            raise
        raise cannot_write(path, hashing.error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return hashing.stamp


def cannot_write(path: Path, error: OSError) -> SaveError:
    """The line for a failed write, with the room that is left where room was the matter."""
    reason = error.strerror or str(error)
    if error.errno in _NO_ROOM:
        with contextlib.suppress(OSError):
            reason += f" ({shutil.disk_usage(path.parent).free / 1e6:.1f} MB free)"
    saved = SaveError(f"cannot write {path}: {reason}")
    saved.errno = error.errno
    return saved


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as `write_file` does; a number that is not finite, which JSON cannot hold, becomes null."""
    text = json.dumps(_with_finite_numbers(value), indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_file(path, lambda file: file.write(text.encode()))


def _with_finite_numbers(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _with_finite_numbers(item) for key, item in value.items()}
    return [_with_finite_numbers(item) for item in value] if isinstance(value, list | tuple) else value


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; bounds as `read_json`.

    Raises:
        ValueError: it is not JSON, or something else than an object.
        OSError: it cannot be read.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_json(path: Path, largest: int = 1 << 26) -> Any:
    """Read a JSON file.

    Args:
        path: a regular file.
        largest: bytes; the manifest of 300,000 packed files has half of the default.

    Raises:
        ValueError: it is larger, no regular file, or not JSON as `parse_json` reads it.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > largest:
            raise ValueError(f"{path} is too large to be read as JSON: {size:,} bytes, at most {largest:,}")
        content = file.read()
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from error


def parse_json(text: bytes | str, finite: bool = True) -> Any:
    """A JSON value, whatever a file or a request may hold in its place.

    Args:
        text: UTF-8, -16 or -32 if it is bytes.
        finite: refuse NaN and infinity; without, whoever reads the value has to.

    Raises:
        ValueError: it is not JSON; a number is not finite (NaN, Infinity, 1e999); it is nested deeper than 100 times.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    try:
        value = (_FINITE_DECODER if finite else _ANY_DECODER).decode(text)
    except RecursionError:
        deep = True
    else:  # Only a text with so many brackets can be so deep.
        deep = text.count("[") + text.count("{") > _DEEPEST_JSON and _is_deeper(value, _DEEPEST_JSON)
    if deep:
        raise ValueError(f"it is nested deeper than {_DEEPEST_JSON} times")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested more often."""
    layer = [value]
    for _ in range(levels):
        nested = [one.values() if isinstance(one, dict) else one for one in layer if isinstance(one, dict | list)]
        layer = [item for items in nested for item in items]
    return any(isinstance(one, dict | list) for one in layer)


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds the number {text[:20]}, which is not finite")
    return number


_ANY_DECODER = json.JSONDecoder()
_FINITE_DECODER = json.JSONDecoder(parse_float=_finite_number, parse_constant=_finite_number)


def open_regular(path: Path | str) -> BinaryIO:
    """Open a file for reading where a pipe or a device, which may keep the reader waiting for ever, is refused.

    Raises:
        ValueError: it is no regular file.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise ValueError(f"{path} is no regular file but a pipe, a socket or a device")
    return os.fdopen(descriptor, "rb")


def make_folder(path: Path) -> None:
    """Create a folder and its parents, and make sure that files can be written there.

    Raises:
        SaveError: it cannot be created or written to.
    """
    probe = path / f"writable.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SaveError(f"cannot write into the folder {path}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def file_sha256(path: Path | str) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


# --- the lock of a folder -----------------------------------------------------------------------------------------


class _Held:
    """An open lock file; a set of them is closed in forked children, which would keep a dead parent's lock alive."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor


_held: weakref.WeakSet[_Held] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_held):
        with contextlib.suppress(OSError):
            os.close(lock.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def folder_lock(folder: Path, wait_s: float = 3.0) -> Iterator[None]:
    """Keep other processes from writing into a folder for as long as the context (or this process) lives.

    Args:
        folder: must exist; the lock is its file `run.lock`, which stays behind, empty.
        wait_s: how long to wait for a holder that is about to end (a killed launcher's children live a moment longer).

    Raises:
        FolderInUseError: another process holds it; the line names the folder, the process and its host.
        SaveError: the lock file cannot be created.
    """
    path = folder / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise cannot_write(path, error) from error
    lock = _Held(descriptor)
    try:
        _acquire(folder, descriptor, wait_s)
        _held.add(lock)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # on a full disk nobody is named; the next file that is written says so
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        _held.discard(lock)
        os.close(descriptor)


def lock_file(path: Path, descriptor: int, wait_s: float = 3.0) -> None:
    """Keep other processes from writing an open file that they lock, too, until it is closed; see `folder_lock`.

    Raises:
        FolderInUseError: another process holds it; the line names the file.
    """
    _acquire(path, descriptor, wait_s)


def lock_holder(folder: Path) -> dict[str, Any] | None:
    """Who writes into a folder now: pid, host and since, as far as known; None if nobody does."""
    try:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def _acquire(path: Path, descriptor: int, wait_s: float) -> None:
    """Take the lock of a folder or file, or say who has it."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            holder = _holder(descriptor)
            who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}" if holder else "another process"
            since = f" (since {holder['since']})" if "since" in holder else ""
            raise FolderInUseError(
                f"{path} is in use by {who}{since}: wait for it, stop it, or write to another place"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise cannot_write(path, error) from error
            _log.warning("%s: this file system has no locks; start only one process that writes there", path)
            return


def _holder(descriptor: int) -> dict[str, Any]:
    """What the holder wrote down; empty while it has not."""
    try:
        value = parse_json(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
