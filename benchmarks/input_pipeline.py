"""How fast packed data is read: tokens per second, cold and warm, and what seeking to sample 10^9 costs.

    python benchmarks/input_pipeline.py
    python benchmarks/input_pipeline.py --megabytes 2000 --files 500
    python benchmarks/input_pipeline.py --ranks 16 --files 300000 --output docs/results/input_pipeline.md

Writes made-up packed files to a temporary folder (removed at the end), opens them as training does, and prints a table.
"Cold" means that the kernel was told to forget the files' pages first; the disk's own cache may still hold them. With
--train_tokens_per_s (from a run's log) it also says how many times faster reading is than training. About 10 s.

With --ranks it measures a start at the size of a large run instead: --tokens in --files sparse files, which take 4 KB of
the disk each, read by so many ranks one after the other. Some minutes for 300,000 files, a third of them for removing them.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from lit_gpt.cli import parse, run
from lit_gpt.evaluation.result_pages import changed_flags, check_page, command_line

if TYPE_CHECKING:
    from lit_gpt.data.packed_dataset import PackedMixture

VOCABULARY = 32000
FAR = 10**9
# The flags of the run whose page is in the repository.
_FULL = {"ranks": 16, "files": 300_000}


@dataclass
class Flags:
    """What is measured."""

    block_length: int = 2049
    """Tokens of a sample."""
    megabytes: int = 400
    """Size of the made-up data, in 10^6 bytes of two bytes per token."""
    ranks: int = 0
    """Simulated processes that read sparse files; 0: one process reads real ones."""
    tokens: float = 1e12
    """Tokens of all sparse files."""
    batches: int = 1000
    """Batches that each of the simulated processes reads."""
    output: str | None = None
    """Also write what --ranks measured to this file, as a page."""
    files: int = 100
    """Number of files; more than 64 are not all mapped at once."""
    samples: int = 2000
    """Samples read for each figure."""
    train_tokens_per_s: float | None = None
    """What training consumes, to compare with."""


def main(argv: list[str] | None = None) -> None:
    """Make data, measure, print."""
    flags = parse(Flags, argv, __doc__)
    if min(flags.block_length - 1, flags.megabytes, flags.files, flags.samples) < 1:
        raise ValueError("--block_length must be at least 2, --megabytes, --files and --samples at least 1")
    if flags.ranks < 0 or flags.batches < 1 or flags.tokens < flags.files * flags.block_length:
        raise ValueError("--ranks must be at least 0, --batches at least 1, --tokens at least a block for each file")
    if flags.output is not None and (not flags.ranks or not Path(flags.output).parent.is_dir()):
        raise ValueError(f"--output {flags.output}: needs --ranks, and a folder that is there")
    if flags.output is not None:
        check_page("output", Path(flags.output), changed_flags(flags, but=("output",)) == _FULL, "a run of full size")
    # A scheduler's signal ends the work as Ctrl-C does, so that the files are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="input_pipeline_") as folder:
        if flags.ranks:
            simulate(flags, Path(folder))
        else:
            measure(flags, Path(folder))


def simulate(flags: Flags, folder: Path) -> None:
    """Print the page of a large corpus made in `folder`, and write it where --output says."""
    from benchmarks.common import table
    from benchmarks.input_ranks import Corpus, measure_ranks
    from lit_gpt.evaluation import versions

    started, load = time.perf_counter(), os.getloadavg()[0]
    rows = measure_ranks(
        Corpus(folder, flags.files, int(flags.tokens), flags.block_length, flags.ranks, flags.samples, flags.batches)
    )
    minutes = (time.perf_counter() - started) / 60
    command = command_line("benchmarks/input_pipeline.py", flags, but=("output",))
    text = "\n\n".join(
        [
            "# Reading packed data at the size of a large run",
            f"{datetime.date.today()}, commit {(versions.commit() or 'unknown')[:7]}, {os.cpu_count()} cores of "
            f"{processor()}, {psutil.virtual_memory().total / 2**30:.0f} GB; load of the machine {load:.1f} before and "
            f"{os.getloadavg()[0]:.1f} after, {minutes:.1f} minutes without removing the files:",
            f"```\n{command}\n```",
            f"{flags.tokens:g} tokens in {flags.files:,} sparse packed files (a block of the disk each), blocks of "
            f"{flags.block_length} tokens, {flags.ranks} simulated ranks, each a process, one after the other, "
            f"{flags.batches} batches of 8 samples each. "
            "The first scan reads the headers that were just written. Sparse files take no time of the disk: cold means "
            "that nothing of these samples was read before. Above a load of 1 the times are those of a busy machine. "
            "Goals: the first batch under 2 s after the first scan, and no growth of a rank's memory.",
            table(["what", "measured"], [list(row) for row in rows]),
        ]
    )
    print(text, flush=True)
    if flags.output is not None:
        Path(flags.output).write_text(text + "\n")


def processor() -> str:
    """The processor's name as the kernel gives it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def measure(flags: Flags, folder: Path) -> None:
    """Print the table for data made in `folder`."""
    from rich.console import Console
    from rich.table import Table

    from lit_gpt.data.packed_dataset import open_mixture

    paths = make_files(flags, folder)
    weights = {"train_slim": 0.7, "train_star": 0.3}

    def open_data() -> PackedMixture:
        return open_mixture(folder, weights, flags.block_length, VOCABULARY, seed=0)

    open_s = seconds(open_data)
    data = open_data()
    forget(paths)
    cold_s = seconds(lambda: [data[k] for k in range(flags.samples)])
    warm_s = seconds(lambda: [data[k] for k in range(flags.samples)])
    rows = min(256, flags.samples)
    steps = -(-flags.samples // rows)
    batches_s = seconds(lambda: read_steps(data, rows, steps)) * flags.samples / (rows * steps)
    order_s = seconds(lambda: [data.extent(k) for k in range(flags.samples)])
    fresh = open_data()
    seek_s = seconds(lambda: fresh[FAR])
    far_s = seconds(lambda: [data[FAR + k] for k in range(flags.samples)])

    table = Table(title=f"{len(paths)} files, {flags.megabytes} MB, blocks of {flags.block_length} tokens, one process")
    for heading in ("reading", "ms per sample", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "reading" else "right")
    rates = {
        "cold": cold_s,
        "warm": warm_s,
        "warm, from sample 10^9 on": far_s,
        "warm, as the trainer's batches (prefetched_steps)": batches_s,
        "order alone (no tokens read)": order_s,
    }
    for name, elapsed_s in rates.items():
        rate = flags.samples * flags.block_length / elapsed_s
        table.add_row(name, f"{elapsed_s * 1000 / flags.samples:.4f}", f"{rate:,.0f}")
    console = Console()
    console.print(table)
    console.print(
        f"opening all files: {open_s * 1000:.1f} ms; seeking to sample 10^9 and reading it: {seek_s * 1000:.2f} ms"
    )
    if flags.train_tokens_per_s:
        times = flags.samples * flags.block_length / cold_s / flags.train_tokens_per_s
        console.print(
            f"cold reading is {times:,.0f} times as fast as training at {flags.train_tokens_per_s:,.0f} tokens/s"
        )


def read_steps(data: PackedMixture, rows: int, steps: int) -> None:
    """Read steps of so many rows the way the trainer does, in micro batches of 8."""
    from lit_gpt.data.batching import Group, StepLayout, prefetched_steps

    layout = StepLayout(rows, group_size=1, micro_batch_size=8, first_row=0, device_rows=rows)
    block = Group(data.block_length - 1, 1.0)
    for _ in prefetched_steps(data, lambda step, group, extents: block, layout, range(steps), lambda batch: batch):
        pass


def make_files(flags: Flags, folder: Path) -> list[Path]:
    """Packed files of random tokens, seven of ten in the first set."""
    import numpy as np

    from lit_gpt.data.packed_format import PackedDatasetBuilder

    blocks = max(1, flags.megabytes * 1_000_000 // (2 * flags.block_length * flags.files))
    generator = np.random.default_rng(0)
    paths: list[Path] = []
    first = max(1, round(0.7 * flags.files))
    for prefix, count in (("train_slim", first), ("train_star", max(1, flags.files - first))):
        builder = PackedDatasetBuilder(folder, prefix, blocks * flags.block_length, 1, vocab_size=VOCABULARY)
        for _ in range(count):
            builder.add_array(generator.integers(2, VOCABULARY, blocks * flags.block_length, dtype=np.uint16))
        builder.write_reminder()
        paths += [Path(name) for name in builder.filenames]
    return paths


def forget(paths: list[Path]) -> None:
    """Ask the kernel to drop the files from its page cache, where it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    run(main)
