"""Documents out of text files (`text_files`), read in order from any position.

Reading is split in two, so that all cores can share the work: `read_raw_records` (one process) only cuts files into
batches of raw records, and `RawRecords.texts` (any process) parses them. A batch ends at a fixed number of bytes, so
batches depend on the inputs alone. Lines end at newline characters only: U+2028 and its like are part of the text.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lit_gpt.cli import Interrupted
from lit_gpt.data.text_files import PLAIN_TEXT, FilePath, TextFile, decompressed
from lit_gpt.files import parse_json

# Raw bytes of a batch: large enough that handing it to another process costs little, small enough to balance the cores.
_BATCH_BYTES = 1 << 20
_PARQUET_ROWS = 256
# No document in one line is so long; a compressed line may be, in a small file.
_LONGEST_LINE = 1 << 26
# A text file of more bytes is no single document: a tokenizer takes some hundred bytes of memory for each of them.
_LARGEST_TEXT_FILE = 1 << 28
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

    path: FilePath
    kind: str
    """Of the file, as `TextFile.kind`: how the records are to be parsed."""
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
            elif self.kind != PLAIN_TEXT:
                if record.strip():
                    document = _json_text(record, rules, f"{self.path}: line {number}")
                    if document is not None:
                        yield document
            else:
                text = _plain_text(record, rules, self.path, number)
                if rules.document == "file" or text.strip():
                    yield text


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
            elif source.kind == PLAIN_TEXT and rules.document == "file":
                if begin.record == 0:
                    content = _whole_file(source)
                    yield RawRecords(source.path, source.kind, 1, (content,), ReadPosition(index + 1), len(content))
            else:
                yield from _line_batches(source, index, begin)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{source.path}: cannot be read ({error}); copy it again") from error
        except (ValueError, Interrupted):
            raise
        # Every remote file system has errors of its own kind.
        except Exception as error:
            if isinstance(source.path, Path):
                raise
            raise ValueError(
                f"{source.path}: cannot be read ({type(error).__name__}: {error}); the same command goes on from there"
            ) from error


def _whole_file(source: TextFile) -> bytes:
    """A text file that is one document."""
    with source.path.open("rb") as file:
        content = file.read(_LARGEST_TEXT_FILE + 1)
    if len(content) > _LARGEST_TEXT_FILE:
        raise ValueError(
            f"{source.path}: more than {_LARGEST_TEXT_FILE >> 20} MiB in one document; split it, or give --document line"
        )
    return content


def _line_batches(source: TextFile, index: int, begin: ReadPosition) -> Iterator[RawRecords]:
    with source.path.open("rb") as raw:
        lines = decompressed(source, raw)
        is_packed = lines is not raw
        _skip(lines, begin.offset)
        record, offset, done = begin.record, begin.offset, raw.tell() if is_packed else begin.offset
        while records := _some_lines(lines, source.path, record + 1):
            size = sum(map(len, records))
            offset += size
            on_disk = raw.tell() if is_packed else offset
            end = ReadPosition(index, record + len(records), offset)
            yield RawRecords(source.path, source.kind, record + 1, tuple(records), end, on_disk - done)
            record, done = end.record, on_disk


def _some_lines(lines: IO[bytes], path: FilePath, first: int) -> list[bytes]:
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

    with source.path.open("rb") as raw, _named(source):
        file = pyarrow.parquet.ParquetFile(raw)
        if rules.text_field not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise ValueError(f"{source.path}: has no column {rules.text_field!r}, only {names}; give --text_field")
        rows = max(1, file.metadata.num_rows)
        size = source.size
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


@contextmanager
def _named(source: TextFile) -> Iterator[None]:
    """Name the file in what the parquet library raises."""
    import pyarrow

    try:
        yield
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


def _plain_text(record: bytes, rules: DocumentRules, path: FilePath, number: int) -> str:
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


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
