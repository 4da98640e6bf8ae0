"""A crawl's documents to packed validation files, resumable: what scripts/prepare_fineweb.py runs.

Decisions: tokens as in the published evaluation's data, the begin token before each document, no end token, all in order;
the number of tokens decides where the files end. A progress record, written with every finished file, says which files
are, how far the source is read and which tokens wait; a run that finds one goes on from there and ends with the same
bytes. The manifest is written last (docs/formats.md).
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lit_gpt.data.crawl_files import CrawlFiles
from lit_gpt.data.packed_format import VALIDATION_PREFIX, PackedDatasetBuilder
from lit_gpt.files import folder_lock, make_folder, read_json_object, write_json
from lit_gpt.tokenizer import Tokenizer

_MANIFEST, _PROGRESS = f"{VALIDATION_PREFIX}.manifest.json", f"{VALIDATION_PREFIX}.progress.json"
_ROW_TOKENS = 2048
"""Tokens that the evaluation scores at once; files hold whole rows."""
# Raised when a change of the code changes the files.
_VERSION = 1
_RECORD_EVERY_S = 60.0


@dataclass(frozen=True)
class CrawlPlan:
    """What is packed of a crawl."""

    source: str
    """Folder or file, here or on the hub."""
    tokens: int
    """From the beginning on."""
    documents: int
    """At most; those without text do not count."""
    text_field: str
    """Column or field with the text."""
    chunk_size: int
    """Tokens per file, a multiple of _ROW_TOKENS."""


class CrawlReport(Protocol):
    """Who is told how far the packing is."""

    def begin(self, tokens: int) -> None:
        """So many tokens are there from an earlier run."""

    def update(self, tokens: int, documents: int) -> None:
        """So many are there now."""

    def say(self, line: str) -> None:
        """Something that happens once."""


def pack_crawl(plan: CrawlPlan, tokenizer: Tokenizer, folder: Path, report: CrawlReport) -> tuple[dict[str, Any], bool]:
    """Pack a crawl, or go on packing, or find that it is done; returns the manifest and whether it was.

    Raises:
        FileNotFoundError, ValueError: there is no such source or it cannot be read; the folder holds something else.
    """
    source = CrawlFiles(plan.source)
    identity = {
        "version": _VERSION,
        "tokens": plan.tokens,
        "documents": plan.documents,
        "tokenizer": tokenizer.fingerprint,
        "text_field": plan.text_field,
        "chunk_size": min(plan.chunk_size, -(-plan.tokens // _ROW_TOKENS) * _ROW_TOKENS),
        **source.identity(),
    }
    make_folder(folder)
    with folder_lock(folder):
        manifest, record = (_made(folder / name, identity) for name in (_MANIFEST, _PROGRESS))
        if manifest:
            (folder / _PROGRESS).unlink(missing_ok=True)
            return manifest, True
        files = sorted(folder.glob(f"{VALIDATION_PREFIX}*.bin"))
        if files and manifest is record is None:
            raise ValueError(f"{files[0]}: of another preparation: give another --destination, or delete {folder}")
        (folder / _MANIFEST).unlink(missing_ok=True)
        packing = _CrawlPacking(plan, tokenizer, folder, identity)
        if record:
            packing.restore(record)
        return packing.run(source, report), False


def _made(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """A manifest or record of this very preparation; None where there is none, empty if a file that it names is gone."""
    if not path.is_file():
        return None
    found = read_json_object(path)
    made_from = found.get("made_from") or {}
    names = [name for name in {**identity, **made_from} if identity.get(name) != made_from.get(name)]
    if names:
        listed = ", ".join(f"{name} {made_from.get(name)} instead of {identity.get(name)}" for name in names)
        raise ValueError(f"{path}: made with {listed}: give another --destination, or delete {path.parent}")
    return found if all((path.parent / name).is_file() for name in found["files"]) else {}


class _CrawlPacking:
    """A crawl's files while they are written."""

    def __init__(self, plan: CrawlPlan, tokenizer: Tokenizer, folder: Path, identity: dict[str, Any]) -> None:
        self._plan, self._tokenizer, self._folder, self._identity = plan, tokenizer, folder, identity
        self._chunk_size = identity["chunk_size"]
        self._builder = PackedDatasetBuilder(
            folder, VALIDATION_PREFIX, self._chunk_size, tokenizer.bos_id, vocab_size=tokenizer.vocab_size
        )
        self._file, self._done_in_file, self._documents, self._tokens = "", 0, 0, 0

    def restore(self, record: dict[str, Any]) -> None:
        """Go on from a record."""
        pending = np.frombuffer(base64.b64decode(record["pending"]), dtype="<i4")
        self._builder.continue_from(len(record["files"]), pending)
        self._file, self._done_in_file = record["file"], record["done_in_file"]
        self._documents, self._tokens = record["documents"], record["tokens"]

    def run(self, source: CrawlFiles, report: CrawlReport) -> dict[str, Any]:
        """Read, tokenise, write to the end; returns the manifest."""
        for path in self._folder.glob(f"{VALIDATION_PREFIX}*.tmp"):
            path.unlink()
        report.begin(self._tokens)
        if self._documents:
            report.say(f"going on where an earlier run stopped: {self._documents:,} documents are done")
        recorded_s, files = time.monotonic(), len(self._builder.filenames)
        for ids in self._documents_left(source):
            if not self._documents:
                self._record()
            part = np.asarray(ids[: self._plan.tokens - self._tokens], dtype=np.int32)
            self._builder.add_array(part)
            self._tokens += len(part)
            self._documents += 1
            self._done_in_file += 1
            if len(self._builder.filenames) > files or time.monotonic() - recorded_s > _RECORD_EVERY_S:
                self._record()
                recorded_s, files = time.monotonic(), len(self._builder.filenames)
            report.update(self._tokens, self._documents)
        report.say(f"{self._tokens:,} tokens are read")
        if not self._tokens:
            raise ValueError(f"--source {source.given}: its files hold no documents with text")
        return self._finish()

    def _documents_left(self, source: CrawlFiles) -> Iterator[list[int]]:
        """Ids of the documents that are still wanted, each with its begin token."""
        if self._tokens >= self._plan.tokens or self._documents >= self._plan.documents:
            return
        names = source.names()
        if self._file and self._file not in names:
            raise ValueError(f"{source.given}: {self._file}, where an earlier run stopped, is gone; put it back")
        for name in names[names.index(self._file) if self._file else 0 :]:
            skip = self._done_in_file if name == self._file else 0
            self._file, self._done_in_file = name, skip
            for number, text in enumerate(source.texts(name, self._plan.text_field)):
                if number < skip:
                    continue
                yield [self._tokenizer.bos_id, *self._tokenizer.encode_ids(text)]
                if self._tokens >= self._plan.tokens or self._documents >= self._plan.documents:
                    return

    def _record(self) -> None:
        """Write down what is done; all files that it names are on the disk."""
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
        self._builder.write_rest()
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
