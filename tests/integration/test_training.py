"""Whole trainings by the real scripts: they learn, resume bit for bit, split over processes, and refuse clearly."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.support.training_runs import (
    differing_tensors,
    final_state,
    make_packed_data,
    one_thread_environment,
    pretraining_command,
    read_losses,
    read_metrics,
    run_pretraining,
    run_pretraining_process,
    start_pretraining,
)


@pytest.mark.parametrize("script", ["train_ar.py", "train_mdm.py", "train_mdm_rl.py"])
def test_a_run_learns_validates_and_exports(folder, script):
    extra = {"ssl_ratio": 0.2} if script == "train_mdm_rl.py" else {}
    out, _ = run_pretraining(script, folder, max_steps=150, val_interval=75, **extra)
    curve = read_losses(folder)
    assert curve[150] < 0.8 * curve[1]
    validation = read_losses(folder, "metric/val_loss")
    assert set(validation) == {75, 150}
    assert validation[150] < validation[75]
    record = json.loads(next(folder.glob("workdir/scaling_debug/*/run.json")).read_text())
    assert record["finished"] and record["result"]["val_loss"] == pytest.approx(validation[150])
    assert ("bound" in record["result"]["estimator"]) == (script != "train_ar.py")
    assert (folder / record["result"]["export"]).is_file()
    assert "remaining time" in out
    again, _ = run_pretraining(script, folder, max_steps=150, val_interval=75, **extra)
    assert "is finished" in again


def test_kill_and_resume_is_bit_identical(folder, tmp_path_factory):
    """Killed at random moments again and again, the run ends as the unbroken one does, optimizer and log included."""
    # Steps take milliseconds: the last kill must come well before the end.
    settings = {"max_steps": 400, "save_interval": 7, "log_interval": 5}
    whole = tmp_path_factory.mktemp("whole")
    make_packed_data(whole / "data")
    run_pretraining_process("train_mdm_rl.py", whole, **settings, ssl_ratio=0.3)
    moments = random.Random(5)
    for step in (15, 90, 170, 250):
        process = start_pretraining("train_mdm_rl.py", folder, **settings, ssl_ratio=0.3)
        reached = (line for line in process.stdout if (at := re.search(r"step (\d+):", line)) and int(at[1]) >= step)
        assert next(reached, None), process.stderr.read()
        time.sleep(moments.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    run_pretraining_process("train_mdm_rl.py", folder, **settings, ssl_ratio=0.3)
    assert differing_tensors(final_state(whole), final_state(folder)) == []
    assert read_losses(whole) == read_losses(folder)


def test_a_run_whose_rows_grow_goes_on_bit_for_bit(folder, tmp_path_factory):
    settings = {"max_steps": 20, "save_interval": 5, "keep_checkpoints": 0, "log_interval": 1}
    settings |= {"loss_weight": "cross_entropy", "row_lengths": "8:8,16:14"}
    run_pretraining("train_mdm.py", folder, **settings)
    other = tmp_path_factory.mktemp("other")
    make_packed_data(other / "data")
    (checkpoint,) = folder.glob("workdir/*/*/iter-000005-ckpt.pth")
    out, _ = run_pretraining("train_mdm.py", other, **settings, resume=checkpoint)
    assert "resumed at step 5 of 20" in out
    assert differing_tensors(final_state(folder), final_state(other)) == []
    _, err = run_pretraining("train_mdm.py", other, code=2, **{**settings, "row_lengths": "8:8"})
    assert "row_lengths: checkpoint [[8, 8], [16, 14]], now [[8, 8]]" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(folder, number):
    process = start_pretraining("train_ar.py", folder, max_steps=2000, save_interval=5000, val_samples=0)
    for line in process.stdout:
        if "step 20:" in line:
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, out + err
    assert "Traceback" not in err and "the same command goes on" in err
    stopped = int(max(folder.glob("workdir/*/*/iter-*-ckpt.pth")).name.split("-")[1])
    out, _ = run_pretraining(
        "train_ar.py", folder, code=2, max_steps=2000, save_interval=5000, val_samples=0, learning_rate=4e-3
    )
    process = start_pretraining("train_ar.py", folder, max_steps=2000, save_interval=5000, val_samples=0)
    resumed = next(line for line in process.stdout if "resumed at step" in line)
    process.kill()
    process.communicate()
    assert f"resumed at step {stopped} of 2000" in resumed


def test_a_path_with_umlauts_in_a_terminal_without_any(folder):
    """torch, safetensors and the tokenizers read UTF-8 paths only, whatever the locale."""
    command = [
        *pretraining_command("train_ar.py", folder, max_steps=4),
        "--out_dir=Läufe",
        "--models_dir=Läufe/öffentlich",
    ]
    ascii_only = {**one_thread_environment(), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=ascii_only, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    (export,) = (folder / "Läufe" / "öffentlich").glob("*.safetensors")
    assert f"exported Läufe/öffentlich/{export.name}".encode() in done.stdout
    # Bytes that are no UTF-8 at all are refused before the work.
    done = subprocess.run(
        [sys.executable, *command, b"--log_dir=L\xe4ufe"], cwd=folder, env=ascii_only, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: --log_dir=L\\udce4ufe: expected UTF-8\n"


@pytest.mark.parametrize("killed", [0, 1])
def test_what_is_left_of_a_killed_pair_says_one_line_at_most(folder, killed):
    process = start_pretraining("train_mdm.py", folder, max_steps=100_000, devices=2)
    while "step 20:" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    (other,) = psutil.Process(process.pid).children(recursive=True)
    os.kill(other.pid if killed else process.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE
    assert err.count("\n") <= 1 and (not killed or "another process of this run has ended" in err), err
    assert process.returncode == (1 if killed else -signal.SIGKILL)


def test_a_broken_checkpoint_is_skipped_by_name(folder):
    run_pretraining("train_ar.py", folder, max_steps=20, save_interval=5)
    newest, before = sorted(folder.glob("workdir/*/*/iter-*-ckpt.pth"), reverse=True)[:2]
    with newest.open("r+b") as file:
        file.truncate(newest.stat().st_size // 2)
    out, err = run_pretraining("train_ar.py", folder, max_steps=20, save_interval=5)
    assert f"warning: {newest.relative_to(folder)}" in err or newest.name in err
    assert "resumed at step 15 of 20" in out


def relative_difference(one, other):
    return max(abs(one[step] / other[step] - 1) for step in one)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(folder, tmp_path_factory, strategy):
    settings = {"max_steps": 50, "log_interval": 1, "ssl_ratio": 0.2, "batch_size": 8, "seed": 2**33 + 5}
    single = tmp_path_factory.mktemp("single")
    make_packed_data(single / "data")
    run_pretraining("train_mdm_rl.py", single, **settings)
    run_pretraining_process("train_mdm_rl.py", folder, **settings, devices=2, strategy=strategy)
    one, two = read_losses(single), read_losses(folder)
    assert len(one) == 50
    assert relative_difference(one, two) < 1e-5
    assert relative_difference(read_losses(single, "metric/val_loss"), read_losses(folder, "metric/val_loss")) < 1e-5


@pytest.mark.parametrize(
    "launcher",
    [
        ["fabric", "run", "--accelerator=cpu", "--devices=2"],
        ["lightning", "run", "model", "--node-rank=0", "--accelerator=cpu", "--devices=2", "--num-nodes=1"],
    ],
)
def test_the_launchers_start_the_scripts(folder, launcher):
    executable = os.path.join(os.path.dirname(sys.executable), launcher[0])
    arguments = [executable, *launcher[1:], *pretraining_command("train_mdm.py", folder, max_steps=12)]
    result = subprocess.run(
        arguments, cwd=folder, env=one_thread_environment(), capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "device: 2 x cpu" in result.stdout
    assert 12 in read_losses(folder)


def test_cut_groups_on_one_device_only_are_met_by_the_others(folder, tmp_path_factory):
    """Three groups on two devices: one may have two lengths where the other has one, and both make as many passes."""
    settings = {"max_steps": 12, "log_interval": 1, "batch_size": 96, "ssl_ratio": 0.5, "val_samples": 0}
    other = tmp_path_factory.mktemp("other")
    make_packed_data(other / "data")
    run_pretraining("train_mdm_rl.py", folder, **settings)
    run_pretraining_process("train_mdm_rl.py", other, **settings, accelerator="cpu", devices=2, strategy="fsdp")
    assert relative_difference(read_losses(folder), read_losses(other)) < 1e-5
    counts = [read_losses(path, "total_tokens") for path in (folder, other)]
    assert counts[0] == counts[1]


def test_the_micro_batch_changes_speed_only(folder, tmp_path_factory):
    settings = {"max_steps": 30, "log_interval": 1}
    other = tmp_path_factory.mktemp("other")
    make_packed_data(other / "data")
    run_pretraining("train_mdm.py", folder, **settings, micro_batch_size=8)
    run_pretraining("train_mdm.py", other, **settings, micro_batch_size=3, activation_checkpointing="true")
    assert relative_difference(read_losses(folder), read_losses(other)) < 1e-5


def test_an_mdm_starts_from_an_arms_weights(folder):
    run_pretraining("train_ar.py", folder, max_steps=60)
    (export,) = folder.glob("models/*.safetensors")
    out, _ = run_pretraining("train_mdm.py", folder, max_steps=5, init_from=export, log_dir="out_mdm")
    assert (len(list(folder.glob("models/*.safetensors")))) == 2
    assert "run mdm-" in out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"model": 7, "max_steps": 5}, "the sizes are 6, 19, 34"),
        ({"max_steps": 5, "flops": 1.0}, "give either --flops (in 1e18) or --max_steps, not both"),
        ({"data_dir": "nowhere", "max_steps": 5}, "no training data: looked for nowhere/train_slim*.bin"),
        ({"vocab_size": 40, "max_steps": 5}, "the model's vocabulary has 40 tokens"),
        ({"block_size": 500, "max_steps": 5}, "is smaller than a block of 501"),
        ({"accelerator": "cuda", "max_steps": 5}, "no CUDA device"),
        ({"init_from": "missing.safetensors", "max_steps": 5}, "missing.safetensors"),
        ({"max_steps": 5, "min_lr": 1.0}, "0 <= min_lr <= learning_rate"),
        ({"max_steps": 5, "activation_checkpointing": "some"}, "expected false, true, selective"),
        ({"max_steps": 5, "loss_weight": "mse"}, "--loss_weight mse: expected elbo, cross_entropy"),
        ({"max_steps": 5, "row_lengths": "12:3"}, "--row_lengths 12:3: does not divide rows of 32 tokens"),
        (
            {"max_steps": 30, "learning_rate": 1e30, "grad_clip": 0, "save_interval": 1},
            "not finite, stopped before the update",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_code_2(folder, flags, expected):
    out, err = run_pretraining("train_mdm.py", folder, code=2, **flags)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and expected in lines[0], err
    assert "Traceback" not in err


def test_a_batch_that_does_not_split_is_one_line_for_all_processes(folder):
    _, err = run_pretraining_process("train_mdm.py", folder, code=2, max_steps=5, devices=3)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "the nearest that do are 6 or 9" in lines[0], err
    assert "Traceback" not in err


def test_a_name_that_another_run_holds_is_refused_before_the_first_step(folder):
    run_pretraining("train_ar.py", folder, max_steps=5)
    _, err = run_pretraining("train_ar.py", folder, code=2, max_steps=5, out_dir="elsewhere")
    assert "--overwrite" in err
    assert not list(folder.glob("elsewhere/*/iter-*"))
    run_pretraining("train_ar.py", folder, max_steps=5, out_dir="elsewhere", overwrite="true")


def test_a_second_writer_is_kept_out(folder):
    first = start_pretraining("train_ar.py", folder, max_steps=3000, val_samples=0)
    for line in first.stdout:
        if "step 10:" in line:
            break
    _, err = run_pretraining("train_ar.py", folder, code=2, max_steps=3000, val_samples=0)
    first.kill()
    first.communicate()
    assert "is in use by process" in err


def test_the_log_goes_on_in_the_same_file(folder):
    process = start_pretraining("train_ar.py", folder, max_steps=60, save_interval=10, log_interval=1)
    for line in process.stdout:
        if "step 25:" in line:
            break
    process.kill()
    process.communicate()
    time.sleep(0.2)
    run_pretraining("train_ar.py", folder, max_steps=60, save_interval=10, log_interval=1)
    steps = [int(row["step"]) for row in read_metrics(folder) if row["metric/train_loss"]]
    assert steps == list(range(1, 61))


def test_tensorboard_gets_the_metrics_when_asked(folder):
    run_pretraining("train_ar.py", folder, max_steps=10, logger="csv,tensorboard", precision="bf16-mixed")
    assert read_losses(folder)[10] > 0
    assert list(folder.glob("out/*/version_0/tensorboard/**/events.out.tfevents.*"))


def test_training_without_validation_data_says_so(folder):
    for path in (folder / "data").glob("validation*"):
        path.unlink()
    out, _ = run_pretraining("train_ar.py", folder, max_steps=5)
    assert "no validation* files" in out


def test_a_precision_that_cannot_train_is_refused(folder, monkeypatch):
    _, err = run_pretraining("train_mdm.py", folder, code=2, max_steps=5, precision="16-mixed")
    assert "--precision 16-mixed: expected auto, bf16-mixed, bf16-true, 32-true" in err
    monkeypatch.setenv("LT_CLI_USED", "1")
    monkeypatch.setenv("LT_PRECISION", "64-true")
    _, err = run_pretraining("train_mdm.py", folder, code=2, max_steps=5, precision="auto")
    assert "--precision 64-true: expected auto, bf16-mixed, bf16-true, 32-true" in err
    assert err.count("\n") == 1


def test_bf16_is_computed_in_whatever_the_number_of_devices(tmp_path_factory):
    """bf16-mixed rounds where 32-true does not, and as much on one device, which Fabric does not wrap, as on two."""
    curves = {}
    for precision, devices in (("32-true", 1), ("bf16-mixed", 1), ("bf16-mixed", 2)):
        place = tmp_path_factory.mktemp(precision)
        make_packed_data(place / "data")
        flags = {"max_steps": 5, "log_interval": 1, "precision": precision, "accelerator": "cpu", "devices": devices}
        (run_pretraining if devices == 1 else run_pretraining_process)("train_mdm.py", place, **flags)
        curves[precision, devices] = [*read_losses(place).values(), *read_losses(place, "metric/val_loss").values()]
    exact, one, two = curves.values()
    assert len(exact) == 6
    for curve in (one, two):
        differences = [abs(rounded - true) for rounded, true in zip(curve, exact, strict=True)]
        assert min(differences) > 0 and max(differences) < 0.02, differences
