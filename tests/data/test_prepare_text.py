"""Preparation: the same bytes for any number of cores and after any interruption; every kind of file; every refusal."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.cli import parse
from lit_gpt.data import packed_dataset
from lit_gpt.data.packed_format import PackedDatasetBuilder
from lit_gpt.data.preparation import pack_batch, pack_texts
from lit_gpt.data.preparation_plan import PackingPlan
from lit_gpt.data.text_files import find_sources
from lit_gpt.data.text_sources import DocumentRules, ReadPosition, read_raw_records
from lit_gpt.tokenizer import Tokenizer
from tests.support.small_tokenizers import CORPUS, train_small_tokenizer, training_lines

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "prepare_text.py"
DOCUMENTS = ["First line.\nSecond  line.", "", "déjà vu \u2028 日本", "x" * 50, "last"]
CHUNK = 60


@pytest.fixture
def plan_of(tmp_path, tokenizer):
    """A plan for sources in the test's folder."""

    def make(*sources, destination="out", **options):
        rules = {name: options.pop(name) for name in ("document", "text_field", "skip_subsets") if name in options}
        options = {"tokenizer": tokenizer, "chunk_size": CHUNK, **options}
        found = find_sources([str(source) for source in sources], options.pop("percentage", 1.0))
        return PackingPlan(found, DocumentRules(**rules), destination=tmp_path / destination, **options)

    return make


def run_plan(plan, workers=1, overwrite=False):
    return pack_texts(plan, workers, overwrite, report=lambda progress: None, notify=lambda line: None)


def write_jsonl(path, documents, **more):
    records = [{"text": document, **more} for document in documents]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_any(folder, suffix, documents):
    """The documents in a file of that kind."""
    path = folder / f"text{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"id": list(range(len(documents))), "text": documents})
        pyarrow.parquet.write_table(table, path, row_group_size=2)
        return path
    write_jsonl(path, documents)
    if suffix.endswith(".gz"):
        raw = path.read_bytes()
        path.write_bytes(b"".join(gzip.compress(part) for part in (raw[:40], raw[40:])))
    if suffix.endswith(".zst"):
        import zstandard

        raw = path.read_bytes()
        # Two frames, as tools that append write them.
        path.write_bytes(b"".join(zstandard.compress(part) for part in (raw[:40], raw[40:])))
    return path


def packed_tokens(folder, prefix="train_slim"):
    manifest = json.loads((folder / f"{prefix}.manifest.json").read_text())
    parts = [
        np.frombuffer((folder / name).read_bytes()[24:], dtype="<u2")[: entry["tokens"]]
        for name, entry in manifest["files"].items()
    ]
    return np.concatenate(parts).tolist()


