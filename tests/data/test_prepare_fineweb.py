"""Data of the temporal evaluation: exact tokens, the same bytes after any interruption, one line for each mistake."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.data.crawl_files import CrawlFiles, load_datatrove
from lit_gpt.data.crawl_packing import CrawlPlan, pack_crawl
from lit_gpt.data.packed_dataset import open_validation
from lit_gpt.data.packed_format import read_header
from lit_gpt.tokenizer import DEFAULT_SOURCE
from scripts import prepare_fineweb
from tests.support.small_tokenizers import training_lines

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "prepare_fineweb.py"
DOCUMENTS = ["First line.\nSecond  line.", "", "déjà vu \u2028 日本", "x" * 50, "<s> is text", "last\r\n"] * 60
KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")

needs_datatrove = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("datatrove", "orjson")), reason="needs pip install 'smdm[eval]'"
)


@pytest.fixture
def prepare(tmp_path, tokenizer_folder):
    """Run the script on a source in the test's folder."""

    def start(source, *flags, check=True):
        done = subprocess.run(
            command(source, tmp_path, tokenizer_folder, *flags), capture_output=True, text=True, cwd=ROOT
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    return start


def command(source, folder, tokenizer, *flags):
    flags = [*flags] if "--crawl" in flags else [*flags, "--crawl", "crawl"]
    places = ["--source", str(source), "--destination", str(folder / "out"), "--tokenizer", str(tokenizer)]
    return [sys.executable, str(SCRIPT), *places, *flags]


def write(path, documents, text_field="text"):
    """The documents in a file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"url": [f"u{n}" for n in range(len(documents))], text_field: documents})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
        return path
    lines = "".join(json.dumps({text_field: document, "url": "u"}, ensure_ascii=False) + "\n" for document in documents)
    raw = lines.encode()
    if path.name.endswith(".gz"):
        raw = gzip.compress(raw)
    elif path.name.endswith(".zst"):
        import zstandard

        raw = zstandard.compress(raw)
    path.write_bytes(raw)
    return path


def expected(tokenizer, documents, tokens=None, limit=None):
    with_text = [document for document in documents if document][:limit]
    ids = [number for document in with_text for number in (tokenizer.bos_id, *tokenizer.encode_ids(document))]
    return ids[:tokens]


def found(folder, crawl="crawl"):
    """Real tokens, as the evaluation reads them."""
    series = open_validation(folder / "out" / crawl, 2048, 400)
    rows = [series[number] for number in range(len(series))]
    return np.concatenate([row.tokens[: row.length] for row in rows]).tolist()


def content(folder):
    """Hashes of everything that lies in a folder, the lock apart."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_defaults_are_the_published_ones():
    flags = prepare_fineweb.FinewebFlags()
    assert flags.tokens == 100 * 1024 * 2048 and flags.documents == 500_000
    assert flags.crawl == ["CC-MAIN-2024-10", "CC-MAIN-2024-18"]
    assert flags.tokenizer == DEFAULT_SOURCE
    assert flags.tokens % flags.chunk_size == 0


@needs_datatrove
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_exact(tmp_path, prepare, tokenizer, kind):
    source = write(tmp_path / f"text{kind}", DOCUMENTS)
    done = prepare(source, "--tokens", "5000", "--chunk_size", "2048")
    assert found(tmp_path) == expected(tokenizer, DOCUMENTS, 5000)
    folder = tmp_path / "out" / "crawl"
    assert [read_header(path).size for path in sorted(folder.glob("validation*.bin"))] == [2048] * 3
    manifest = json.loads((folder / "validation.manifest.json").read_text())
    assert [entry["tokens"] for entry in manifest["files"].values()] == [2048, 2048, 904]
    assert manifest["tokens"] == 5000 and manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert str(tmp_path) not in json.dumps(manifest)
    assert done.stdout.startswith("crawl: 5,000 tokens of ") and "warning" not in done.stderr
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".bin") == [
        "run.lock",
        "validation.manifest.json",
    ]


@needs_datatrove
def test_files_of_a_folder_are_read_in_order_and_documents_are_counted(tmp_path, prepare, tokenizer):
    for crawl in ("A", "B"):
        folder = tmp_path / "text" / crawl
        write(folder / "000.parquet", [f"{crawl} zero", "", None])
        write(folder / "001.jsonl.gz", [f"{crawl} one", f"{crawl} two"])
        write(folder / "sub" / "2.jsonl", [f"{crawl} three", f"{crawl} four"])
        (folder / "README.md").write_text("not text of the crawl")
    done = prepare(tmp_path / "text" / "{crawl}", "--crawl", "A", "B", "--documents", "4")
    for crawl in ("A", "B"):
        texts = [f"{crawl} {word}" for word in ("zero", "one", "two", "three")]
        assert found(tmp_path, crawl) == expected(tokenizer, texts)
        assert (
            f"warning: {crawl}: only {len(found(tmp_path, crawl))} of 209,715,200 tokens, because of --documents 4"
            in (done.stderr)
        )


