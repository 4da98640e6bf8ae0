"""Pack two crawls of FineWeb, newer than the training data, for the temporal evaluation.

    python scripts/prepare_fineweb.py --source TEXT --crawl my-text --tokens 200000 --tokenizer workdir/tokenizer
    python scripts/prepare_fineweb.py
    python scripts/prepare_fineweb.py --source 'downloads/{crawl}' --crawl CC-MAIN-2024-10

Without flags it reads the first parquet files of CC-MAIN-2024-10 and CC-MAIN-2024-18 from the hub, of each as many
documents as make 100 x 1024 rows of 2048 tokens (about 1 GB of text each, on one core; a line with speed and time left
every few seconds). A local folder or file of .parquet, .jsonl, .jsonl.gz or .jsonl.zst is read the same
way. Tokens as published: the begin token before each document, no end token, all in order. Started again after an
interruption it goes on where it was, with the same bytes in the end. data/fineweb/{crawl}/ then holds
validation_0000000000.bin ... and validation.manifest.json. Needs: pip install 'smdm[eval]'
"""

from __future__ import annotations

import base64
import hashlib
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import Interrupted, parse, run, warn

if TYPE_CHECKING:
    from lit_gpt.tokenizer import Tokenizer

_PREFIX = "validation"
_MANIFEST, _PROGRESS = f"{_PREFIX}.manifest.json", f"{_PREFIX}.progress.json"
# Tokens that the evaluation scores at once; files hold whole rows.
_ROW = 2048
_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
# Raised when a change of the code changes the files.
_VERSION = 1
# A crawl's name is a folder's too.
_NAME = re.compile(r"\w[\w.-]*")
_RECORD_EVERY_S = 60.0
_LINE_EVERY_S = 3.0


@dataclass
class FinewebFlags:
    """Flags of the preparation."""

    source: str = "hf://datasets/HuggingFaceFW/fineweb/data/{crawl}"
    """Folder or file of .parquet, .jsonl, .jsonl.gz or .jsonl.zst, here or on the hub; {crawl} stands for the crawl's name."""
    crawl: list[str] = field(default_factory=lambda: ["CC-MAIN-2024-10", "CC-MAIN-2024-18"])
    """Crawls to prepare; each has its folder in the destination."""
    tokens: int = 100 * 1024 * _ROW
    """Of each crawl, from its beginning on (the published evaluation's number by default)."""
    documents: int = 500_000
    """Of each crawl at most; those without text do not count."""
    tokenizer: str = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    """Folder or file of a tokenizer, or its name on the hub."""
    destination: str = "data/fineweb"
    """Folder of the crawls' folders; made if it is missing."""
    text_field: str = "text"
    """Column or field with the text."""
    chunk_size: int = 1024 * _ROW
    """Tokens per file, a multiple of 2048."""


class _Refused(ValueError):
    """A document that cannot be used, found inside of the reading library."""


def main() -> None:
    """Check the flags, pack crawl by crawl, say what came out."""
    flags = parse(FinewebFlags, None, __doc__)
    _check(flags)
    _load_datatrove()

    from lit_gpt.tokenizer import Tokenizer

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    tokenizer = Tokenizer(flags.tokenizer)
    for crawl in flags.crawl:
        folder = Path(flags.destination) / crawl
        manifest, was_finished = _prepare(flags, crawl, tokenizer, folder)
        done = " (an earlier run had made exactly this: nothing to do)" if was_finished else ""
        counts = f"{manifest['tokens']:,} tokens of {manifest['documents']:,} documents"
        print(f"{crawl}: {counts} in {len(manifest['files'])} file(s) in {folder}{done}", flush=True)
        if manifest["tokens"] < flags.tokens:
            end = f"--documents {flags.documents}" if manifest["documents"] == flags.documents else "the source's end"
            warn(f"{crawl}: only {manifest['tokens']:,} of {flags.tokens:,} tokens, because of {end}")


def _stop(number: int, _: object) -> NoReturn:
    """Signal handler: leave at once; what is recorded is consistent at any moment."""
    raise Interrupted("interrupted: what is finished is kept; the same command goes on from there", number)


