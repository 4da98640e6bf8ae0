"""Files of text: .txt, .jsonl and .parquet, plain or compressed, here or on the hub.

The files of a folder, or of a pattern such as `*`, count by their suffix; a file that is named counts as text whatever it is
called, and so do those that match a pattern with a suffix of its own, such as `*.py`. What lies on the hub
(`hf://datasets/OWNER/NAME`, or any address that fsspec opens) is read in place, nothing is kept of it. A compressed file that
ends too early is an error.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

PLAIN_TEXT = ".txt"
_JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
SUFFIXES = (PLAIN_TEXT, *_JSON_LINES, ".parquet")
"""Of the files that are taken from a folder."""
# Compressed bytes that are decompressed at once. A block of them has 4 bytes or more and gives 128 KiB or less
# (RFC 8878), so that this much gives at most 64 MiB.
_ZSTD_BYTES = 1 << 11
_BUFFER_BYTES = 1 << 20
# Files up to this many bytes are compared whole when two runs' sources are compared, larger ones by size and both ends.
_SMALL_FILE_BYTES = 1 << 21
_END_BYTES = 1 << 14
# A data set of the hub, perhaps with a folder in it.
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(/.*)?")


@dataclass(frozen=True)
class RemotePath:
    """A file behind an address that fsspec opens; has what is needed of a path."""

    url: str
    size: int
    """Bytes."""
    content: str
    """What the store says of its content: a hash where it has one, else the time of its last change, else ''."""

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]

    def open(self, mode: str) -> IO[bytes]:
        """The file's bytes; may be read from any place."""
        from fsspec.core import url_to_fs

        system, path = url_to_fs(self.url)
        return system.open(path, mode)


FilePath = Path | RemotePath
"""Where a text file lies."""


@dataclass(frozen=True)
class TextFile:
    """One text file."""

    path: FilePath
    name: str
    """What manifests call it: the path below the folder that was given, so that a moved folder stays the same."""

    @property
    def kind(self) -> str:
        """One of SUFFIXES; PLAIN_TEXT for other names."""
        longest_first = sorted(SUFFIXES, key=len, reverse=True)
        return next((suffix for suffix in longest_first if self.path.name.endswith(suffix)), PLAIN_TEXT)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self.path.size if isinstance(self.path, RemotePath) else self.path.stat().st_size

    def identity(self) -> str:
        """Name, bytes and SHA-256 (of both ends, if it is large; of a remote one what its store says): cheap, and the
        same on every machine.
        """
        if isinstance(self.path, RemotePath):
            return f"{self.name}:{self.size}:{self.path.content}"
        size = self.size
        with self.path.open("rb") as file:
            if size <= _SMALL_FILE_BYTES:
                ends = file.read()
            else:
                ends = file.read(_END_BYTES)
                file.seek(size - _END_BYTES)
                ends += file.read()
        return f"{self.name}:{size}:{hashlib.sha256(ends).hexdigest()}"


def find_sources(paths: Sequence[str], share: float = 1.0, as_text: Sequence[str] = ()) -> list[TextFile]:
    """Text files of files, folders (searched to any depth), glob patterns and places on the hub, each once.

    Args:
        paths: in the order they are read; the files of a folder or pattern are sorted by name.
        share: the first part of the files, in (0, 1].
        as_text: patterns of names, such as `*.py`: a folder's files of these names are plain text, too.

    Raises:
        ValueError: nothing found, or what a path names is no file.
        FileNotFoundError: a path that is not there.
    """
    found: dict[Path | str, TextFile] = {}
    for given in paths:
        for source in _sources_of(given, tuple(as_text)):
            found.setdefault(source.path.resolve() if isinstance(source.path, Path) else source.path.url, source)
    kept = list(found.values())[: int(len(found) * share)]
    if not kept:
        raise ValueError(f"--percentage {share:g} of {len(found)} file(s) is none; raise it (1 means all)")
    return kept


