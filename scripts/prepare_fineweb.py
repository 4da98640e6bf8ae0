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

import re
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import Interrupted, parse, run, warn

# Tokens that the evaluation scores at once; files hold whole rows.
_ROW = 2048
# A crawl's name is a folder's too.
_NAME = re.compile(r"\w[\w.-]*")
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


def main() -> None:
    """Check the flags, pack crawl by crawl, say what came out."""
    flags = parse(FinewebFlags, None, __doc__)
    _check(flags)

    from lit_gpt.data.crawl_files import load_datatrove
    from lit_gpt.data.crawl_packing import CrawlPlan, pack_crawl
    from lit_gpt.tokenizer import Tokenizer

    load_datatrove()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    tokenizer = Tokenizer(flags.tokenizer)
    for crawl in flags.crawl:
        folder = Path(flags.destination) / crawl
        source = flags.source.replace("{crawl}", crawl)
        plan = CrawlPlan(source, flags.tokens, flags.documents, flags.text_field, flags.chunk_size)
        manifest, was_finished = pack_crawl(plan, tokenizer, folder, _Display(crawl, flags.tokens))
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


class _Display:
    """A line on stderr every few seconds: share, documents, speed, time left; on a terminal always the same one."""

    def __init__(self, crawl: str, total: int) -> None:
        self._crawl, self._total = crawl, total
        self.begin(0)
        self._erase, self._end = ("\r\x1b[K", "") if sys.stderr.isatty() else ("", "\n")

    def begin(self, tokens: int) -> None:
        """Packing begins at so many tokens."""
        self._first = tokens
        self._start_s = self._line_s = time.monotonic()

    def update(self, tokens: int, documents: int) -> None:
        """A line, if the last one is long enough ago."""
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
        """A line."""
        print(f"{self._erase}{self._crawl}: {line}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