def content(folder):
    """Hashes of everything that lies in a folder, the lock apart."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def expected_tokens(tokenizer, documents):
    return [number for document in documents for number in (*tokenizer.encode_ids(document), tokenizer.eos_id)]


# --- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".parquet"])
def test_kinds_of_files_give_the_same_tokens(tmp_path, plan_of, tokenizer, suffix):
    plan = plan_of(write_any(tmp_path, suffix, DOCUMENTS))
    outcome = run_plan(plan)
    assert packed_tokens(plan.destination) == expected_tokens(tokenizer, DOCUMENTS)
    manifest = outcome.manifests["train_slim"]
    assert (manifest["documents"], manifest["separator"], manifest["vocab_size"]) == (5, 1, 400)
    assert manifest["text_bytes"] == sum(len(document.encode()) for document in DOCUMENTS)
    chain = b""
    for document in DOCUMENTS:
        chain = hashlib.sha256(chain + hashlib.sha256(document.encode()).digest()).digest()
    assert manifest["source_hash"] == chain.hex()


def test_same_files_as_the_builder_writes(tmp_path, plan_of, tokenizer):
    plan = plan_of(write_jsonl(tmp_path / "text.jsonl", DOCUMENTS))
    run_plan(plan)
    builder = PackedDatasetBuilder(tmp_path / "by_hand", "train_slim", CHUNK, tokenizer.bos_id, vocab_size=400)
    for document in DOCUMENTS:
        builder.add_array(tokenizer.encode(document).numpy())
    builder.write_reminder()
    by_hand = content(tmp_path / "by_hand")
    assert len(by_hand) > 1 and by_hand.items() <= content(plan.destination).items()


def test_text_files_as_one_document_or_line_by_line(tmp_path, plan_of, tokenizer):
    text = "one\n\n  two\u2028still two\r\nthree"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    run_plan(plan_of(tmp_path / "a.txt", destination="file"))
    assert packed_tokens(tmp_path / "file") == expected_tokens(tokenizer, [text])
    run_plan(plan_of(tmp_path / "a.txt", destination="line", document="line"))
    assert packed_tokens(tmp_path / "line") == expected_tokens(tokenizer, ["one", "  two\u2028still two", "three"])


def test_sources_in_order_each_once(tmp_path):
    for name in ("b.txt", "a.jsonl", "sub/c.parquet", ".hidden/d.txt", "sub/readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [source.name for source in find_sources([str(tmp_path / "b.*"), str(tmp_path), str(tmp_path / "b.txt")])]
    assert names == ["b.txt", "a.jsonl", "sub/c.parquet"]
    assert [source.name for source in find_sources([str(tmp_path)], 0.67)] == ["a.jsonl", "b.txt"]


def test_files_of_any_name_count_as_text_where_they_are_meant(tmp_path, plan_of, tokenizer):
    """One that is named does; of a folder those of a known suffix, and those whose names match a pattern."""
    for name, text in {
        "src/a.py": "a = 1\n",
        "src/sub/b.py": "b = 2\n",
        "src/LICENSE": "free\n",
        "src/c.txt": "c\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    names = [source.name for source in find_sources([str(tmp_path / "src")], as_text=["*.py"])]
    assert names == ["a.py", "c.txt", "sub/b.py"]
    assert [source.name for source in find_sources([str(tmp_path / "src")])] == ["c.txt"]
    assert [source.name for source in find_sources([str(tmp_path / "src" / "*.py")])] == ["a.py"]
    run_plan(plan_of(tmp_path / "src" / "LICENSE", tmp_path / "src" / "a.py"))
    assert packed_tokens(tmp_path / "out") == expected_tokens(tokenizer, ["free\n", "a = 1\n"])
    (tmp_path / "src" / "c.txt").unlink()
    with pytest.raises(ValueError, match=r"of its 3 other file\(s\) --as_text '\*' takes those like LICENSE"):
        find_sources([str(tmp_path / "src")])


def test_a_pattern_takes_what_it_names_and_no_more(tmp_path):
    """`*` follows the suffixes; a suffix that is written out is meant."""
    for name in ("a.txt", "dataset_infos.json", "table.csv"):
        (tmp_path / name).write_text("{}")

    def names(pattern, **options):
        return [source.name for source in find_sources([str(tmp_path / pattern)], **options)]

    assert names("*") == names("[a-d]*.*") == ["a.txt"]
    assert names("*", as_text=["*.csv"]) == ["a.txt", "table.csv"]
    assert names("d*.json") == ["dataset_infos.json"]
    with pytest.raises(ValueError, match=r"of its 1 other file\(s\) --as_text '\*\.csv' takes those like table\.csv"):
        names("t*")


def test_changed_text_behind_an_address_is_another_result(tmp_path, plan_of):
    """The store of a local address knows no hash, but when a file was changed."""
    source = tmp_path / "text.txt"
    source.write_text("one")
    run_plan(plan_of(f"file://{source}"))
    assert run_plan(plan_of(f"file://{source}")).was_finished
    source.write_text("two")
    os.utime(source, (1e9, 1e9))
    with pytest.raises(ValueError, match="source_identity"):
        run_plan(plan_of(f"file://{source}"))


def test_what_a_whole_data_set_takes_is_said(tmp_path, tokenizer_folder):
    """Tests and samples that lie beside the training text are named before they are packed."""
    for name in ("data/train-0.txt", "data/test-0.txt", "sample/train-0.txt"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text("text " * 50)
    command = prepare_command(f"file://{tmp_path / 'set'}", tmp_path / "out", tokenizer_folder, "--suggest", "false")
    done = subprocess.run([*command[:-4], *command[-2:]], cwd=ROOT, capture_output=True, text=True)
    assert "3 files: 2 in data/, 1 in sample/" in done.stdout.splitlines()[0]
    assert "2 of the 3 files are by their names no training text" in done.stdout
    assert "data/test-0.txt" in done.stdout


def test_addresses_are_read_in_place(tmp_path, plan_of, tokenizer):
    """fsspec's own address of a local folder stands for the hub's."""
    write_any(tmp_path, ".jsonl.gz", DOCUMENTS)
    write_any(tmp_path, ".parquet", DOCUMENTS)
    source = f"file://{tmp_path}"
    plan = plan_of(source)
    assert [one.name for one in plan.sources] == ["text.jsonl.gz", "text.parquet"]
    run_plan(plan)
    assert packed_tokens(plan.destination) == expected_tokens(tokenizer, DOCUMENTS * 2)
    with pytest.raises(
        FileNotFoundError, match="no such file or folder.*nor could the hub give a data set of that name"
    ):
        find_sources(["nobody/nothing"])


def test_subset_that_tinyllama_leaves_out(tmp_path, plan_of, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", ["code"], meta={"redpajama_set_name": "RedPajamaGithub"})
    write_jsonl(tmp_path / "b.jsonl", ["prose"], meta={"redpajama_set_name": "RedPajamaBook"})
    run_plan(plan_of(tmp_path, skip_subsets=("RedPajamaGithub",)))
    assert packed_tokens(tmp_path / "out") == expected_tokens(tokenizer, ["prose"])


def test_validation_share_by_document_hash(tmp_path, plan_of, tokenizer):
    documents = [f"document {i}" for i in range(400)]
    run_plan(plan_of(write_jsonl(tmp_path / "a.jsonl", documents), validation_fraction=0.25))
    train, validation = (packed_tokens(tmp_path / "out", prefix) for prefix in ("train_slim", "validation"))
    held_out = [d for d in documents if int.from_bytes(hashlib.sha256(d.encode()).digest()[:8], "big") < 2**62]
    assert 60 < len(held_out) < 140
    assert validation == expected_tokens(tokenizer, held_out)
    assert train == expected_tokens(tokenizer, [d for d in documents if d not in held_out])


def test_training_finds_data_padding_and_tokenizer(tmp_path, plan_of, tokenizer):
    plan = plan_of(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS))
    run_plan(plan)
    mixture = packed_dataset.open_mixture(plan.destination, {"train_slim": 1.0}, 12, 400, seed=0)
    assert mixture.sets[0].files.real_tokens.sum() == len(expected_tokens(tokenizer, DOCUMENTS))
    record = packed_dataset.recorded_tokenizer(plan.destination, ["train_slim"])
    assert (record["fingerprint"], record["vocab_size"]) == (tokenizer.fingerprint, 400)
    assert Tokenizer(record["source"]).fingerprint == tokenizer.fingerprint


def test_positions_go_on_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_gpt.data.text_sources._BATCH_BYTES", 64)
    monkeypatch.setattr("lit_gpt.data.text_sources._PARQUET_ROWS", 2)
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"):
        write_any(tmp_path, suffix, [f"{suffix} {i}" for i in range(9)])
    (tmp_path / "plain.txt").write_text("whole")
    sources, rules = find_sources([str(tmp_path)]), DocumentRules()
    batches = list(read_raw_records(sources, rules, ReadPosition()))
    assert len(batches) > 10
    for index, batch in enumerate(batches):
        rest = [text for later in read_raw_records(sources, rules, batch.end) for text in later.texts(rules)]
        assert rest == [text for later in batches[index + 1 :] for text in later.texts(rules)]
    for source in sources:
        read = sum(batch.bytes_read for batch in batches if batch.path == source.path)
        assert read == source.path.stat().st_size


# --- cores and interruptions ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_source(tmp_path_factory):
    """Enough text for several processes: above the size from which a pool is started."""
    text = CORPUS.read_text(encoding="utf-8")
    paragraphs = [p for p in text.split("\n\n") if p]
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    return write_jsonl(path, paragraphs * 4)


def prepare_command(source, destination, tokenizer_folder, *more):
    flags = ["--source_path", source, "--destination_path", destination, "--tokenizer_path", tokenizer_folder]
    return [
        sys.executable,
        str(SCRIPT),
        *map(str, flags),
        "--chunk_size",
        "40000",
        "--validation_fraction",
        "0.1",
        *more,
    ]


@pytest.fixture(scope="module")
def unbroken(large_source, tokenizer_folder, tmp_path_factory):
    """Hashes of what one process makes without an interruption."""
    destination = tmp_path_factory.mktemp("unbroken")
    command = prepare_command(large_source, destination, tokenizer_folder, "--num_workers", "1")
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == "" and "train with: python pretrain/train_mdm.py" in done.stdout
    return content(destination)


def kill_after(command, destination, files, signal_number):
    """Start the script and send a signal when so many files are there; returns code, output, and the process id."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(destination.glob("train_slim_*.bin"))) < files:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal_number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err, process.pid


