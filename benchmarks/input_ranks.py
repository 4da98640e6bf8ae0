"""The second half of `input_pipeline.py`: a corpus of many sparse files, read by simulated ranks one after the other.

The files are holes with a header, so what is measured is everything but the disk: finding, opening, ordering, copying.
A rank is a process of its own, since memory is what is asked for: it gets the one scan as rank 0 would send it.
"""

from __future__ import annotations

import os
import statistics
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from tqdm import tqdm

from benchmarks.common import OwnProcess
from lit_gpt.data.packed_dataset import open_mixture
from lit_gpt.data.packed_files import PackedFiles, scan_folder
from lit_gpt.data.packed_format import MAGIC

if TYPE_CHECKING:
    from lit_gpt.data.packed_dataset import PackedMixture

_PREFIX = "train_slim"
_VOCABULARY = 32000
# What `docs/formats.md` says of a header: magic, version, type (8: uint16), tokens.
_HEADER = struct.Struct("<7sQBQ")
# A scan is kept of files that have not changed for two seconds.
_AGE_S = 2.1
# Rows of a rank's step, which are one micro batch.
_ROWS = 8
_EARLY = 10
# Threads whose rates are compared, in turn, since other work on the machine comes and goes.
_THREADS, _ROUNDS = (1, 8), 7


@dataclass(frozen=True)
class Corpus:
    """What the ranks read."""

    folder: Path
    files: int
    tokens: int
    """Of all files."""
    block_length: int
    ranks: int
    samples: int
    """Samples read for each rate."""
    batches: int
    """Batches of a rank."""


Row = tuple[str, str]


def measure_ranks(corpus: Corpus) -> list[Row]:
    """Make the files and read them; what was measured, and the figure with its unit."""
    make_s = _seconds(lambda: make_sparse_files(corpus))
    rows = [(f"making {corpus.files:,} files", f"{make_s:.1f} s")]
    time.sleep(_AGE_S)
    scanner = OwnProcess(_build_scanner, corpus)
    try:
        files, first_s, before_mb, after_mb = scanner.run()
        again, second_s, _, _ = scanner.run()
    finally:
        scanner.close()
    rows.append(("first scan, every file opened", f"{first_s:.2f} s"))
    rows.append(("memory of the scanning process before and after", f"{before_mb:.0f} MB, {after_mb:.0f} MB"))
    assert again.fingerprint == files.fingerprint
    rows.append(("second start, the scan was kept", f"{second_s:.2f} s"))
    ranks = [_measure_rank(corpus, files, rank) for rank in tqdm(range(corpus.ranks), "reading by rank", leave=False)]
    first_batch = max(one[0] for one in ranks)
    rows.append((f"first batch after the first scan, slowest of {corpus.ranks} ranks", f"{first_batch:.2f} s"))
    early, late = min(_EARLY, corpus.batches), corpus.batches
    rows.append((f"memory of a rank after {early} batches, largest", f"{max(one[1] for one in ranks):.1f} MB"))
    rows.append((f"memory of a rank after {late:,} batches, largest", f"{max(one[2] for one in ranks):.1f} MB"))
    growth = max(one[2] - one[1] for one in ranks)
    rows.append(("growth of a rank between the two, largest", f"{growth:.1f} MB"))
    rates = OwnProcess(_build_rates, corpus, files)
    try:
        rows += rates.run()
    finally:
        rates.close()
    return rows


def make_sparse_files(corpus: Corpus) -> None:
    """Packed files of zeros that take a block of the disk each; only the last token of all is another."""
    size = corpus.tokens // corpus.files
    header = _HEADER.pack(MAGIC, 1, 8, size)
    path = corpus.folder
    for number in tqdm(range(corpus.files), "making files", leave=False):
        path = corpus.folder / f"{_PREFIX}_{number:010d}.bin"
        with path.open("wb", buffering=0) as file:
            file.write(header)
            file.truncate(_HEADER.size + 2 * size)
    with path.open("r+b") as file:
        # Else the whole last file looks like the padding of the series.
        file.seek(-2, os.SEEK_END)
        file.write(b"\x02\x00")


def _build_scanner(corpus: Corpus) -> Callable[[], tuple[PackedFiles, float, float, float]]:
    """A start that scans: the scan, seconds, and MB of memory before and after."""

    def scan() -> tuple[PackedFiles, float, float, float]:
        before = _memory_mb()
        start = time.perf_counter()
        found = scan_folder(corpus.folder, [_PREFIX], corpus.block_length)[_PREFIX]
        return found, time.perf_counter() - start, before, _memory_mb()

    return scan


def _measure_rank(corpus: Corpus, files: PackedFiles, rank: int) -> tuple[float, float, float]:
    """Seconds to the first batch, MB of memory after few and after many batches."""
    process = OwnProcess(_build_rank, corpus, rank)
    try:
        return process.run(files)
    finally:
        process.close()


def _build_rank(corpus: Corpus, rank: int) -> Callable[[PackedFiles], tuple[float, float, float]]:
    """A rank that has started and waits for the scan."""
    from lit_gpt.data.batching import Group, StepLayout, prefetched_steps

    layout = StepLayout(corpus.ranks * _ROWS, _ROWS, _ROWS, rank * _ROWS, _ROWS)
    block = Group(corpus.block_length - 1, 1.0)

    def read(files: PackedFiles) -> tuple[float, float, float]:
        start = time.perf_counter()
        data = _open(corpus, files)
        steps = prefetched_steps(data, lambda *_: block, layout, range(corpus.batches), lambda batch: batch)
        first_s = early_mb = 0.0
        for number, (_, _batches) in enumerate(steps, 1):
            if number == 1:
                first_s = time.perf_counter() - start
            if number == min(_EARLY, corpus.batches):
                early_mb = _memory_mb()
        return first_s, early_mb, _memory_mb()

    return read


def _build_rates(corpus: Corpus, files: PackedFiles) -> Callable[[], list[Row]]:
    """Rates of reading, by threads: median, least and most of the rounds.

    Cold samples lie in files of which nothing was read but the ends.
    """
    from lit_gpt.data.batching import Group, StepLayout, prefetched_steps

    layout = StepLayout(128, 8, 8, 0, 128)
    block = Group(corpus.block_length - 1, 1.0)
    count = -(-corpus.samples // 128)
    data = _open(corpus, files)

    def rate(first: int, threads: int) -> float:
        steps = range(first, first + count)

        def read() -> None:
            for _ in prefetched_steps(data, lambda *_: block, layout, steps, lambda batch: batch, threads):
                pass

        return count * 128 / _seconds(read)

    def measure() -> list[Row]:
        rates: dict[str, list[float]] = {}
        # Behind what the ranks have read, and each figure's own.
        first = corpus.batches * corpus.ranks
        for threads in _THREADS * _ROUNDS:
            for kind in ("cold", "warm"):
                name = f"{kind} files, {threads} reader thread{'s' if threads > 1 else ''}"
                rates.setdefault(name, []).append(rate(first, threads))
            first += count
        return [
            (name, f"{statistics.median(found):,.0f} samples/s ({min(found):,.0f} to {max(found):,.0f})")
            for name, found in rates.items()
        ]

    return measure


def _open(corpus: Corpus, files: PackedFiles) -> PackedMixture:
    return open_mixture(corpus.folder, {_PREFIX: 1.0}, corpus.block_length, _VOCABULARY, 0, {_PREFIX: files})


def _memory_mb() -> float:
    """Resident memory of this process in 10^6 bytes."""
    return float(psutil.Process().memory_info().rss) / 1e6


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
