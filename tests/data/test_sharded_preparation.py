"""Corpora in shards: every executor makes the same files, each shard goes on by itself, TinyLlama's names and splits."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard

from lit_gpt.data.packed_dataset import open_mixture, open_validation, recorded_tokenizer
from lit_gpt.data.packed_format import PackedDatasetBuilder
from lit_gpt.data.preparation import pack_texts
from lit_gpt.data.preparation_plan import PackingPlan
from lit_gpt.data.sharded_preparation import ExecutorChoice, pack_shards
from lit_gpt.data.text_files import find_sources
from lit_gpt.data.text_sources import DocumentRules
from lit_gpt.files import file_sha256
from tests.support.small_tokenizers import training_lines

ROOT = Path(__file__).resolve().parents[2]
CHUNK = 400
SHARDS = 3


@pytest.fixture(scope="module")
def documents():
    """Seven files' documents."""
    lines = list(training_lines(700))
    return [lines[number::7] for number in range(7)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, documents):
    """SlimPajama's layout: chunks with compressed files; every tenth record is of the subset that is left out."""
    folder = tmp_path_factory.mktemp("SlimPajama")
    for number, texts in enumerate(documents):
        path = folder / "train" / f"chunk{1 + number // 4}" / f"example_{number}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [{"text": text, "meta": {"redpajama_set_name": "RedPajamaBook"}} for text in texts]
        records[::10] = [{"text": "code", "meta": {"redpajama_set_name": "RedPajamaGithub"}} for _ in records[::10]]
        path.write_bytes(zstandard.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    (folder / "validation" / "chunk1").mkdir(parents=True)
    shutil.copy(folder / "train" / "chunk1" / "example_0.jsonl.zst", folder / "validation" / "chunk1")
    return folder


@pytest.fixture
def plan_in(corpus, tokenizer):
    def make(folder, **options):
        rules = DocumentRules(skip_subsets=("RedPajamaGithub",))
        return PackingPlan(
            find_sources([str(corpus / "train")]), rules, tokenizer, folder, "train_slimpajama", CHUNK, **options
        )

    return make


def in_one_process(plan):
    """What the shards must hold, made one by one without datatrove."""
    for shard in plan.split(SHARDS):
        pack_texts(shard, 1, False, lambda progress: None, lambda line: None)
    return content(plan.destination)


def content(folder):
    """Hashes of packed files, indexes and manifests."""
    return {path.name: file_sha256(path) for path in folder.glob("*") if path.is_file()}


def pack(plan, executor=None, overwrite=False):
    return pack_shards(plan, SHARDS, executor or ExecutorChoice(workers=1), overwrite, lambda *counts: None)


def slimpajama_command(corpus, destination, tokenizer_folder, *more):
    command = [sys.executable, str(ROOT / "scripts" / "prepare_slimpajama.py"), "--source_path", str(corpus)]
    command += ["--destination_path", str(destination), "--tokenizer_path", str(tokenizer_folder)]
    return [*command, "--chunk_size", str(CHUNK), "--shards", str(SHARDS), *more]


def slimpajama(corpus, destination, tokenizer_folder, *more, path=""):
    command = slimpajama_command(corpus, destination, tokenizer_folder, *more)
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


# --- executors -------------------------------------------------------------------------------------------------------


def test_two_local_workers_make_what_one_process_makes(tmp_path, corpus, documents, plan_in, tokenizer_folder):
    expected = in_one_process(plan_in(tmp_path / "one"))
    done = slimpajama(corpus, tmp_path / "two", tokenizer_folder, "--num_workers", "2")
    assert (done.returncode, done.stderr) == (0, "")
    count = sum(len(texts) - len(texts[::10]) for texts in documents)
    assert done.stdout.startswith("train_slimpajama: ") and f" {count} documents" in done.stdout
    assert content(tmp_path / "two") == expected
    again = slimpajama(corpus, tmp_path / "two", tokenizer_folder)
    assert "an earlier run had made exactly this" in again.stdout


def processes_of_session(number):
    """Those that still run, zombies apart."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == number and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are counted in /proc")
def test_no_process_outlives_a_local_preparation_that_is_killed(tmp_path, corpus, tokenizer_folder):
    """Neither its workers nor the process that keeps their queue."""
    command = slimpajama_command(corpus, tmp_path / "out", tokenizer_folder, "--num_workers", "2")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while len(processes_of_session(process.pid)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30
        while (left := processes_of_session(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for number in left:
            os.kill(number, signal.SIGKILL)
    assert not left


SBATCH = """#!{python}
import os, re, subprocess, sys
text = open(sys.argv[-1]).read()
array = re.search(r"--array=0-(\\d+)", text)
for task in range(int(array[1]) + 1 if array else 1):
    environment = {{**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "node", "SLURM_JOB_ID": "7"}}
    subprocess.run(["bash", sys.argv[-1]], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 7")
"""


@pytest.fixture
def slurm(tmp_path):
    """A folder with Slurm's commands, which run the submitted script's tasks here, one after the other."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH.format(python=sys.executable))
    (folder / "srun").write_text('#!/bin/bash\nwhile [[ $1 != launch* && $1 != merge* ]]; do shift; done; exec "$@"\n')
    (folder / "scontrol").write_text("#!/bin/bash\necho node\n")
    for path in folder.iterdir():
        path.chmod(0o755)
    return folder


def test_a_slurm_array_makes_the_same(tmp_path, corpus, plan_in, tokenizer_folder, slurm):
    flags = ("--executor", "slurm", "--slurm_partition", "cpu", "--slurm_args", "{account: mine}")
    done = slimpajama(corpus, tmp_path / "cluster", tokenizer_folder, *flags, path=slurm)
    assert (done.returncode, done.stderr) == (0, "")
    assert content(tmp_path / "cluster") == in_one_process(plan_in(tmp_path / "one"))
    script = (tmp_path / "cluster/.shards/train_slimpajama/log/launch_script.slurm").read_text()
    assert "#SBATCH --partition=cpu" in script and "#SBATCH --account=mine" in script


# Submits nothing; what it was given is kept, and squeue knows the job until the test takes it away.
QUEUE = """#!/bin/bash
here=$(dirname "$0")
case $(basename "$0") in
sbatch) echo "$*" >> "$here/submitted"; touch "$here/queued"; echo "Submitted batch job 7" ;;
squeue) [ -e "$here/queued" ] && echo "7_0 cpu" && exit
        echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;;
esac
"""


def test_a_submitted_slurm_job_is_not_submitted_again(tmp_path, corpus, tokenizer_folder):
    """The same command tells how far the job is, as it says; what a job left undone gets another one with its own log."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("sbatch", "squeue"):
        (bin_folder / name).write_text(QUEUE)
        (bin_folder / name).chmod(0o755)
    flags = ("--executor", "slurm", "--slurm_partition", "cpu", "--overwrite", "true")

    def run(*more):
        return slimpajama(corpus, tmp_path / "out", tokenizer_folder, *flags, *more, path=bin_folder)

    def submitted():
        return len((bin_folder / "submitted").read_text().splitlines())

    assert run().returncode == 0
    first = submitted()
    log = tmp_path / "out/.shards/train_slimpajama/log"
    ranks = (log / "ranks_to_run.json").read_text()
    again = run()
    assert again.returncode == 0 and f"0 of {SHARDS} shards are finished" in again.stdout and submitted() == first
    other = run("--chunk_size", "800")
    assert other.returncode == 2 and "job 7 makes these files from other sources or settings" in other.stderr
    (bin_folder / "queued").unlink()
    assert run().returncode == 0 and submitted() == 2 * first
    assert (log / "ranks_to_run.json").read_text() == ranks and (log.parent / "log-2/ranks_to_run.json").is_file()


def test_slurm_without_sbatch_is_one_line(tmp_path, corpus, tokenizer_folder):
    flags = ("--executor", "slurm", "--slurm_partition", "cpu")
    done = slimpajama(corpus, tmp_path / "out", tokenizer_folder, *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "the job could not be submitted" in done.stderr


@pytest.mark.parametrize("executor", ["slurm", "ray"])
def test_one_source_file_is_nothing_for_a_cluster(tmp_path, corpus, tokenizer_folder, executor):
    """It is one shard whatever --shards says; it was made here, on a login node, or ended in a line about workers."""
    flags = ("--split", "validation", "--executor", executor, "--slurm_partition", "cpu")
    done = slimpajama(corpus, tmp_path / "out", tokenizer_folder, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith(f"error: --executor {executor}: {corpus}/validation/") and done.stderr.count("\n") == 1
    )
    assert "is the only source file, so there is one shard" in done.stderr and not list(tmp_path.glob("out/*.bin"))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_makes_the_same(tmp_path, corpus, plan_in, tokenizer_folder):
    done = slimpajama(corpus, tmp_path / "ray", tokenizer_folder, "--executor", "ray")
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "ray") == in_one_process(plan_in(tmp_path / "one"))


# --- shards ------------------------------------------------------------------------------------------------------------


def test_a_shard_goes_on_by_itself(tmp_path, plan_in):
    plan = plan_in(tmp_path / "out")
    pack(plan)
    before = content(plan.destination)
    kept = {path: path.stat().st_mtime_ns for path in plan.destination.glob("train_slimpajama_0*")}
    (plan.destination / "train_slimpajama_1_0000000001.bin").unlink()
    with pytest.raises(ValueError, match=r"train_slimpajama_1\.manifest\.json: names 1 file\(s\) that are not there"):
        open_mixture(plan.destination, {"train_slim": 1.0}, 20, 400, seed=0)
    result = pack(plan)
    assert not result.was_finished and content(plan.destination) == before
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert pack(plan).was_finished


def test_training_refuses_a_corpus_with_unfinished_shards(tmp_path, plan_in):
    plan = plan_in(tmp_path / "out")
    for shard in plan.split(SHARDS)[:2]:
        pack_texts(shard, 1, False, lambda progress: None, lambda line: None)
    with pytest.raises(ValueError, match=r"1 of 3 shards are not finished, such as 2: the same command"):
        open_mixture(plan.destination, {"train_slim": 1.0}, 20, 400, seed=0)
    pack(plan)
    assert len(open_mixture(plan.destination, {"train_slim": 1.0}, 20, 400, seed=0).sets[0])
    (plan.destination / "train_slim.progress.json").write_text("{}")
    with pytest.raises(ValueError, match=r"train_slim\.progress\.json: the preparation of this data is not finished"):
        open_mixture(plan.destination, {"train_slim": 1.0}, 20, 400, seed=0)


def test_files_are_tinyllama_s(tmp_path, documents, plan_in, tokenizer):
    """A process of TinyLlama's reads a run of consecutive files, and packs them by the builder."""
    plan = plan_in(tmp_path / "out")
    pack(plan)
    for shard, files in enumerate(np.array_split(np.arange(7), SHARDS)):
        prefix = f"train_slimpajama_{shard}"
        builder = PackedDatasetBuilder(tmp_path / "theirs", prefix, CHUNK, tokenizer.bos_id, vocab_size=400)
        for number in files:
            for index, text in enumerate(documents[number]):
                if index % 10:
                    builder.add_array(tokenizer.encode(text).numpy())
        builder.write_reminder()
    theirs = content(tmp_path / "theirs")
    assert len(theirs) > 20 and theirs.items() <= content(plan.destination).items()


def test_manifests_hold_counts_hashes_and_shards(tmp_path, plan_in):
    plan = plan_in(tmp_path / "out")
    for number, manifest in enumerate(pack(plan).manifests):
        assert manifest["shard"] == {"index": number, "count": SHARDS}
        assert sum(entry["tokens"] for entry in manifest["files"].values()) == manifest["tokens"]
        for name, entry in manifest["files"].items():
            assert entry["sha256"] == hashlib.sha256((plan.destination / name).read_bytes()).hexdigest()
    assert recorded_tokenizer(plan.destination, ["train_slim"])["vocab_size"] == 400


def test_the_last_file_is_dropped_only_where_asked(tmp_path, plan_in):
    kept = {m["shard"]["index"]: m for m in pack(plan_in(tmp_path / "kept")).manifests}
    dropped = {m["shard"]["index"]: m for m in pack(plan_in(tmp_path / "dropped", drop_last=True)).manifests}
    for number, manifest in kept.items():
        full = [name for name, entry in manifest["files"].items() if entry["tokens"] == CHUNK]
        assert list(dropped[number]["files"]) == full and len(full) < len(manifest["files"])
        assert dropped[number]["tokens"] + dropped[number]["dropped_tokens"] == manifest["tokens"]


def test_drop_last_never_drops_a_whole_corpus(tmp_path, corpus, plan_in, tokenizer_folder):
    """Each shard drops a rest of its own, which the summary counts; nothing at all is no corpus."""
    made = slimpajama(corpus, tmp_path / "out", tokenizer_folder, "--drop_last", "true")
    assert made.returncode == 0 and re.search(r"tokens in .*; [\d,]+ tokens dropped \(--drop_last\)", made.stdout)
    large = replace(plan_in(tmp_path / "none", drop_last=True), chunk_size=1 << 20)
    with pytest.raises(ValueError, match=r"--drop_last drops all [\d,]{6,} tokens: those of no shard fill a file"):
        pack(large)


def test_other_numbers_of_shards_are_refused_or_replaced(tmp_path, plan_in):
    plan = plan_in(tmp_path / "out")
    pack(plan)
    with pytest.raises(ValueError, match="training would read this as part of train_slimpajama.*or --overwrite"):
        pack_shards(plan, 2, ExecutorChoice(), False, lambda *counts: None)
    pack_shards(plan, 2, ExecutorChoice(), True, lambda *counts: None)
    pack_shards(plan_in(tmp_path / "fresh"), 2, ExecutorChoice(), False, lambda *counts: None)
    assert content(plan.destination) == content(tmp_path / "fresh")
    with pytest.raises(ValueError, match=r"--shards 8: the corpus has 7 file\(s\)"):
        pack_shards(plan, 8, ExecutorChoice(), False, lambda *counts: None)


def test_a_second_series_of_the_same_data_set_is_refused(tmp_path, corpus, plan_in):
    """Training would read both, and so every text twice: between shards and a series of one piece, whoever came first."""
    whole = replace(plan_in(tmp_path / "one"), prefix="train_slim")
    pack_texts(whole, 1, False, lambda progress: None, lambda line: None)
    before = content(whole.destination)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"train_slim[_0-9a-z.]*: training would read this as part of train_slim;"):
            pack(plan_in(tmp_path / "one"), overwrite=overwrite)
    pack(replace(whole, destination=tmp_path / "two", prefix="validation_slimpajama"))
    pack(plan_in(tmp_path / "two"))
    for prefix in ("train_slim", "validation"):
        with pytest.raises(ValueError, match=f"training would read this file as part of {prefix}"):
            one = replace(whole, destination=tmp_path / "two", prefix=prefix)
            pack_texts(one, 1, False, lambda progress: None, lambda line: None)
    assert content(whole.destination) == before


def test_a_damaged_source_is_one_line(tmp_path, corpus, tokenizer_folder):
    shutil.copytree(corpus, tmp_path / "source")
    path = tmp_path / "source" / "train" / "chunk2" / "example_6.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-9])
    done = slimpajama(tmp_path / "source", tmp_path / "out", tokenizer_folder, "--num_workers", "2")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {path}: cannot be read (truncated zstd data")


def test_splits(tmp_path, corpus, tokenizer_folder):
    done = slimpajama(corpus, tmp_path, tokenizer_folder, "--split", "validation")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(open_validation(tmp_path, 20, 400)) > 10
    done = slimpajama(corpus, tmp_path, tokenizer_folder, "--split", "dev")
    assert done.stderr == "error: --split dev: expected train, validation or test\n"


def test_starcoder(tmp_path, tokenizer_folder):
    import pyarrow
    import pyarrow.parquet

    for language in ("c", "python"):
        (tmp_path / "star" / language).mkdir(parents=True)
        table = pyarrow.table({"content": [f"{language} code {i}\n" for i in range(40)], "id": list(range(40))})
        pyarrow.parquet.write_table(table, tmp_path / "star" / language / "train-00000.parquet")
    command = [sys.executable, str(ROOT / "scripts" / "prepare_starcoder.py"), "--source_path", str(tmp_path / "star")]
    command += ["--destination_path", str(tmp_path / "out"), "--tokenizer_path", str(tokenizer_folder)]
    done = subprocess.run([*command, "--chunk_size", "100"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name[:17] for path in (tmp_path / "out").glob("*.bin")} == {"train_starcoder_0", "train_starcoder_1"}
    assert len(open_mixture(tmp_path / "out", {"train_star": 1.0}, 20, 400, seed=0).sets[0])


def test_a_copy_is_checked_by_its_hashes(tmp_path, plan_in):
    plan = plan_in(tmp_path / "out")
    pack(plan)
    command = [sys.executable, str(ROOT / "scripts" / "check_data.py"), str(plan.destination)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "3 manifest(s): all " in done.stdout
    path = plan.destination / "train_slimpajama_1_0000000001.bin"
    raw = bytearray(path.read_bytes())
    raw[300] ^= 1
    path.write_bytes(raw)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and f"{path}: differs from its manifest" in done.stdout
    assert "files differ: make or copy them again" in done.stderr


def check_data(folder):
    command = [sys.executable, str(ROOT / "scripts" / "check_data.py"), str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_nothing_that_was_not_compared_counts_as_whole(tmp_path, plan_in):
    plan = replace(plan_in(tmp_path / "out"), prefix="train_slim")
    pack_texts(plan, 1, False, lambda progress: None, lambda line: None)
    assert check_data(plan.destination).returncode == 0
    path, manifest = plan.destination / "train_slim_0000000001.bin", plan.destination / "train_slim.manifest.json"
    index = path.with_name(f"{path.name}.index")
    raw = index.read_bytes()
    for content, message in ((None, f"{index}: missing"), (b"", "the indexes of its files"), (raw[:-8], "documents")):
        index.unlink() if content is None else index.write_bytes(content)
        done = check_data(plan.destination)
        assert done.returncode == 2 and message in done.stdout and "all " not in done.stdout
    index.write_bytes(raw)
    stale = plan.destination / "train_slim_0000000999.bin"
    shutil.copy(path, stale)
    done = check_data(plan.destination)
    assert done.returncode == 2 and f"{stale}: in no manifest, and training reads it" in done.stdout
    stale.unlink()
    values = json.loads(manifest.read_text())
    values["files"] = {name: {"tokens": entry["tokens"]} for name, entry in values["files"].items()}
    values["files"][path.name] = None  # which training takes
    manifest.write_text(json.dumps(values))
    done = check_data(plan.destination)
    assert done.returncode == 2 and "nothing could be compared" in done.stderr and done.stderr.count("\n") == 1
