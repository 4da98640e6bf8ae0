"""Documents out of text files: .txt, .jsonl, .jsonl.zst and .parquet, read in order from any position.

Reading is split in two, so that all cores can share the work: `read_raw_records` (one process) only cuts files into
batches of raw records, and `RawRecords.texts` (any process) parses them. A batch ends at a fixed number of bytes, so
batches depend on the inputs alone. Lines end at newline characters only: U+2028 and its like are part of the text.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lit_gpt.files import parse_json

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".parquet")
# Raw bytes of a batch: large enough that handing it to another process costs little, small enough to balance the cores.
_BATCH_BYTES = 1 << 20
_PARQUET_ROWS = 256
# No document in one line is so long; a compressed line may be, in a small file.
_LONGEST_LINE = 1 << 26
# Compressed bytes that are decompressed at once. A block of them has 4 bytes or more and gives 128 KiB or less
# (RFC 8878), so that this much gives at most 64 MiB.
_ZSTD_BYTES = 1 << 11
# Files up to this many bytes are compared whole when two runs' sources are compared, larger ones by size and both ends.
_SMALL_FILE_BYTES = 1 << 21
_END_BYTES = 1 << 14
_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class DocumentRules:
    """How records become documents; decides the result."""

    document: str = "file"
    """Of a .txt file: "file", all of it is one document, or "line", each line that is not blank."""
    text_field: str = "text"
    """Field of a .jsonl record, or column of a .parquet file, that holds the text."""
    skip_subsets: tuple[str, ...] = ()
    """SlimPajama records whose meta.redpajama_set_name is one of these are left out."""


@dataclass(frozen=True)
class TextFile:
    """One text file."""

    path: Path
    name: str
    """What manifests call it: the path below the folder that was given, so that a moved folder stays the same."""

    @property
    def kind(self) -> str:
        """One of SUFFIXES."""
        return next(suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if self.path.name.endswith(suffix))

    def identity(self) -> str:
        """Name, bytes and SHA-256 (of both ends, if it is large): cheap, and the same on every machine."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            if size <= _SMALL_FILE_BYTES:
                ends = file.read()
            else:
                ends = file.read(_END_BYTES)
                file.seek(size - _END_BYTES)
                ends += file.read()
        return f"{self.name}:{size}:{hashlib.sha256(ends).hexdigest()}"


@dataclass(frozen=True)
class ReadPosition:
    """Where reading goes on."""

    source: int = 0
    """Index of the file."""
    record: int = 0
    """Records (lines, rows) of it that are done."""
    offset: int = 0
    """Bytes of it (decompressed) that are done."""


@dataclass(frozen=True)
class RawRecords:
    """A batch of consecutive raw records of one file."""

    path: Path
    kind: str
    """Suffix of the file: how the records are to be parsed."""
    first: int
    """Number of the first record, from 1."""
    records: tuple[bytes | str, ...]
    end: ReadPosition
    """Behind the batch."""
    bytes_read: int
    """Bytes of the file on the disk that this batch used up."""

    def texts(self, rules: DocumentRules) -> Iterator[str]:
        """The documents of the batch.

        Raises:
            ValueError: a malformed record; names file, line and what was expected.
        """
        for number, record in enumerate(self.records, self.first):
            if isinstance(record, str):
                yield record
            elif self.kind.startswith(".jsonl"):
                if record.strip():
                    document = _json_text(record, rules, f"{self.path}: line {number}")
                    if document is not None:
                        yield document
            else:
                text = _plain_text(record, rules, self.path, number)
                if rules.document == "file" or text.strip():
                    yield text


def find_sources(paths: Sequence[str], share: float = 1.0) -> list[TextFile]:
    """Text files of files, folders (searched to any depth) and glob patterns, each once.

    Args:
        paths: in the order they are read; the files of a folder or pattern are sorted by name.
        share: the first part of the files, in (0, 1].

    Raises:
        ValueError: nothing found, or a file of another kind.
        FileNotFoundError: a path that is not there.
    """
    found: dict[Path, TextFile] = {}
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if _is_text(p) and not _hidden(p.relative_to(path)))
            sources = [TextFile(p, p.relative_to(path).as_posix()) for p in files]
        elif path.exists():
            if not path.is_file():
                raise ValueError(f"--source_path {given}: no regular file but a pipe, a socket or a device")
            sources = [TextFile(path, path.name)]
        else:
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
            if not matches:
                raise FileNotFoundError(
                    f"--source_path {given}: no such file or folder, and no file matches it as a pattern"
                )
            sources = [TextFile(match, match.name) for match in matches if match.is_file()]
        foreign = next((source.path for source in sources if not source.path.name.endswith(SUFFIXES)), None)
        if foreign is not None:
            raise ValueError(f"{foreign}: unknown kind of file: expected {', '.join(SUFFIXES)}")
        if not sources:
            raise ValueError(f"--source_path {given}: no {', '.join(SUFFIXES)} file in it")
        for source in sources:
            found.setdefault(source.path.resolve(), source)
    kept = list(found.values())[: int(len(found) * share)]
    if not kept:
        raise ValueError(f"--percentage {share:g} of {len(found)} file(s) is none; raise it (1 means all)")
    return kept


