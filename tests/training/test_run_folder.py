"""A run's folder through whole runs by the real scripts: what is kept, deleted, logged and saved when something fails."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from lit_gpt.data.packed_format import PackedDatasetBuilder
from lit_gpt.training.speed_monitor import format_seconds
from tests.checkpoints.test_sharded import largest_file
from tests.support.training_runs import (
    assert_same_run,
    differing_tensors,
    final_state,
    make_packed_data,
    one_thread_environment,
    pretraining_command,
    read_metrics,
    run_pretraining,
    run_pretraining_process,
    start_pretraining,
)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a megabyte."""
    place, mount = tmp_path / "disk", shutil.which("mount")
    place.mkdir()
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def checkpoints(folder):
    """The run's checkpoints by optimizer step."""
    found = {}
    for path in sorted(folder.glob("workdir/*/*/iter-*-ckpt.pth")):
        found[json.loads(path.with_suffix(".json").read_text())["step"]] = path
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("workdir/*/*/iter-*")}


FLAGS = {"max_steps": 12, "save_interval": 3, "keep_checkpoints": 0, "val_samples": 0}


@pytest.fixture
def finished(folder):
    run_pretraining("train_ar.py", folder, **FLAGS)
    assert list(checkpoints(folder)) == [3, 6, 9, 12]
    return folder


@pytest.mark.parametrize(
    "mistake",
    [{"learning_rate": 1.0}, {"models_dir": "data/validation_0000000000.bin/models"}],
    ids=["other settings", "no room for the export"],
)
@pytest.mark.parametrize("rewind", ["to 3", "never"])
def test_a_refused_rewind_deletes_nothing(finished, mistake, rewind):
    resume = checkpoints(finished)[3] if rewind == "to 3" else "never"
    if resume == "never" and "learning_rate" in mistake:
        mistake = {"logger": "carrier_pigeon"}
    before = contents(finished)
    _, err = run_pretraining(
        "train_ar.py", finished, code=2, **FLAGS | {"resume": resume, "overwrite": "true"} | mistake
    )
    assert err.startswith("error: ")
    assert contents(finished) == before


def test_checkpoints_are_named_by_published_micro_steps_and_older_names_go_on(folder):
    """512 sequences in groups of 32 are 2 micro steps of one of 8 GPUs; a run of another count keeps its own."""
    flags = {"max_steps": 4, "save_interval": 2, "keep_checkpoints": 0, "val_samples": 0, "batch_size": 512}
    flags |= {"block_size": 8, "log_interval": 1}
    run_pretraining("train_mdm.py", folder, **flags)
    (run,) = folder.glob("workdir/*/*")
    assert [path.stem for path in sorted(run.glob("iter-*.pth"))] == ["iter-000004-ckpt", "iter-000008-ckpt"]
    assert [float(row["samples"]) for row in read_metrics(folder) if row["samples"]] == [64, 128, 192, 256]
    # As it was counted before: every group of the step, 16 here.
    content = torch.load(run / "iter-000004-ckpt.pth", weights_only=True) | {"iter_num": 32}
    torch.save(content, run / "iter-000032-ckpt.pth")
    expected = torch.load(run / "iter-000008-ckpt.pth", weights_only=True)["model"]
    out, _ = run_pretraining("train_mdm.py", folder, **flags, resume=run / "iter-000032-ckpt.pth")
    assert "iter 64 step 4: " in out
    again = torch.load(run / "iter-000064-ckpt.pth", weights_only=True)
    assert (again["iter_num"], again["step_count"]) == (64, 4)
    assert all(torch.equal(expected[name], tensor) for name, tensor in again["model"].items())
    assert "is finished" in run_pretraining("train_mdm.py", folder, **flags)[0]