def _check(flags: FinewebFlags) -> None:
    """Everything that can be wrong with the flags alone, in one line."""
    counts = {"tokens": flags.tokens, "documents": flags.documents}
    problems = [f"--{name} {value}: expected at least 1" for name, value in counts.items() if value < 1]
    if flags.chunk_size < _ROW or flags.chunk_size % _ROW:
        problems.append(f"--chunk_size {flags.chunk_size}: expected a multiple of {_ROW}")
    if not flags.crawl or len(set(flags.crawl)) < len(flags.crawl) or not all(map(_NAME.fullmatch, flags.crawl)):
        problems.append(f"--crawl {' '.join(flags.crawl)}: expected different names such as CC-MAIN-2024-10")
    if not flags.source:
        problems.append("--source is empty: expected a folder or file, or a path on the hub")
    elif len(flags.crawl) > 1 and "{crawl}" not in flags.source:
        problems.append(
            f"--source {flags.source} would give each of the {len(flags.crawl)} crawls the same text: put {{crawl}} "
            "where their names differ, or give one --crawl"
        )
    if problems:
        raise ValueError("; ".join(problems))


def _load_datatrove() -> Any:
    """The reading library's readers; its log becomes silent, and a line that it would skip ends the work."""
    try:
        from datatrove.pipeline import readers
        from loguru import logger
    except ImportError as error:
        raise ValueError(f"datatrove cannot be imported ({error}): pip install 'smdm[eval]'") from error

    def refuse(message: Any) -> None:
        if message.record["function"] == "read_file":
            raise _Refused(f"{message.record['message']}; copy the file again")

    logger.remove()
    logger.add(refuse, level="WARNING", catch=False)
    return readers


@contextmanager
def _readable(where: str, remedy: str) -> Iterator[None]:
    """Name the file or folder in what the reading libraries raise."""
    try:
        yield
    except (_Refused, Interrupted):
        raise
    # Every remote file system, compression and format has errors of its own kind.
    except Exception as error:
        raise ValueError(f"{where}: cannot be read ({type(error).__name__}: {error}); {remedy}") from error


class _Source:
    """The text files of a crawl: of a folder, or a single one; OSError or ValueError if there is no such thing."""

    def __init__(self, given: str) -> None:
        from datatrove.io import DataFolder

        self.given, self.is_local = given, "://" not in given
        path = Path(given).expanduser().absolute()
        if self.is_local and not path.exists():
            raise FileNotFoundError(f"--source {given}: no such file or folder: looked for {path}")
        is_file = path.is_file() if self.is_local else given.endswith(_SUFFIXES)
        parent, _, name = (str(path) if self.is_local else given.rstrip("/")).rpartition("/")
        if is_file and not name.endswith(_SUFFIXES):
            raise ValueError(f"--source {given}: expected one of {', '.join(_SUFFIXES)}")
        self._only = name if is_file else ""
        with _readable(f"--source {given}", "check the address"):
            self._folder = DataFolder(parent if is_file else f"{parent}/{name}")

    def names(self) -> list[str]:
        """The files, in the order in which they are read; ValueError if there is none, or the hub does not answer."""
        if self._only:
            return [self._only]
        with _readable(f"--source {self.given}", "check the name and the network, or give a local folder"):
            found = self._folder.list_files()
        names = [name for name in found if name.endswith(_SUFFIXES) and not re.search(r"(^|/)\.", name)]
        if not names:
            raise ValueError(f"--source {self.given}: no {', '.join(_SUFFIXES)} file in it")
        return names

    def identity(self) -> dict[str, str]:
        """What tells this text from another: the address, or names and sizes of local files (they may be moved)."""
        if not self.is_local:
            return {"source": self.given}
        listing = "\n".join(f"{name}:{self._folder.size(name)}" for name in self.names())
        return {"source": Path(self.given).name, "source_files": hashlib.sha256(listing.encode()).hexdigest()[:16]}

    def texts(self, name: str, text_field: str) -> Iterator[str]:
        """The documents of a file that have text, in order; ValueError if it cannot be read or has no such field."""
        readers = _load_datatrove()
        where = str(self._folder.resolve_paths(name))

        def adapt(_: Any, record: dict[str, Any], path: str, number: int | str) -> dict[str, Any]:
            if text_field not in record:
                fields = ", ".join(self._fields(name) or record)
                raise _Refused(f"{where}: has no field {text_field!r}, only {fields}; give --text_field")
            text = record[text_field]
            if text is not None and not isinstance(text, str):
                raise _Refused(f"{where}: {text_field!r} holds a {type(text).__name__}, expected text")
            return {"text": text, "id": str(number)}

        if name.endswith(".parquet"):
            # Of the other columns nothing is fetched.
            reader = readers.ParquetReader(self._folder, text_key=text_field, adapter=adapt, read_metadata=False)
        else:
            reader = readers.JsonlReader(self._folder, text_key=text_field, adapter=adapt)
        with _readable(where, "copy it again" if self.is_local else "the same command goes on from what is finished"):
            for document in reader.read_file(name):
                yield document.text

    def _fields(self, name: str) -> list[str]:
        """All columns of a parquet file, of which the reader gives only those that were asked for."""
        import pyarrow.parquet

        if not name.endswith(".parquet"):
            return []
        with self._folder.open(name) as file:
            return pyarrow.parquet.read_schema(file).names