def _sources_of(given: str, as_text: tuple[str, ...]) -> list[TextFile]:
    """The text files of one path."""
    path = Path(given).expanduser()
    if "://" in given:
        return _remote_sources(given, given, as_text)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if not _hidden(p.relative_to(path).as_posix()) and p.is_file())
        sources = [TextFile(p, p.relative_to(path).as_posix()) for p in files if _is_text(p.name, as_text)]
        if not sources:
            raise _no_text(given, [p.name for p in files])
        return sources
    if path.exists():
        if not path.is_file():
            raise ValueError(f"--source_path {given}: no regular file but a pipe, a socket or a device")
        return [TextFile(path, path.name)]
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if matches:
        files = [match for match in matches if match.is_file()]
        if not files:
            raise ValueError(
                f"--source_path {given}: matches folders only; give a folder itself, or a pattern of files"
            )
        # A suffix that is written out is meant; `*` also matches what lies beside the text, such as a description in JSON.
        meant = as_text if glob.has_magic(path.suffix) or not path.suffix else ("*",)
        sources = [TextFile(file, file.name) for file in files if _is_text(file.name, meant)]
        if not sources:
            raise _no_text(given, [file.name for file in files])
        return sources
    missing = f"--source_path {given}: no such file or folder, and no file matches it as a pattern"
    if _HUB_NAME.fullmatch(given) and not given.endswith(SUFFIXES) and not Path(path.parts[0]).exists():
        try:
            return _remote_sources(given, f"hf://datasets/{given}", as_text)
        except OSError as error:
            raise FileNotFoundError(f"{missing}; nor could the hub give a data set of that name ({error})") from error
    raise FileNotFoundError(missing)


def _remote_sources(given: str, url: str, as_text: tuple[str, ...]) -> list[TextFile]:
    """The text files of an address, a folder or a file."""
    from fsspec.core import url_to_fs

    try:
        system, root = url_to_fs(url.rstrip("/"))
        listed = system.find(root, detail=True)
    except Exception as error:  # every file system has errors of its own kind
        reason = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"{url}: {type(error).__name__}: {reason}; check the address and the network"
        ) from error
    root = root.rstrip("/")
    sources = []
    for path, info in sorted(listed.items()):
        name = path[len(root) :].lstrip("/") if path != root else ""
        if name and (_hidden(name) or not _is_text(name.rpartition("/")[2], as_text)):
            continue
        remote = RemotePath(system.unstrip_protocol(path), int(info["size"]), _content_of(info))
        sources.append(TextFile(remote, name or remote.name))
    if not sources:
        raise _no_text(given, [path.rpartition("/")[2] for path in listed])
    return sources


def _content_of(info: dict[str, Any]) -> str:
    """A hash of a remote file's content, or when it was changed, as far as its store tells without reading it."""
    stored = info.get("lfs") or {}
    known = stored.get("sha256") or info.get("blob_id") or info.get("ETag") or info.get("etag")
    times = (info.get(name) for name in ("mtime", "LastModified", "last_modified", "modified", "updated", "created"))
    return str(known or next((time for time in times if time), ""))


def _no_text(given: str, others: list[str]) -> ValueError:
    """No file counts as text."""
    hint = ""
    if others:
        suffix = os.path.splitext(others[0])[1]
        hint = f"; of its {len(others)} other file(s) --as_text '*{suffix}' takes those like {others[0]} as plain text"
    return ValueError(f"--source_path {given}: no {', '.join(SUFFIXES)} file in it{hint}")


def _is_text(name: str, as_text: tuple[str, ...]) -> bool:
    return name.endswith(SUFFIXES) or any(fnmatch.fnmatchcase(name, pattern) for pattern in as_text)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def decompressed(source: TextFile, raw: IO[bytes]) -> IO[bytes]:
    """The content's bytes; `raw` itself where nothing is compressed.

    A compressed file may hold several streams, one behind the other; that each is whole is checked (EOFError).
    """
    if source.kind.endswith(".zst"):
        return io.BufferedReader(_ZstdReader(raw), _BUFFER_BYTES)
    if source.kind.endswith(".gz"):
        import gzip

        return io.BufferedReader(gzip.GzipFile(fileobj=raw, mode="rb"), _BUFFER_BYTES)
    return raw


class _ZstdReader(io.RawIOBase):
    """Decompresses, and notices a truncated file, which the library's own reader takes for a complete one."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw, self._error = raw, zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(_ZSTD_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError(f"truncated zstd data: it ends at byte {self._raw.tell()} within a frame")
                return 0
            self._output = memoryview(self._decompress())
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self) -> bytes:
        if self._frame is None:
            self._frame = self._new_frame()
        try:
            output = self._frame.decompress(self._input)
        except self._error as error:
            raise OSError(f"damaged zstd data before byte {self._raw.tell()}: {error}") from error
        self._input = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return output