def test_a_rewind_deletes_later_checkpoints_with_its_first_save(finished):
    """An end before that save loses nothing, and the run still is where it was taken back to."""
    before, state = contents(finished), final_state(finished)
    record = next(finished.glob("workdir/*/*/run.json"))
    # A folder in the way of the temporary file's final name: the first save fails.
    flags = FLAGS | {"resume": checkpoints(finished)[3], "save_interval": 5}
    (blocked := record.parent / "iter-000005-ckpt.pth").mkdir()
    run_pretraining("train_ar.py", finished, code=2, **flags)
    blocked.rmdir()
    assert contents(finished) == before
    out, _ = run_pretraining("train_ar.py", finished, **FLAGS | {"save_interval": 7})
    assert "resumed at step 3 of 12" in out
    assert list(checkpoints(finished)) == [3, 7, 12]
    assert differing_tensors(state, final_state(finished)) == []
    assert "checkpoints_valid_until" not in json.loads(record.read_text())


# --- whatever fails, what was computed is kept --------------------------------------------------------------------


def make_one_large_file(folder):
    """Data in one file whose middle no fingerprint covers."""
    builder = PackedDatasetBuilder(folder, "train_slim", chunk_size=33 * 240, sep_token=1, vocab_size=64)
    builder.add_array(np.arange(33 * 239) % 62 + 2)
    builder.write_reminder()
    return next(folder.glob("train_slim*.bin"))


def edit_middle(path, value):
    """Write something else into the middle of a file; returns what was there."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    before = bytes(content[middle : middle + len(value)])
    content[middle : middle + len(value)] = value
    path.write_bytes(content)
    return before


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_between_two_checkpoints_saves_the_last_whole_step(tmp_path, tmp_path_factory, processes):
    """A file on the disk goes bad while it is read; when it is whole again, the run goes on as if nothing had been."""
    flags = {"max_steps": 30, "save_interval": 5000, "log_interval": 1, "val_samples": 0, "devices": processes}
    run = run_pretraining if processes == 1 else run_pretraining_process
    whole = tmp_path_factory.mktemp("whole")
    make_one_large_file(whole / "data")
    run("train_mdm.py", whole, **flags)
    data = make_one_large_file(tmp_path / "data")
    before = edit_middle(data, b"\xe7\x03" * 10)
    _, err = run("train_mdm.py", tmp_path, code=2, **flags)
    assert "the model's vocabulary has 64 tokens" in err
    edit_middle(data, before)
    (saved,) = checkpoints(tmp_path)
    assert 0 < saved < 30
    out, _ = run("train_mdm.py", tmp_path, **flags)
    assert f"resumed at step {saved} of 30" in out
    assert_same_run(whole, tmp_path)


def test_numbers_that_are_not_finite_are_not_saved(folder):
    flags = {"max_steps": 30, "save_interval": 5000, "learning_rate": 1e30, "grad_clip": 0, "val_samples": 0}
    _, err = run_pretraining("train_ar.py", folder, code=2, **flags)
    assert "not finite, stopped before the update" in err and "with --skip_steps 2 passes over" in err
    assert not checkpoints(folder)


def test_a_full_disk_under_the_logs_does_not_end_a_run(folder, small_disk):
    """The CSV's disk fills up, and has room again later: the run goes on, and the rows are all there."""
    flags = {"max_steps": 1500, "save_interval": 5000, "log_interval": 1, "val_samples": 0}
    process = start_pretraining("train_ar.py", folder, **flags, logger="csv,tensorboard", log_dir=small_disk)
    ballast, warned = small_disk / "ballast", ""
    for line in process.stdout:
        if "step 10:" in line:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 512)
        if "step 900:" in line:
            ballast.unlink()
    warned = process.stderr.read()
    assert process.wait(60) == 0, warned
    lines = [line for line in warned.splitlines() if "No space left on device" in line]
    assert 1 <= len(lines) <= 2 and all(line.startswith("warning: the ") for line in lines), warned
    assert f"warning: the csv log in {small_disk}" in warned
    with next(small_disk.glob("*/version_0/metrics.csv")).open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 1501))


def test_a_full_disk_under_standard_output_does_not_end_a_run(folder):
    command = pretraining_command("train_ar.py", folder, max_steps=30, log_interval=1, val_samples=0)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=one_thread_environment(), stdout=full, stderr=full, timeout=200
        )
    assert list(checkpoints(folder)) == [30] and list(folder.glob("models/*.safetensors")), done.returncode


