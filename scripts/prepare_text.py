"""Pack text into the .bin files that training reads.

    python scripts/prepare_text.py --source_path TEXT --tokenizer_path TOKENIZER --destination_path workdir/data
    python scripts/prepare_text.py --source_path SlimPajama/train --destination_path /dataset/slim_star_combined
    python scripts/prepare_text.py --source_path starcoderdata --text_field content --prefix train_star \\
        --destination_path /dataset/slim_star_combined

Reads .txt, .jsonl, .jsonl.zst and .parquet on all cores, a few MB/s per core, and shows progress. Started again after
an interruption it goes on where it was, with the same result. Ends with the number of files, documents and tokens; the
destination then holds {prefix}_0000000000.bin ..., {prefix}.manifest.json and the tokenizer.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import Interrupted, parse, run

if TYPE_CHECKING:
    from lit_gpt.data.preparation import PackingProgress, PackingResult
    from lit_gpt.data.preparation_plan import PackingPlan

# Tokens that are held in memory until a file is full.
_LARGEST_CHUNK = 1 << 28
# Seconds between two lines where there is no terminal to draw a bar on.
_LINE_EVERY_S = 30.0


@dataclass
class PrepareFlags:
    """Flags of the preparation."""

    source_path: list[str] = field(default_factory=list)
    """Files, folders or glob patterns of text, in this order; several follow one flag or stand as [A, B]."""
    destination_path: str = ""
    """Folder of the packed files; made if it is missing."""
    tokenizer_path: str = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    """Folder or file of a tokenizer, or its name on the hub."""
    prefix: str = "train_slim"
    """Of the file names; training reads train_slim, train_star and validation."""
    chunk_size: int = 2049 * 1024
    """Tokens per file; blocks do not cross files."""
    document: str = "file"
    """Of a .txt file: file (all of it is one document) or line (each line that is not blank)."""
    text_field: str = "text"
    """Field of .jsonl records, or column of .parquet files, with the text."""
    skip_subsets: list[str] = field(default_factory=lambda: ["RedPajamaGithub"])
    """SlimPajama records of these subsets are left out, as TinyLlama does (its code comes from StarCoder)."""
    percentage: float = 1.0
    """The first part of the files, from 0 to 1 (as in TinyLlama's scripts, 1 means all)."""
    validation_fraction: float = 0.0
    """Share of the documents, chosen by their hash, that goes to the prefix validation."""
    num_workers: int | None = None
    """Processes; all cores by default. Changes the time, never the result."""
    overwrite: bool = False
    """Replace another result in the destination."""


def main() -> None:
    """Check the flags, pack, say what came out."""
    flags = parse(PrepareFlags, None, __doc__)
    _check(flags)

    from lit_gpt.data.preparation import pack_texts
    from lit_gpt.data.preparation_plan import PackingPlan
    from lit_gpt.data.text_sources import DocumentRules, available_cores, find_sources
    from lit_gpt.tokenizer import Tokenizer

    plan = PackingPlan(
        sources=find_sources(flags.source_path, flags.percentage),
        rules=DocumentRules(flags.document, flags.text_field, tuple(flags.skip_subsets)),
        tokenizer=Tokenizer(flags.tokenizer_path),
        destination=Path(flags.destination_path),
        prefix=flags.prefix,
        chunk_size=flags.chunk_size,
        validation_fraction=flags.validation_fraction,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    display = _Display()
    try:
        outcome = pack_texts(plan, flags.num_workers or available_cores(), flags.overwrite, display.update, display.say)
    finally:
        display.close()
    _summary(plan, outcome)


def _stop(number: int, _: object) -> NoReturn:
    """Signal handler: leave at once; what is recorded is consistent at any moment."""
    raise Interrupted("interrupted: what is finished is kept; the same command goes on from there", number)


def _check(flags: PrepareFlags) -> None:
    """Everything that can be wrong with the flags alone, in one line."""
    problems = []
    if not flags.source_path:
        problems.append("--source_path is missing: files, folders or patterns of text")
    if not flags.destination_path:
        problems.append("--destination_path is missing: the folder for the packed files")
    if flags.document not in ("file", "line"):
        problems.append(f"--document {flags.document}: expected file or line")
    if flags.chunk_size < 2:
        problems.append(
            f"--chunk_size {flags.chunk_size}: expected at least the tokens of one training block, such as 2049"
        )
    if flags.chunk_size > _LARGEST_CHUNK:
        problems.append(f"--chunk_size {flags.chunk_size}: at most {_LARGEST_CHUNK}")
    if not 0 < flags.percentage <= 1:
        problems.append(
            f"--percentage {flags.percentage:g}: expected a share of the files in (0, 1], such as 0.5 for half"
        )
    if not 0 <= flags.validation_fraction < 1:
        problems.append(f"--validation_fraction {flags.validation_fraction:g}: expected a share in [0, 1)")
    if flags.validation_fraction and flags.prefix.startswith("validation"):
        problems.append("--validation_fraction and --prefix validation exclude each other")
    if not flags.prefix or "/" in flags.prefix or flags.prefix.startswith("."):
        problems.append(f"--prefix {flags.prefix!r}: expected the beginning of a file name")
    if flags.num_workers is not None and flags.num_workers < 1:
        problems.append(f"--num_workers {flags.num_workers}: expected at least 1")
    if problems:
        raise ValueError("; ".join(problems))


class _Display:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console()
        self._bar: Any = None
        self._task: Any = None
        self._start_s = self._line_s = time.monotonic()
        self._first: int | None = None

    def update(self, progress: PackingProgress) -> None:
        if not self._console.is_terminal:
            self._print_line(progress)
            return
        if self._bar is None:
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            counts = TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens")
            columns = (
                BarColumn(),
                DownloadColumn(),
                counts,
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=self._console)
            self._task = self._bar.add_task("", total=progress.bytes_total, documents=0, tokens=0)
            self._bar.start()
        self._bar.update(
            self._task, completed=progress.bytes_done, documents=progress.documents, tokens=progress.tokens
        )

    def _print_line(self, progress: PackingProgress) -> None:
        now_s = time.monotonic()
        if self._first is None:
            self._first = progress.bytes_done
        if now_s - self._line_s < _LINE_EVERY_S:
            return
        self._line_s = now_s
        rate = (progress.bytes_done - self._first) / (now_s - self._start_s)
        left = f", about {(progress.bytes_total - progress.bytes_done) / rate / 60:.0f} min left" if rate else ""
        share = progress.bytes_done / max(1, progress.bytes_total)
        print(f"{share:.1%}: {progress.documents:,} documents, {progress.tokens:,} tokens{left}", flush=True)

    def say(self, line: str) -> None:
        print(line, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _summary(plan: PackingPlan, outcome: PackingResult) -> None:
    for prefix, manifest in outcome.manifests.items():
        mib = manifest["text_bytes"] / 2**20
        print(
            f"{prefix}: {len(manifest['files'])} file(s), {manifest['documents']:,} documents ({mib:.1f} MiB of text), "
            f"{manifest['tokens']:,} tokens in {plan.destination}"
        )
    if outcome.was_finished:
        print("an earlier run had made exactly this: nothing to do (--overwrite makes it again)")
    else:
        print(f"train with: python pretrain/train_mdm.py --model 6 --flops 0.001 --data_dir {plan.destination}")


if __name__ == "__main__":
    run(main)
