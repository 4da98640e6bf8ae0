"""Text files to packed tokens, on all cores, resumable: what scripts/prepare_text.py runs.

Decisions: one process reads and writes, the others tokenise batches whose results are taken in order, so the output
depends on inputs and settings, never on the number of cores. Each document is followed by the end token (TinyLlama's
rule); the end of the last file is filled with the begin token. Whenever a file is finished, a progress record says
which files are, how far the sources are read, and which tokens wait for the next file; a run that finds one goes on
from there and ends with the same bytes. Manifests are written last: a folder that has one is complete.
"""

from __future__ import annotations

import base64
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.data.packed_format import PackedDatasetBuilder
from lit_gpt.data.preparation_plan import TOKENIZER_FOLDER, PackingPlan
from lit_gpt.data.text_sources import DocumentRules, RawRecords, ReadPosition, read_raw_records
from lit_gpt.files import folder_lock, make_folder, write_json
from lit_gpt.tokenizer import Tokenizer, valid_text

# Below this many bytes of sources, starting other processes takes longer than the work.
_POOL_BYTES = 4 << 20
# Batches under way per process: one being worked on, one waiting.
_BATCHES_AHEAD = 2
# Without a finished file for so long, the progress is recorded all the same.
_RECORD_EVERY_S = 60.0


@dataclass(frozen=True)
class PackingProgress:
    """How far a preparation is."""

    bytes_done: int
    """Of the sources, on the disk."""
    bytes_total: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class PackingResult:
    """What lies in the destination in the end."""

    manifests: dict[str, dict[str, Any]]
    """By prefix."""
    was_finished: bool
    """An earlier run had made it; nothing was done."""


@dataclass(frozen=True)
class PackedPart:
    """A batch's share of one series."""

    tokens: np.ndarray
    """(n,) int32."""
    ends: np.ndarray
    """(documents,) int64: tokens up to the end of each document, its end token included."""
    digests: list[bytes]
    """SHA-256 of each document's UTF-8 text."""
    text_bytes: int
    """UTF-8 bytes of the documents."""


def pack_texts(
    plan: PackingPlan,
    workers: int,
    overwrite: bool,
    report: Callable[[PackingProgress], object],
    notify: Callable[[str], object],
) -> PackingResult:
    """Pack, or go on packing, or find that it is done.

    Args:
        plan: what and where.
        workers: processes that tokenise.
        overwrite: replace another result of the same prefixes.
        report: told the progress after every batch.
        notify: told in a line when an interrupted run is gone on with.

    Raises:
        ValueError: the destination holds something else; a malformed source; no documents.
        OSError: the disk is full, or the destination cannot be written.
    """
    make_folder(plan.lock_folder)
    with folder_lock(plan.lock_folder):
        if not overwrite and (manifests := plan.finished()) is not None:
            return PackingResult(manifests, was_finished=True)
        record = plan.clear_destination(overwrite)
        plan.copy_tokenizer(overwrite)
        all_series = [_Series(plan, prefix) for prefix in plan.prefixes]
        position, bytes_done = ReadPosition(), 0
        if record is not None:
            position, bytes_done = ReadPosition(**record["position"]), record["bytes_done"]
            for series in all_series:
                series.restore(record["series"][series.prefix])
            notify(
                f"going on where an earlier run stopped: {sum(s.documents for s in all_series):,} documents are done"
            )
        _record(plan, all_series, position, bytes_done)
        recorded_s = time.monotonic()
        for batch, parts in _pack_in_order(plan, position, workers):
            files = sum(series.files for series in all_series)
            for series, part in zip(all_series, parts, strict=True):
                series.add(part)
            bytes_done += batch.bytes_read
            if sum(series.files for series in all_series) > files or time.monotonic() - recorded_s > _RECORD_EVERY_S:
                _record(plan, all_series, batch.end, bytes_done)
                recorded_s = time.monotonic()
            counts = (sum(s.documents for s in all_series), sum(s.tokens for s in all_series))
            report(PackingProgress(bytes_done, plan.source_bytes, *counts))
        return PackingResult(_finish(plan, all_series), was_finished=False)