@needs_datatrove
@pytest.mark.parametrize("tokens", [1, 2047, 2048, 2049, 4096])
def test_borders(tmp_path, prepare, tokenizer, tokens):
    prepare(write(tmp_path / "a.jsonl", DOCUMENTS), "--tokens", str(tokens), "--chunk_size", "2048")
    (folder,) = (tmp_path / "out").iterdir()
    chunks = [np.asarray(read_header(path).open()) for path in sorted(folder.glob("validation*.bin"))]
    ids = np.concatenate(chunks).tolist()
    assert len(ids) == -(-tokens // 2048) * 2048
    assert ids[:tokens] == expected(tokenizer, DOCUMENTS, tokens) and set(ids[tokens:]) <= {tokenizer.bos_id}


@needs_datatrove
def test_too_few_tokens_are_said_and_kept(tmp_path, prepare, tokenizer):
    source = write(tmp_path / "a.jsonl", DOCUMENTS[:6])
    count = len(expected(tokenizer, DOCUMENTS[:6]))
    for again in ("", "an earlier run had made exactly this"):
        done = prepare(source)
        assert f"warning: crawl: only {count} of 209,715,200 tokens, because of the source's end\n" in done.stderr
        assert again in done.stdout
    assert found(tmp_path) == expected(tokenizer, DOCUMENTS[:6])


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_source(tmp_path_factory):
    """A few files, about 150,000 tokens."""
    folder = tmp_path_factory.mktemp("large")
    lines = [line for line in training_lines(9000) if line]
    texts = ["\n".join(lines[start : start + 5]) for start in range(0, len(lines), 5)]
    for number, kind in enumerate(KINDS):
        share = len(texts) // len(KINDS)
        write(folder / f"{number}{kind}", texts[number * share : (number + 1) * share])
    return folder


LARGE = ("--tokens", "90000", "--chunk_size", "2048")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, large_source, tokenizer_folder):
    folder = tmp_path_factory.mktemp("unbroken")
    subprocess.run(command(large_source, folder, tokenizer_folder, *LARGE), check=True, cwd=ROOT)
    return content(folder / "out")