def _prepare(flags: FinewebFlags, crawl: str, tokenizer: Tokenizer, folder: Path) -> tuple[dict[str, Any], bool]:
    """Pack a crawl, or go on packing, or find that it is done; returns the manifest and whether it was."""
    from lit_gpt.files import folder_lock, make_folder

    source = _Source(flags.source.replace("{crawl}", crawl))
    identity = {
        "version": _VERSION,
        "tokens": flags.tokens,
        "documents": flags.documents,
        "tokenizer": tokenizer.fingerprint,
        "text_field": flags.text_field,
        "chunk_size": min(flags.chunk_size, -(-flags.tokens // _ROW) * _ROW),
        **source.identity(),
    }
    make_folder(folder)
    with folder_lock(folder):
        manifest, record = (_made(folder / name, identity) for name in (_MANIFEST, _PROGRESS))
        if manifest:
            (folder / _PROGRESS).unlink(missing_ok=True)
            return manifest, True
        files = sorted(folder.glob(f"{_PREFIX}*.bin"))
        if files and manifest is record is None:
            raise ValueError(f"{files[0]}: of another preparation: give another --destination, or delete {folder}")
        (folder / _MANIFEST).unlink(missing_ok=True)
        packing = _Packing(flags, tokenizer, folder, identity)
        if record:
            packing.restore(record)
        return packing.run(source, crawl), False


def _made(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """A manifest or record of this very preparation; None where there is none, empty if a file that it names is gone."""
    from lit_gpt.files import read_json_object

    if not path.is_file():
        return None
    found = read_json_object(path)
    made_from = found.get("made_from") or {}
    names = [name for name in {**identity, **made_from} if identity.get(name) != made_from.get(name)]
    if names:
        listed = ", ".join(f"{name} {made_from.get(name)} instead of {identity.get(name)}" for name in names)
        raise ValueError(f"{path}: made with {listed}: give another --destination, or delete {path.parent}")
    return found if all((path.parent / name).is_file() for name in found["files"]) else {}


class _Packing:
    """A crawl's files while they are written."""

    def __init__(self, flags: FinewebFlags, tokenizer: Tokenizer, folder: Path, identity: dict[str, Any]) -> None:
        from lit_gpt.data.packed_format import PackedDatasetBuilder

        self._flags, self._tokenizer, self._folder, self._identity = flags, tokenizer, folder, identity
        self._chunk_size = identity["chunk_size"]
        self._builder = PackedDatasetBuilder(
            folder, _PREFIX, self._chunk_size, tokenizer.bos_id, vocab_size=tokenizer.vocab_size
        )
        self._file, self._done_in_file, self._documents, self._tokens = "", 0, 0, 0

    def restore(self, record: dict[str, Any]) -> None:
        """Go on from a record."""
        pending = np.frombuffer(base64.b64decode(record["pending"]), dtype="<i4")
        self._builder.continue_from(len(record["files"]), pending)
        self._file, self._done_in_file = record["file"], record["done_in_file"]
        self._documents, self._tokens = record["documents"], record["tokens"]

    def run(self, source: _Source, crawl: str) -> dict[str, Any]:
        """Read, tokenise, write to the end; returns the manifest."""
        for path in self._folder.glob(f"{_PREFIX}*.tmp"):
            path.unlink()
        display = _Display(crawl, self._flags.tokens, self._tokens)
        if self._documents:
            display.say(f"going on where an earlier run stopped: {self._documents:,} documents are done")
        recorded_s, files = time.monotonic(), len(self._builder.filenames)
        for ids in self._documents_left(source):
            if not self._documents:
                self._record()
            part = np.asarray(ids[: self._flags.tokens - self._tokens], dtype=np.int32)
            self._builder.add_array(part)
            self._tokens += len(part)
            self._documents += 1
            self._done_in_file += 1
            if len(self._builder.filenames) > files or time.monotonic() - recorded_s > _RECORD_EVERY_S:
                self._record()
                recorded_s, files = time.monotonic(), len(self._builder.filenames)
            display.update(self._tokens, self._documents)
        display.say(f"{self._tokens:,} tokens are read")
        if not self._tokens:
            raise ValueError(f"--source {source.given}: its files hold no documents with text")
        return self._finish()

    def _documents_left(self, source: _Source) -> Iterator[list[int]]:
        """Ids of the documents that are still wanted, each with its begin token."""
        if self._tokens >= self._flags.tokens or self._documents >= self._flags.documents:
            return
        names = source.names()
        if self._file and self._file not in names:
            raise ValueError(f"{source.given}: {self._file}, where an earlier run stopped, is gone; put it back")
        for name in names[names.index(self._file) if self._file else 0 :]:
            skip = self._done_in_file if name == self._file else 0
            self._file, self._done_in_file = name, skip
            for number, text in enumerate(source.texts(name, self._flags.text_field)):
                if number < skip:
                    continue
                yield [self._tokenizer.bos_id, *self._tokenizer.encode_ids(text)]
                if self._tokens >= self._flags.tokens or self._documents >= self._flags.documents:
                    return

    def _record(self) -> None:
        """Write down what is done; all files that it names are on the disk."""
        from lit_gpt.files import write_json

        values = {
            "made_from": self._identity,
            "files": [Path(name).name for name in self._builder.filenames],
            "pending": base64.b64encode(self._builder.pending.astype("<i4").tobytes()).decode(),
            "file": self._file,
            "done_in_file": self._done_in_file,
            "documents": self._documents,
            "tokens": self._tokens,
        }
        write_json(self._folder / _PROGRESS, values)

    def _finish(self) -> dict[str, Any]:
        """Write the last file and the manifest."""
        from lit_gpt.files import write_json

        self._builder.write_reminder()
        names = [Path(name).name for name in self._builder.filenames]
        starts = range(0, self._tokens, self._chunk_size)
        tokenizer, given = self._tokenizer, Path(self._tokenizer.source)
        manifest = {
            "files": {
                name: {"tokens": min(self._chunk_size, self._tokens - start)}
                for name, start in zip(names, starts, strict=True)
            },
            "tokens": self._tokens,
            "documents": self._documents,
            "separator": tokenizer.bos_id,
            "chunk_size": self._chunk_size,
            "dtype": np.dtype(self._builder.dtype).name,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": {
                "source": given.resolve().name if given.exists() else tokenizer.source,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
            },
            "made_from": self._identity,
        }
        write_json(self._folder / _MANIFEST, manifest)
        (self._folder / _PROGRESS).unlink()
        return manifest


class _Display:
    """A line on stderr every few seconds: share, documents, speed, time left; on a terminal always the same one."""

    def __init__(self, crawl: str, total: int, tokens: int) -> None:
        self._crawl, self._total, self._first = crawl, total, tokens
        self._start_s = self._line_s = time.monotonic()
        self._erase, self._end = ("\r\x1b[K", "") if sys.stderr.isatty() else ("", "\n")

    def update(self, tokens: int, documents: int) -> None:
        now_s = time.monotonic()
        if now_s - self._line_s < _LINE_EVERY_S:
            return
        self._line_s = now_s
        rate = max(1e-9, (tokens - self._first) / (now_s - self._start_s))
        left_s = (self._total - tokens) / rate
        left = f"{left_s / 60:.0f} min" if left_s > 90 else f"{left_s:.0f} s"
        done = f"{tokens / self._total:.1%}, {documents:,} documents, {tokens:,} tokens"
        self.say(f"{done}, {rate:,.0f} tokens/s, about {left} left", self._end)

    def say(self, line: str, end: str = "\n") -> None:
        print(f"{self._erase}{self._crawl}: {line}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