def test_a_lost_terminal_saves(folder):
    # Where the tests themselves run under nohup, their children would ignore the signal.
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process = start_pretraining("train_ar.py", folder, max_steps=20000, save_interval=50000, val_samples=0)
    signal.signal(signal.SIGHUP, inherited)
    for line in process.stdout:
        if "step 20:" in line:
            break
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP, err
    assert "SIGHUP: stopped at step" in err and checkpoints(folder)


# --- steps that are passed over -----------------------------------------------------------------------------------


def test_skipped_steps_change_nothing_but_the_schedule_and_stay_skipped(folder, tmp_path_factory):
    flags = FLAGS | {"save_interval": 4, "log_interval": 1}
    unskipped = tmp_path_factory.mktemp("unskipped")
    make_packed_data(unskipped / "data")
    run_pretraining("train_mdm.py", unskipped, **flags)
    out, _ = run_pretraining("train_mdm.py", folder, **flags, skip_steps="3,6-7,12")
    assert [line for line in out.splitlines() if "passed over" in line] == [
        f"passed over the data of step {first} to {last}, without an update"
        for first, last in ((3, 3), (6, 7), (12, 12))
    ]
    rows, full = ({int(row["step"]): row for row in read_metrics(place)} for place in (folder, unskipped))
    assert list(rows) == [1, 2, 4, 5, 8, 9, 10, 11]
    for step in (1, 2):
        assert rows[step]["metric/train_loss"] == full[step]["metric/train_loss"]
    assert rows[4]["metric/train_loss"] != full[4]["metric/train_loss"]
    assert [rows[step]["learning_rate"] for step in rows] == [full[step]["learning_rate"] for step in rows]
    assert int(full[11]["total_tokens"]) - int(rows[11]["total_tokens"]) == 3 * 8 * 32
    assert [int(row["skipped_steps"]) for row in rows.values()] == [0, 0, 1, 1, 3, 3, 3, 3]
    assert float(rows[11]["time/left"]) == 0
    # Back to step 4, without the flag: the same run.
    state = final_state(folder)
    run_pretraining("train_mdm.py", folder, **flags, resume=checkpoints(folder)[4])
    assert differing_tensors(state, final_state(folder)) == []
    for path in (checkpoints(folder)[12].with_suffix(".json"), next(folder.glob("workdir/*/*/run.json"))):
        record = json.loads(path.read_text())
        assert record.get("record", record)["skip_steps"] == [[3, 3], [6, 7], [12, 12]]


def test_a_step_that_was_learnt_from_is_not_skipped(finished):
    _, err = run_pretraining("train_ar.py", finished, code=2, **FLAGS, skip_steps="4-5")
    assert "(step 12) has learnt from step 4 already" in err
    resume = checkpoints(finished)[3]
    run_pretraining("train_ar.py", finished, **FLAGS, skip_steps="4-5", resume=resume)
    assert list(checkpoints(finished)) == [3, 6, 9, 12]


def test_the_data_of_a_skipped_step_is_not_read(tmp_path):
    path = make_one_large_file(tmp_path / "data")
    edit_middle(path, b"\xe7\x03" * 4)
    flags = {"max_steps": 30, "save_interval": 5000, "val_samples": 0}
    run_pretraining("train_mdm.py", tmp_path, code=2, **flags)
    (saved,) = checkpoints(tmp_path)
    run_pretraining("train_mdm.py", tmp_path, **flags, skip_steps=saved + 1)
    assert max(checkpoints(tmp_path)) == 30


@pytest.mark.parametrize("words", ["0", "7-5", "a", "3-", "1,,2"])
def test_what_is_no_range_of_steps_is_refused(folder, words):
    _, err = run_pretraining("train_ar.py", folder, code=2, **FLAGS, skip_steps=words)
    assert err.startswith("error: --skip_steps ") and "such as 5120-5130" in err