def children_of_dead(pid):
    """Worker processes whose parent was `pid`, found by their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if b"spawn_main" in command and f"parent_pid={pid}".encode() in command:
            found.append(int(entry.name))
    return found


def test_two_processes_killed_again_and_again_end_with_the_bytes_of_one(
    large_source, tokenizer_folder, unbroken, tmp_path
):
    command = prepare_command(large_source, tmp_path, tokenizer_folder, "--num_workers", "2")
    for files in (2, 9):
        code, _, _, pid = kill_after(command, tmp_path, files, signal.SIGKILL)
        assert code == -signal.SIGKILL
        assert not (tmp_path / "train_slim.manifest.json").exists()
    deadline = time.monotonic() + 20
    while children_of_dead(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children_of_dead(pid), "workers outlive their parent"
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "going on where an earlier run stopped" in done.stdout
    assert content(tmp_path) == unbroken


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_in_one_line(large_source, tokenizer_folder, unbroken, tmp_path, signal_number):
    command = prepare_command(large_source, tmp_path, tokenizer_folder, "--num_workers", "2")
    code, _, err, _ = kill_after(command, tmp_path, 3, signal_number)
    assert code == 128 + signal_number
    assert err == "interrupted: what is finished is kept; the same command goes on from there\n"
    subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    assert content(tmp_path) == unbroken


def test_every_interruption_of_a_small_run(tmp_path, plan_of, monkeypatch):
    """Stop after each batch in turn; what goes on from there ends with the same bytes."""
    monkeypatch.setattr("lit_gpt.data.text_sources._BATCH_BYTES", 64)
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i} " * (i % 5) for i in range(30)])
    run_plan(plan_of(source, destination="whole", validation_fraction=0.2))
    whole = content(tmp_path / "whole")

    class Stop(Exception):
        pass

    batches = len(list(read_raw_records(find_sources([str(source)]), DocumentRules(), ReadPosition())))
    for stop in range(1, batches + 1):
        plan, calls = plan_of(source, destination=f"stop{stop}", validation_fraction=0.2), []

        def report(progress, calls=calls, stop=stop):
            calls.append(progress)
            if len(calls) == stop:
                raise Stop

        with pytest.raises(Stop):
            pack_texts(plan, 1, False, report, lambda line: None)
        assert not run_plan(plan).was_finished
        assert content(plan.destination) == whole


# --- what lies in the destination ----------------------------------------------------------------------------------


def test_finished_result_returns_at_once_and_another_is_refused(tmp_path, plan_of):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    run_plan(plan_of(source))
    before = content(tmp_path / "out")
    assert run_plan(plan_of(source)).was_finished
    with pytest.raises(ValueError, match=r"another result, with chunk_size 60 instead of 30: --overwrite replaces it"):
        run_plan(plan_of(source, chunk_size=30))
    assert content(tmp_path / "out") == before
    run_plan(plan_of(source, chunk_size=30), overwrite=True)
    run_plan(plan_of(source, destination="fresh", chunk_size=30))
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_changed_source_is_another_result(tmp_path, plan_of):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    run_plan(plan_of(source))
    source.write_text(source.read_text().replace("First", "Fifth"))
    with pytest.raises(ValueError, match="source_identity"):
        run_plan(plan_of(source))


def test_missing_file_of_a_finished_result_is_made_again(tmp_path, plan_of):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    run_plan(plan_of(source))
    before = content(tmp_path / "out")
    (tmp_path / "out" / "train_slim_0000000001.bin").unlink()
    assert not run_plan(plan_of(source)).was_finished
    assert content(tmp_path / "out") == before


def test_files_of_another_preparation_are_refused(tmp_path, plan_of):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    plan = plan_of(source)
    builder = PackedDatasetBuilder(plan.destination, "train_slim", 4, 1, vocab_size=400)
    builder.add_array(np.asarray([5, 6]))
    builder.write_reminder()
    with pytest.raises(ValueError, match=r"train_slim_0000000000\.bin: of another preparation: --overwrite"):
        run_plan(plan)
    foreign = Path(builder.filenames[0]).rename(plan.destination / "train_slim_7_0000000000.bin")
    with pytest.raises(ValueError, match="training would read this file as part of train_slim"):
        run_plan(plan, overwrite=True)
    assert foreign.exists()


def test_another_tokenizer_in_the_destination_is_refused(tmp_path, plan_of):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    run_plan(plan_of(source))
    other = Tokenizer(train_small_tokenizer(tmp_path / "other", vocab_size=410))
    with pytest.raises(ValueError, match=r"another tokenizer, which train_slim\.manifest\.json needs"):
        run_plan(plan_of(source, prefix="train_star", tokenizer=other), overwrite=True)
    run_plan(plan_of(source, tokenizer=other), overwrite=True)
    assert Tokenizer(tmp_path / "out" / "tokenizer").fingerprint == other.fingerprint


def test_two_sets_share_a_folder(tmp_path, plan_of, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    for prefix in ("train_slim", "train_star", "validation"):
        run_plan(plan_of(source, prefix=prefix))
        assert packed_tokens(tmp_path / "out", prefix) == expected_tokens(tokenizer, DOCUMENTS)


def test_training_refuses_a_file_that_its_manifest_contradicts(tmp_path, plan_of):
    """A valid packed file of another size or type under a name of the manifest."""
    plan = plan_of(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS))
    run_plan(plan)
    for vocab_size, size in ((400, CHUNK - 20), (400, CHUNK + 20), (100_000, CHUNK)):
        other = PackedDatasetBuilder(tmp_path / "other", "train_slim", size, 1, vocab_size=vocab_size)
        other.add_array(np.full(size, 7))
        other.write_reminder()
        (plan.destination / "train_slim_0000000000.bin").write_bytes(Path(other.filenames[0]).read_bytes())
        with pytest.raises(
            ValueError, match=r"train_slim_0000000000\.bin: \d+ tokens of u?int\d+, but its manifest says 60"
        ):
            packed_dataset.open_mixture(plan.destination, {"train_slim": 1.0}, 5, vocab_size, seed=0)


# --- one line for each mistake ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "raw", "rules", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', {}, r"a\.jsonl: line 3: not valid JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "x", "id": 3}\n',
            {},
            r"a\.jsonl: line 2: .* field 'text', found fields 'body', 'id'",
        ),
        ("a.jsonl", b"[1]\n", {}, r"a\.jsonl: line 1: expected an object .* found a list"),
        ("a.jsonl", b'{"text": 5}\n', {}, r"a\.jsonl: line 1: expected an object with text"),
        ("a.txt", b"fine\nfine\nbad \xff\n", {}, r"a\.txt: line 3: not UTF-8 \(byte 0xff"),
        ("a.txt", b"fine\nfine\nbad \xff\n", {"document": "line"}, r"a\.txt: line 3: not UTF-8"),
        ("a.jsonl.zst", b"not zstd", {}, r"a\.jsonl\.zst: cannot be read \(damaged zstd data"),
        ("a.parquet", b"PAR1 no", {}, r"a\.parquet: not a readable parquet file"),
        ("a.jsonl", b"\n\n", {}, "hold no documents"),
    ],
)
def test_malformed_sources(tmp_path, plan_of, name, raw, rules, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message) as caught:
        run_plan(plan_of(tmp_path / name, **rules))
    assert name == "a.jsonl" and raw == b"\n\n" or str(tmp_path) in str(caught.value)
    assert not (tmp_path / "out" / "train_slim.manifest.json").exists()


@pytest.mark.parametrize("cut", [1, 30])
def test_truncated_zstd_file_is_not_taken_for_a_shorter_one(tmp_path, plan_of, cut):
    path = write_any(tmp_path, ".jsonl.zst", DOCUMENTS)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(
        ValueError, match=r"text\.jsonl\.zst: cannot be read \(truncated zstd data: it ends at byte \d+"
    ):
        run_plan(plan_of(path))


@pytest.mark.parametrize(("suffix", "cut"), [(".jsonl.gz", 1), (".jsonl.gz", 30), (".parquet", 1), (".parquet", 200)])
def test_other_truncated_files_are_no_shorter_corpora(tmp_path, plan_of, suffix, cut):
    path = write_any(tmp_path, suffix, DOCUMENTS)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(
        ValueError, match=r"text\.(jsonl\.gz: cannot be read|parquet: not a readable parquet file).*again"
    ):
        run_plan(plan_of(path))


def test_parquet_without_the_column(tmp_path, plan_of):
    with pytest.raises(ValueError, match=r"has no column 'content', only id, text; give --text_field"):
        run_plan(plan_of(write_any(tmp_path, ".parquet", DOCUMENTS), text_field="content"))


def test_validation_share_of_a_single_document(tmp_path, plan_of):
    (tmp_path / "a.txt").write_text("one document")
    with pytest.raises(ValueError, match=r"of 1 document\(s\) leaves none for .*--document line"):
        run_plan(plan_of(tmp_path / "a.txt", validation_fraction=0.5))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--source_path is missing: files, folders or patterns of text; --destination_path is missing"),
        (["--source_path", "nowhere.txt"], "--source_path nowhere.txt: no such file or folder"),
        (["--source_path", "README.md", "--document", "word"], "--document word: expected file or line"),
        (["--source_path", "x.txt", "--percentage", "50"], "--percentage 50: expected a share of the files in (0, 1]"),
        (
            ["--source_path", "x.txt", "--validation_fraction", "1"],
            "--validation_fraction 1: expected a share in [0, 1)",
        ),
        (["--source_path", "x.txt", "--chunk-size", "1"], "--chunk_size 1: expected at least"),
    ],
)
def test_wrong_flags(tmp_path, flags, message):
    destination = ["--destination_path", str(tmp_path / "out")] if flags else []
    done = subprocess.run([sys.executable, str(SCRIPT), *flags, *destination], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_source_flag_takes_several_words():
    """As one flag with several words, as several flags, with either spelling."""
    flags = runpy.run_path(str(SCRIPT))["PrepareFlags"]
    argv = ["--source-path", "a", "b", "--prefix", "x", "--source_path=c", "--overwrite", "true"]
    read = parse(flags, argv, "")
    assert read.source_path == ["a", "b", "c"] and read.prefix == "x" and read.overwrite
    assert parse(flags, ["--source_path", "[ab]*.txt"], "").source_path == ["[ab]*.txt"], "a pattern, no YAML list"


def test_a_locked_destination_is_refused(tmp_path, plan_of):
    from lit_gpt.files import FolderInUseError

    plan = plan_of(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS))
    plan.destination.mkdir()
    code = (
        "import sys, pathlib; from lit_gpt.files import folder_lock\n"
        f"with folder_lock(pathlib.Path({str(plan.destination)!r})): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(FolderInUseError, match=f"in use by process {holder.pid}"):
            run_plan(plan)
    finally:
        holder.communicate()


def test_batches_do_not_depend_on_the_environment(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    (batch,) = read_raw_records(find_sources([str(source)]), DocumentRules(), ReadPosition())
    parts = pack_batch(batch, tokenizer, DocumentRules(), 0.0)
    assert len(parts) == 1 and parts[0].tokens.tolist() == expected_tokens(tokenizer, DOCUMENTS)
    assert batch.bytes_read == os.path.getsize(source)


def test_trained_tokenizer_is_deterministic_and_exact(tmp_path):
    source = tmp_path / "some.txt"
    source.write_text("\n".join(training_lines(3000)), encoding="utf-8")
    script = ROOT / "scripts" / "train_tokenizer.py"
    command = [sys.executable, str(script), "--source_path", str(source), "--vocab_size"]
    for folder in ("a", "b"):
        subprocess.run([*command, "400", "--destination_path", str(tmp_path / folder)], check=True, cwd=ROOT)
    first, second = (Tokenizer(tmp_path / folder) for folder in ("a", "b"))
    assert first.fingerprint == second.fingerprint
    assert (first.vocab_size, first.bos_id, first.eos_id) == (400, 1, 2)
    text = CORPUS.read_text(encoding="utf-8")
    assert first.decode(first.encode_ids(text)) == text
    done = subprocess.run(
        [*command, "100000000", "--destination_path", str(tmp_path / "c")], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: --vocab_size 100000000 does not fit this text")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "c" / "tokenizer.model").exists()
