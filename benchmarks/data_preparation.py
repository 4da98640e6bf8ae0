"""Speed of the preparation of training data on one core, and its memory by the size of the corpus.

    python benchmarks/data_preparation.py                     5 GB beside a 20th of it: about 45 min, 9 GB of disk
    python benchmarks/data_preparation.py --gb 0.2 --page ""  a look

Generates .jsonl files of documents of about 3 kB (words of the bundled Shakespeare in a random order), packs them by
scripts/prepare_text.py with one process and LLaMA's tokenizer, and reads the process's own time and its peak of memory.
Writes docs/results/data_preparation.md.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run

ROOT = Path(__file__).resolve().parents[1]
_FILE_BYTES = 250 * 10**6
_WORDS_OF_A_DOCUMENT = 550


@dataclass
class Flags:
    """What is measured."""

    gb: float = 5.0
    """Size of the large corpus in units of 1e9 bytes; the small one has a 20th."""
    tokenizer_path: str = str(ROOT / "data" / "tokenizer")
    """Folder of the tokenizer."""
    work_dir: str | None = None
    """Where corpus and result lie meanwhile; a temporary folder by default."""
    page: str = str(ROOT / "docs" / "results" / "data_preparation.md")
    """The results' page; '' writes none."""


def main() -> None:
    """Generate, pack, write the page."""
    flags = parse(Flags, None, __doc__)
    rows = []
    for size in (flags.gb / 20, flags.gb):
        with tempfile.TemporaryDirectory(dir=flags.work_dir) as folder:
            corpus = Path(folder) / "corpus"
            text_bytes = generate(corpus, int(size * 1e9))
            wall_s, cpu_s, peak_mb = pack(corpus, Path(folder) / "packed", flags.tokenizer_path)
        rows.append((size, text_bytes / 1e6 / wall_s, text_bytes / 1e6 / cpu_s, peak_mb, wall_s))
        print(
            f"{size:g} GB: {rows[-1][1]:.2f} MB/s, {rows[-1][2]:.2f} MB/s of processor time, peak {peak_mb:.0f} MB",
            flush=True,
        )
    if flags.page:
        Path(flags.page).write_text(page(rows), encoding="utf-8")


def generate(folder: Path, size: int) -> int:
    """Write .jsonl files of about so many bytes; returns the bytes of their texts."""
    folder.mkdir()
    words = (ROOT / "data" / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8").split(" ")
    draw, text_bytes, number = random.Random(5), 0, 0
    while size > 0:
        room = min(size, _FILE_BYTES)
        with (folder / f"part_{number:05d}.jsonl").open("w", encoding="utf-8") as file:
            while room > 0:
                text = " ".join(draw.choices(words, k=_WORDS_OF_A_DOCUMENT))
                written = file.write(json.dumps({"text": text}) + "\n")
                room, size, text_bytes = room - written, size - written, text_bytes + len(text)
        number += 1
    return text_bytes


def pack(corpus: Path, destination: Path, tokenizer: str) -> tuple[float, float, float]:
    """Pack with one process: (seconds, its processor time, peak of its memory in 1e6 bytes)."""
    command = [
        sys.executable,
        str(ROOT / "scripts" / "prepare_text.py"),
        "--source_path",
        str(corpus),
        "--num_workers",
        "1",
    ]
    # A prefix of validation: no training command is looked for at the end.
    command += ["--destination_path", str(destination), "--tokenizer_path", tokenizer, "--prefix", "validation"]
    start_s = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise ValueError("the preparation failed")
    return time.perf_counter() - start_s, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6


def page(rows: list[tuple[float, float, float, float, float]]) -> str:
    """The results as Markdown."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    lines = [
        "# Preparing training data: speed of a core, and memory by size",
        "",
        f"`python benchmarks/data_preparation.py`, commit {commit}, {time.strftime('%Y-%m-%d')}, 2 cores of a Xeon with "
        f"AVX-512 bf16 and AMX, 24 GB, {sum(row[4] for row in rows) / 60:.0f} min. One process packs generated .jsonl files, "
        "documents of about 3 kB, with LLaMA's 32,000 pieces.",
        "",
        "| corpus in GB | MB of text a second | MB of text a second of processor time | peak of memory in MB |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {size:g} | {speed:.2f} | {own:.2f} | {peak:.0f} |" for size, speed, own, peak, _ in rows]
    return (
        "\n".join(
            [
                *lines,
                "",
                "Memory holds a batch of 1 MiB, a packed file's tokens and the tokenizer, whatever the corpus.",
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    run(main)