def read_raw_records(sources: Sequence[TextFile], rules: DocumentRules, start: ReadPosition) -> Iterator[RawRecords]:
    """Raw batches of all files, in order, from a position on.

    Args:
        sources: the files.
        rules: only `document` and `text_field` matter here.
        start: `ReadPosition()`, or the `end` of a batch of an earlier run over the same files.

    Raises:
        ValueError: a file is damaged; names it.
    """
    for index in range(start.source, len(sources)):
        begin = start if index == start.source else ReadPosition(index)
        source = sources[index]
        try:
            if source.kind == ".parquet":
                yield from _parquet_batches(source, index, rules, begin)
            elif source.kind == ".txt" and rules.document == "file":
                if begin.record == 0:
                    content = source.path.read_bytes()
                    yield RawRecords(source.path, ".txt", 1, (content,), ReadPosition(index + 1), len(content))
            else:
                yield from _line_batches(source, index, begin)
        except (EOFError, OSError) as error:
            raise ValueError(f"{source.path}: cannot be read ({error}); copy it again") from error


def _line_batches(source: TextFile, index: int, begin: ReadPosition) -> Iterator[RawRecords]:
    with source.path.open("rb") as raw:
        lines = _decompressed(source, raw)
        _skip(lines, begin.offset)
        record, offset, done = begin.record, begin.offset, raw.tell() if source.kind == ".jsonl.zst" else begin.offset
        while records := _some_lines(lines, source.path, record + 1):
            size = sum(map(len, records))
            offset += size
            on_disk = raw.tell() if source.kind == ".jsonl.zst" else offset
            end = ReadPosition(index, record + len(records), offset)
            yield RawRecords(source.path, source.kind, record + 1, tuple(records), end, on_disk - done)
            record, done = end.record, on_disk


def _some_lines(lines: IO[bytes], path: Path, first: int) -> list[bytes]:
    """The next lines, up to the one that exceeds a batch's bytes.

    Args:
        lines: the rest of the file.
        path: of the file, for messages.
        first: number of the next line.

    Raises:
        ValueError: a line is longer than any document.
    """
    found: list[bytes] = []
    room = _BATCH_BYTES
    while room >= 0 and (line := lines.readline(_LONGEST_LINE + 1)):
        if len(line) > _LONGEST_LINE:
            raise ValueError(f"{path}: line {first + len(found)}: longer than {_LONGEST_LINE:,} bytes; split it")
        found.append(line)
        room -= len(line)
    return found


def _decompressed(source: TextFile, raw: IO[bytes]) -> IO[bytes]:
    """The lines' bytes; a .zst file may hold several frames, each of which must be whole."""
    if source.kind != ".jsonl.zst":
        return raw
    return io.BufferedReader(_ZstdReader(raw), _BATCH_BYTES)


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


def _skip(stream: IO[bytes], count: int) -> None:
    if stream.seekable():
        stream.seek(count)
        return
    while count:
        part = stream.read(min(count, 1 << 22))
        if not part:
            raise EOFError("it has become shorter since the interrupted run")
        count -= len(part)


def _parquet_batches(source: TextFile, index: int, rules: DocumentRules, begin: ReadPosition) -> Iterator[RawRecords]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(source.path)
        if rules.text_field not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise ValueError(f"{source.path}: has no column {rules.text_field!r}, only {names}; give --text_field")
        rows = max(1, file.metadata.num_rows)
        size = source.path.stat().st_size
        record = 0
        for group in range(file.num_row_groups):
            in_group = file.metadata.row_group(group).num_rows
            if record + in_group <= begin.record:
                record += in_group
                continue
            for part in file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[rules.text_field]):
                first, record = record, record + part.num_rows
                if record <= begin.record:
                    continue
                texts = part.column(0).to_pylist()
                wrong = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
                if wrong is not None:
                    found = type(texts[wrong]).__name__
                    raise ValueError(
                        f"{source.path}: row {first + wrong + 1}: expected text in {rules.text_field!r}, got {found}"
                    )
                used = size * record // rows - size * first // rows
                yield RawRecords(source.path, ".parquet", first + 1, tuple(texts), ReadPosition(index, record), used)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{source.path}: not a readable parquet file ({error}); copy it again") from error


def _json_text(line: bytes, rules: DocumentRules, where: str) -> str | None:
    """The text of a record, None for one of a skipped subset."""
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    text = record.get(rules.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        holds = f"fields {', '.join(map(repr, record))}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise ValueError(
            f"{where}: expected an object with text in field {rules.text_field!r}, found {holds}; see --text_field"
        )
    meta = record.get("meta")
    if rules.skip_subsets and isinstance(meta, dict) and meta.get("redpajama_set_name") in rules.skip_subsets:
        return None
    return text


def _plain_text(record: bytes, rules: DocumentRules, path: Path, number: int) -> str:
    if number == 1:
        record = record.removeprefix(_UTF8_BOM)
    if rules.document == "line":
        record = record.removesuffix(b"\n").removesuffix(b"\r")
    try:
        return record.decode()
    except UnicodeDecodeError as error:
        line = number + record.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}: line {line}: not UTF-8 (byte 0x{record[error.start]:02x}: {error.reason}); convert the file"
        ) from error


def _is_text(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and path.is_file()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
