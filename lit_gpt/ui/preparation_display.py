"""Running a preparation of training data before a person's eyes: progress, interruption, what came out."""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NoReturn

from lit_gpt.cli import Interrupted
from lit_gpt.data.preparation import PackingProgress, pack_texts
from lit_gpt.data.preparation_plan import PackingPlan
from lit_gpt.data.preparation_settings import PreparationFlags
from lit_gpt.data.sharded_preparation import ExecutorChoice, pack_shards
from lit_gpt.data.text_files import RemotePath, TextFile
from lit_gpt.data.text_sources import available_cores

# Seconds between two lines where there is no terminal to draw a bar on.
_LINE_EVERY_S = 30.0
# In the names of files that are beside the training text.
_OTHER_SPLITS = re.compile(r"(?<![a-z])(test|validation|valid|val|dev|eval|samples?)(?![a-z])")


def prepare(flags: PreparationFlags, plan: PackingPlan) -> list[dict[str, Any]]:
    """Pack a corpus, show how far it is, say what came out.

    Returns:
        The manifests of the destination; none where jobs have been submitted and are not through.

    Raises:
        ValueError: there is nothing to share out over a cluster; or as `pack_texts` and `pack_shards`, as is OSError.
        Interrupted: Ctrl-C or SIGTERM.
    """
    if flags.shards == 1 and flags.executor != "local":
        raise ValueError(
            f"--executor {flags.executor}: {plan.sources[0].path} is the only source file, so there is one shard: leave the "
            "flag out, or split the file"
        )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    if isinstance(plan.sources[0].path, RemotePath):
        _say_sources(plan.sources)
    display = _Display()
    workers = flags.num_workers or (available_cores() if flags.executor == "local" else -1)
    if flags.shards == 1:
        try:
            outcome = pack_texts(plan, workers, flags.overwrite, display.update, display.say)
        finally:
            display.close()
        _summary(plan, outcome.manifests.items(), outcome.was_finished)
        return list(outcome.manifests.values())
    choice = ExecutorChoice(flags.executor, workers, flags.slurm_partition, flags.slurm_time, flags.slurm_args)
    made = pack_shards(plan, flags.shards, choice, flags.overwrite, display.shards)
    if made.unfinished:
        print(
            f"{flags.shards - len(made.unfinished)} of {flags.shards} shards are finished; the others are tasks of the "
            "cluster now: the same command says how far they are"
        )
        return []
    totals = [
        (prefix, _total([one for one in made.manifests if next(iter(one["files"]), prefix).startswith(prefix)]))
        for prefix in plan.prefixes
    ]
    _summary(plan, totals, made.was_finished)
    return made.manifests


def _say_sources(sources: list[TextFile]) -> None:
    """Which files of an address are read: a whole data set of the hub may hold splits and samples of its own."""
    folders = Counter(source.name.rpartition("/")[0].partition("/")[0] for source in sources)
    places = ", ".join(
        f"{count} in {folder}/" if folder else f"{count} at its top" for folder, count in folders.items()
    )
    print(f"reading {len(sources)} files: {places}")
    others = [source.name for source in sources if _OTHER_SPLITS.search(source.name.lower())]
    if 0 < len(others) < len(sources):
        print(
            f"{len(others)} of the {len(sources)} files are by their names no training text of their own but tests or "
            f"samples, such as {others[0]}: give the folder or files that are meant, if these are not"
        )


def _stop(number: int, _: object) -> NoReturn:
    """Signal handler: leave at once; what is recorded is consistent at any moment."""
    raise Interrupted("interrupted: what is finished is kept; the same command goes on from there", number)


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

    def shards(self, finished: int, count: int, files: int) -> None:
        """Shards that are finished of those that were to be made, and packed files."""
        now_s = time.monotonic()
        if now_s - self._line_s >= _LINE_EVERY_S:
            self._line_s = now_s
            print(f"{finished} of {count} shards finished, {files:,} packed files", flush=True)

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


def _total(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums over shards, in a manifest's form."""
    sums = {name: sum(one[name] for one in manifests) for name in ("tokens", "documents", "text_bytes")}
    sums["dropped_tokens"] = sum(one.get("dropped_tokens", 0) for one in manifests)
    return {**sums, "files": {name: entry for one in manifests for name, entry in one["files"].items()}}


def _summary(plan: PackingPlan, manifests: Iterable[tuple[str, dict[str, Any]]], was_finished: bool) -> None:
    for prefix, manifest in manifests:
        mib, dropped = manifest["text_bytes"] / 2**20, manifest.get("dropped_tokens", 0)
        print(
            f"{prefix}: {len(manifest['files'])} file(s), {manifest['documents']:,} documents ({mib:.1f} MiB of text), "
            f"{manifest['tokens']:,} tokens in {plan.destination}"
            + (f"; {dropped:,} tokens dropped (--drop_last)" if dropped else "")
        )
    if was_finished:
        print("an earlier run had made exactly this: nothing to do (--overwrite makes it again)")