def stop_after(words, folder, files, number):
    """Start the script and send a signal when so many files are there."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(folder.rglob("*.bin"))) < files:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@needs_datatrove
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_again_and_again_ends_with_the_same_bytes(tmp_path, large_source, tokenizer_folder, unbroken, number):
    words = command(large_source, tmp_path, tokenizer_folder, *LARGE)
    for files in (1, 14, 27):
        code, err = stop_after(words, tmp_path, files, number)
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
        assert number == signal.SIGKILL or err.endswith("the same command goes on from there\n")
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "going on where an earlier run stopped" in done.stderr
    assert content(tmp_path / "out") == unbroken


@needs_datatrove
def test_every_interruption_of_a_small_run(tmp_path, tokenizer, monkeypatch):
    """Stop before and after each file, record and manifest in turn; what goes on from there ends with the same bytes."""
    source = write(tmp_path / "text" / "a.parquet", DOCUMENTS[:40]).parent
    write(source / "b.jsonl", DOCUMENTS[40:])

    def run_once(name):
        plan = CrawlPlan(str(source), tokens=5000, documents=500_000, text_field="text", chunk_size=2048)
        return pack_crawl(plan, tokenizer, tmp_path / name, prepare_fineweb._Display("crawl", plan.tokens))

    run_once("whole")
    whole, replace = content(tmp_path / "whole"), os.replace

    class Stop(BaseException):
        pass

    for stop in range(1, 20):
        count = 0

        def stopping(old, new, stop=stop):
            nonlocal count
            count += 1
            if count == stop and stop % 2:
                raise Stop
            replace(old, new)
            if count == stop:
                raise Stop

        monkeypatch.setattr(os, "replace", stopping)
        try:
            run_once(f"stop{stop}")
            stopped = False
        except Stop:
            stopped = True
        monkeypatch.setattr(os, "replace", replace)
        run_once(f"stop{stop}")
        assert content(tmp_path / f"stop{stop}") == whole
        if not stopped:
            break
    assert stop > 6


@needs_datatrove
def test_finished_is_not_done_again_and_other_settings_are_refused(tmp_path, prepare):
    source = write(tmp_path / "a.jsonl", DOCUMENTS)
    prepare(source, "--tokens", "3000")
    before = content(tmp_path / "out")
    path = tmp_path / "out" / "crawl" / "validation_0000000000.bin"
    stamp = path.stat().st_mtime_ns
    assert "an earlier run had made exactly this: nothing to do" in prepare(source, "--tokens", "3000").stdout
    assert path.stat().st_mtime_ns == stamp
    done = prepare(source, "--tokens", "2500", "--documents", "99", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "made with tokens 3000 instead of 2500, documents 500000 instead of 99: give another" in done.stderr
    write(source, DOCUMENTS[1:])
    assert "source_files" in prepare(source, "--tokens", "3000", check=False).stderr
    assert content(tmp_path / "out") == before
    write(source, DOCUMENTS)
    path.unlink()
    prepare(source, "--tokens", "3000")
    assert content(tmp_path / "out") == before


@needs_datatrove
def test_files_of_another_preparation_are_refused(tmp_path, prepare):
    foreign = tmp_path / "out" / "crawl" / "validation_0000000000.bin"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"precious")
    done = prepare(write(tmp_path / "a.jsonl", DOCUMENTS), check=False)
    assert done.returncode == 2 and f"error: {foreign}: of another preparation" in done.stderr
    assert foreign.read_bytes() == b"precious"


# --- one line for each mistake ----------------------------------------------------------------------------------------


@needs_datatrove
@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"Error when reading `a.jsonl`"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', "a.jsonl: has no field 'text', only body; give --text_field"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl: 'text' holds a int, expected text"),
        ("a.jsonl", b"[1]\n", "a.jsonl: cannot be read"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl"),
        ("a.jsonl", b'{"text": ""}\n', "hold no documents with text"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 900, mtime=0)[:-20], "a.jsonl.gz: cannot be read"),
        ("a.parquet", b"PAR1 no", "a.parquet: cannot be read"),
        ("a.txt", b"text", "expected one of .parquet, .jsonl"),
    ],
)
def test_malformed_sources(tmp_path, prepare, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    done = prepare(tmp_path / name, check=False)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ")
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "crawl" / "validation.manifest.json").exists()


@needs_datatrove
def test_parquet_without_the_field_and_the_remedy(tmp_path, prepare, tokenizer):
    source = write(tmp_path / "a.parquet", ["one", "two"], text_field="body")
    done = prepare(source, check=False)
    assert done.stderr == f"error: {source}: has no field 'text', only url, body; give --text_field\n"
    prepare(source, "--text_field", "body")
    assert found(tmp_path) == expected(tokenizer, ["one", "two"])


@needs_datatrove
def test_missing_and_empty_sources(tmp_path, prepare):
    done = prepare("nowhere", check=False)
    assert done.stderr.startswith("error: --source nowhere: no such file or folder: looked for /")
    (tmp_path / "empty").mkdir()
    assert "no .parquet, .jsonl, .jsonl.gz, .jsonl.zst file in it" in prepare(tmp_path / "empty", check=False).stderr


@needs_datatrove
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--tokens", "0", "--documents", "-1"],
            "--tokens 0: expected at least 1; --documents -1: expected at least 1",
        ),
        (["--chunk_size", "3000"], "--chunk_size 3000: expected a multiple of 2048"),
        (["--crawl", "A", "B"], "--source text would give each of the 2 crawls the same text"),
        (["--crawl", "../A"], "--crawl ../A: expected different names"),
    ],
)
def test_wrong_flags(prepare, flags, message):
    done = prepare("text", *flags, check=False)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_without_the_reading_library_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    monkeypatch.setitem(sys.modules, "datatrove.pipeline", None)
    with pytest.raises(ValueError, match=r"datatrove cannot be imported .*pip install 'smdm\[eval\]'"):
        load_datatrove()


def test_a_remote_listing_that_fails_is_one_line(monkeypatch):
    pytest.importorskip("datatrove")
    source = CrawlFiles("memory://nothing/here")
    with pytest.raises(ValueError, match="--source memory://nothing/here: "):
        source.names()


def test_progress_says_speed_and_time_left(capsys, monkeypatch):
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    display = prepare_fineweb._Display("crawl", 1000)
    display.update(10, 1)
    now_s += 10
    display.update(100, 5)
    line = "crawl: 10.0%, 5 documents, 100 tokens, 10 tokens/s, about 90 s left\n"
    assert capsys.readouterr().err == line