def test_the_speed_after_a_resume_is_of_the_steps_since(folder):
    flags = FLAGS | {"save_interval": 6, "log_interval": 3}
    run_pretraining("train_ar.py", folder, **flags)
    run_pretraining("train_ar.py", folder, **flags, resume=checkpoints(folder)[6])
    row = next(row for row in read_metrics(folder) if row["step"] == "9")
    assert float(row["throughput/tokens_per_sec"]) * float(row["time/train"]) == pytest.approx(3 * 8 * 32, rel=1e-3)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_row_says_what_an_operator_asks(folder, processes):
    """All columns but the share of a peak that no CPU has; the time left is what the speed makes of the steps left."""
    run = run_pretraining if processes == 1 else run_pretraining_process
    out, _ = run("train_mdm.py", folder, **FLAGS, log_interval=5, devices=processes)
    rows = [row for row in read_metrics(folder) if row["metric/train_loss"]]
    assert [row["step"] for row in rows] == ["1", "5", "10", "12"]
    for row in rows:
        validation = {"metric/val_loss", "metric/val_ppl", "metric/val_bpb"}
        validation |= {"metric/val_loss_se", "metric/val_loss_draws_se"}
        assert {name for name, value in row.items() if not value} == validation | {"throughput/device/mfu"}
        left = (12 - int(row["step"])) * 8 / float(row["throughput/samples_per_sec"])
        assert float(row["time/left"]) == pytest.approx(left)
        hours = left / 3600
        assert f"ms remaining time: {hours:.2f} hours. or {hours / 24:.2f} days. " in out, (
            "the published order of words"
        )
        assert re.search(rf"^step {row['step']}: loss .* tokens/s, {format_seconds(left)} left$", out, re.MULTILINE)
        assert float(row["samples"]) == int(row["step"]) * 8
        assert 0 < float(row["data/wait_share"]) <= 1 and float(row["data/wait_ms"]) > 0
        # Of this process, or of one that the test started: torch alone takes a part of it.
        assert 0.1 < float(row["memory/peak_gb"]) < 20
    peaks = [float(row["memory/peak_gb"]) for row in rows]
    assert peaks == sorted(peaks)


def test_a_log_with_other_columns_goes_on(finished):
    """As an earlier version wrote it: without some columns of today, and with one that is gone."""
    (path,) = finished.glob("out/*/version_0/metrics.csv")
    before = read_metrics(finished)
    old = [name for name in before[0] if not name.startswith(("data/", "memory/", "time/left", "skipped_steps"))]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*old, "bits"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "bits": "7"} for row in before)
    run_pretraining("train_ar.py", finished, **FLAGS | {"log_interval": 2}, resume=checkpoints(finished)[6])
    after = read_metrics(finished)
    assert list(after[0]) == list(before[0])
    assert [row["step"] for row in after] == ["1", "8", "10", "12"]
    assert {name: after[0][name] for name in old} == {name: before[0][name] for name in old}
    assert not after[0]["memory/peak_gb"] and float(after[1]["memory/peak_gb"]) > 0


def test_a_damaged_record_is_deleted_and_the_run_goes_on_under_a_new_id(folder, tmp_path_factory):
    unbroken = tmp_path_factory.mktemp("unbroken")
    make_packed_data(unbroken / "data")
    run_pretraining("train_ar.py", unbroken, **FLAGS)
    run_pretraining("train_ar.py", folder, **FLAGS)
    (record,) = folder.glob("workdir/*/*/run.json")
    (export,) = folder.glob("models/*.safetensors")
    first_id = json.loads(record.read_text())["run_id"]
    # As if the run had been killed after its sixth step.
    for path in (checkpoints(folder)[9], checkpoints(folder)[12]):
        path.with_suffix(".json").unlink()
        path.unlink()
    export.unlink()
    record.write_bytes(record.read_bytes()[:82])
    _, err = run_pretraining("train_ar.py", folder, code=2, **FLAGS)
    assert err.count("\n") == 1 and "run.json is not readable as JSON" in err
    assert err.endswith("; delete it, and the run goes on under a new id\n")
    record.unlink()
    out, err = run_pretraining("train_ar.py", folder, **FLAGS)
    assert not err and "resumed at step 6 of 12" in out
    assert json.loads(record.read_text())["run_id"] != first_id
    assert not differing_tensors(final_state(folder), final_state(unbroken))


def test_a_save_that_fails_is_told_once(folder):
    with largest_file(30_000):
        _, err = run_pretraining("train_ar.py", folder, code=2, **FLAGS)
    assert err.count("\n") == 1 and err.startswith("error: cannot write ") and "iter-000003-ckpt.pth" in err
    assert not list(folder.glob("workdir/*/*/iter-*"))