class _Series:
    """The files of one prefix while they are written."""

    def __init__(self, plan: PackingPlan, prefix: str) -> None:
        self.prefix, self._plan = prefix, plan
        tokenizer = plan.tokenizer
        self._builder = PackedDatasetBuilder(
            plan.destination, prefix, plan.chunk_size, tokenizer.bos_id, vocab_size=tokenizer.vocab_size
        )
        self.documents, self.tokens, self.text_bytes, self._chain = 0, 0, 0, b""

    @property
    def files(self) -> int:
        """Finished ones."""
        return len(self._builder.filenames)

    def add(self, part: PackedPart) -> None:
        self._builder.add_documents(part.tokens, part.ends)
        self.documents += len(part.digests)
        self.tokens += len(part.tokens)
        self.text_bytes += part.text_bytes
        for digest in part.digests:
            self._chain = hashlib.sha256(self._chain + digest).digest()

    def record(self) -> dict[str, Any]:
        """What `restore` needs; JSON."""
        return {
            "files": self.files,
            "sha256": self._builder.hashes,
            "pending_ends": self._builder.pending_ends,
            "pending": base64.b64encode(self._builder.pending.astype("<i4").tobytes()).decode(),
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "chain": self._chain.hex(),
        }

    def restore(self, record: dict[str, Any]) -> None:
        pending = np.frombuffer(base64.b64decode(record["pending"]), dtype="<i4")
        self._builder.continue_from(record["files"], pending, record["sha256"], record["pending_ends"])
        self.documents, self.tokens, self.text_bytes = record["documents"], record["tokens"], record["text_bytes"]
        self._chain = bytes.fromhex(record["chain"])

    def close(self) -> dict[str, Any]:
        """Write the last file, or drop it if it is not full; returns the manifest."""
        chunk_size, dropped = self._plan.chunk_size, 0
        if self._plan.drop_last and len(self._builder.pending) < chunk_size:
            dropped = len(self._builder.pending)
        else:
            self._builder.write_rest()
        names = [Path(name).name for name in self._builder.filenames]
        tokens = self.tokens - dropped
        counts = [min(chunk_size, tokens - first) for first in range(0, tokens, chunk_size)]
        files = zip(names, counts, self._builder.hashes, strict=True)
        tokenizer = self._plan.tokenizer
        name = Path(tokenizer.source).resolve().name if Path(tokenizer.source).exists() else tokenizer.source
        manifest = {
            "files": {file: {"tokens": count, "sha256": digest} for file, count, digest in files},
            "tokens": tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "separator": tokenizer.bos_id,
            "chunk_size": chunk_size,
            "dtype": np.dtype(self._builder.dtype).name,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": {
                "source": TOKENIZER_FOLDER,
                "name": name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
            },
            "source_hash": self._chain.hex(),
            "made_from": self._plan.identity,
        }
        if dropped:
            manifest["dropped_tokens"] = dropped
        if self._plan.shard is not None:
            manifest["shard"] = asdict(self._plan.shard)
        return manifest


def _finish(plan: PackingPlan, all_series: list[_Series]) -> dict[str, dict[str, Any]]:
    """Write the last files and the manifests, the main one last."""
    total = sum(series.documents for series in all_series)
    if not total and plan.shard is None:
        raise ValueError(f"the {len(plan.sources)} source file(s), from {plan.sources[0].path} on, hold no documents")
    empty = next((series for series in all_series if not series.documents), None)
    if empty is not None and plan.shard is None:
        share = f"--validation_fraction {plan.validation_fraction:g} of {total} document(s)"
        raise ValueError(
            f"{share} leaves none for {empty.prefix}: make more documents of the text (--document line), or prepare "
            "validation text by itself (--prefix validation)"
        )
    manifests = {series.prefix: series.close() for series in all_series}
    if plan.drop_last and plan.shard is None and not manifests[plan.prefix]["files"]:
        raise ValueError(
            f"--drop_last drops all {all_series[0].tokens:,} tokens: they fill no file; leave it out, or give a smaller "
            "--chunk_size"
        )
    for prefix in reversed(plan.prefixes):
        write_json(plan.manifest_path(prefix), manifests[prefix])
    plan.progress_path.unlink(missing_ok=True)
    return manifests


