"""Text files that users bring and that are none: pipes, lines without an end, bytes that are no text."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from lit_gpt.data import text_sources
from lit_gpt.data.packed_format import read_header
from lit_gpt.data.pickled_tokens import read_token_list
from lit_gpt.data.sft_dataset import ExamplePreparation, prepare_examples
from lit_gpt.data.sft_formats import REVERSE, json_items, text_lines
from lit_gpt.data.text_files import find_sources
from lit_gpt.data.text_sources import DocumentRules, ReadPosition, read_raw_records
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.ui.info import path_info
from tests.support.small_tokenizers import train_small_tokenizer

ROOT = Path(__file__).resolve().parents[2]
READ_ALL = """
import resource, sys
from lit_gpt.data.text_files import *
from lit_gpt.data.text_sources import *
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for batch in read_raw_records(find_sources([sys.argv[1]]), DocumentRules(), ReadPosition()):
        for text in batch.texts(DocumentRules()):
            pass
except ValueError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_gigabyte_in_a_small_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.zst"
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        writer.write(b'{"text": "short"}\n{"text": "')
        for _ in range(1 << 10):
            writer.write(b"a" * (1 << 20))
        writer.write(b'"}\n')
    assert path.stat().st_size < 1 << 18
    command = [sys.executable, "-c", READ_ALL, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    error, megabytes = done.stdout.splitlines()
    assert error == f"{path}: line 2: longer than 67,108,864 bytes; split it"
    assert int(megabytes) < 400, done.stdout


@pytest.mark.parametrize("lengths", [[10] * 5, [1 << 20, 5], [(1 << 20) - 1, 1, 7], [3 << 20, 5, 2 << 20], [0, 0, 1]])
def test_batches_end_where_they_did(lengths: list[int]) -> None:
    """A resumed preparation goes on behind a batch: the lines of a batch are those of `readlines`."""
    content = b"".join(b"x" * length + b"\n" for length in lengths) + b"end"
    mine, pythons = (io.BufferedReader(io.BytesIO(content)) for _ in range(2))  # type: ignore[arg-type]
    while expected := pythons.readlines(1 << 20):
        assert text_sources._some_lines(mine, Path("x"), 1) == expected
    assert text_sources._some_lines(mine, Path("x"), 1) == []


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    pipes = {}
    for name in ("a.jsonl", "b.txt", "c.bin", "d.pkl", "e.json", "f"):
        pipes[name] = tmp_path / name
        os.mkfifo(pipes[name])
    calls = [
        lambda: find_sources([str(pipes["a.jsonl"])]),
        lambda: list(text_lines(pipes["b.txt"])),
        lambda: read_header(pipes["c.bin"]),
        lambda: read_token_list(pipes["d.pkl"]),
        lambda: list(json_items(pipes["e.json"])),
        lambda: path_info(pipes["f"]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="no regular file but a pipe"):
            call()
    with pytest.raises(ValueError, match="no .txt, .jsonl"):
        find_sources([str(tmp_path)])
    with pytest.raises((ValueError, FileNotFoundError)):
        list(read_raw_records(find_sources([str(tmp_path / "*.txt")]), DocumentRules(), ReadPosition()))


def test_an_invalid_tail_of_fine_tuning_data_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n' * 3 + b'{"prompt": "a", "completion": "\xe2\x82')
    tokenizer = Tokenizer(train_small_tokenizer(tmp_path / "tokenizer"))
    plan = ExamplePreparation(
        data_format=REVERSE, path=path, tokenizer=tokenizer, max_length=64, max_malformed=0.5, workers=1,
        cache=tmp_path / "cache",
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"train.jsonl: line 4: not UTF-8 \(byte 0xe2: .*\); convert the file"
    ) as raised:
        prepare_examples(plan)
    assert "\n" not in str(raised.value)