def _record(plan: PackingPlan, all_series: list[_Series], position: ReadPosition, bytes_done: int) -> None:
    series = {one.prefix: one.record() for one in all_series}
    values = {"made_from": plan.identity, "position": asdict(position), "bytes_done": bytes_done, "series": series}
    write_json(plan.progress_path, values)


# --- tokenising -----------------------------------------------------------------------------------------------------


def pack_batch(
    batch: RawRecords, tokenizer: Tokenizer, rules: DocumentRules, validation_fraction: float
) -> list[PackedPart]:
    """Tokenise a batch.

    Args:
        batch: raw records.
        tokenizer: gives the ids.
        rules: how records become documents.
        validation_fraction: a document whose hash, as a number in [0, 1), lies below goes to the second part.

    Returns:
        One part, or two where there is a validation share.

    Raises:
        ValueError: a malformed record; names file and line.
    """
    ids: list[list[int]] = [[], []]
    ends: list[list[int]] = [[], []]
    digests: list[list[bytes]] = [[], []]
    sizes = [0, 0]
    for text in batch.texts(rules):
        try:
            raw = text.encode()
        except UnicodeEncodeError:
            text = valid_text(text)
            raw = text.encode()
        digest = hashlib.sha256(raw).digest()
        part = int(int.from_bytes(digest[:8], "big") < validation_fraction * 2.0**64)
        ids[part] += tokenizer.encode_ids(text)
        ids[part].append(tokenizer.eos_id)
        ends[part].append(len(ids[part]))
        digests[part].append(digest)
        sizes[part] += len(raw)
    parts = [
        PackedPart(np.asarray(ids[p], dtype=np.int32), np.asarray(ends[p], dtype=np.int64), digests[p], sizes[p])
        for p in (0, 1)
    ]
    return parts if validation_fraction else parts[:1]


def _pack_in_order(
    plan: PackingPlan, start: ReadPosition, workers: int
) -> Iterator[tuple[RawRecords, list[PackedPart]]]:
    """Batches with their tokens, in order, however many processes work on them."""
    batches = read_raw_records(plan.sources, plan.rules, start)
    if workers == 1 or plan.source_bytes < _POOL_BYTES:
        for batch in batches:
            yield batch, pack_batch(batch, plan.tokenizer, plan.rules, plan.validation_fraction)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(str(plan.destination / TOKENIZER_FOLDER), plan.rules, plan.validation_fraction),
    )
    waiting: deque[tuple[RawRecords, Future[list[PackedPart]]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, _submit(pool, batch)))
            if len(waiting) > _BATCHES_AHEAD * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process died, most likely for want of memory: give fewer --num_workers; the same command goes on "
            "from what is finished"
        ) from error
    finally:
        # After an error or Ctrl-C, batches that nobody began are dropped. The workers end by themselves after the one
        # that they are at: one that is stopped while it hands over its result leaves the pool waiting for the rest of it
        # for ever.
        pool.shutdown(wait=False, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, batch: RawRecords) -> Future[list[PackedPart]]:
    """Hand over a batch; processes that this starts inherit a blocked SIGINT, so Ctrl-C is this process's alone."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_work, batch)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


_job: tuple[Tokenizer, DocumentRules, float] | None = None


def _start_worker(tokenizer: str, rules: DocumentRules, validation_fraction: float) -> None:
    """Set up a worker process."""
    global _job
    _job = (Tokenizer(tokenizer), rules, validation_fraction)
    parent = multiprocessing.parent_process()
    assert parent is not None
    follow_parent(parent)


def follow_parent(parent: Any) -> None:
    """End this worker process when its parent process does, even by kill -9."""

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(batch: RawRecords) -> list[PackedPart]:
    assert _job is not None
    return pack_batch(batch, *_job)
