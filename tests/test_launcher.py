"""`lightning run model` with real scripts in real processes: hand-over, exit codes, one-line errors, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_gpt.launcher import LauncherOptions, _code_of, fabric_options, split_command_line

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = [sys.executable, "-m", "lit_gpt.launcher"]
TIMEOUT_S = 240

# Needs no torch, so that starting it costs nothing: what a script can see of its launch.
PLAIN = """\
import json, os, sys
print(json.dumps([os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LT_DEVICES"], sys.argv[1:]]), flush=True)
print("error: a line of the script's own", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
FABRIC = """\
import sys
import torch
from lightning_fabric import Fabric
fabric = Fabric(accelerator="cpu")
total = fabric.all_reduce(torch.tensor(fabric.global_rank + 1.0), reduce_op="sum")
open(f"rank{fabric.global_rank}", "w").write(f"{fabric.world_size} {float(total)} {fabric.strategy.__class__.__name__}")
fabric.barrier()
# As every script of ours ends: torch may abort a process that exits beside a live process group.
from lit_gpt.cli import leave
if fabric.global_rank == 1:
    print("error: a line of the script's own", file=sys.stderr)
    leave(int(sys.argv[1]))
leave(0)
"""
# Saves for a second after a signal, as a training run does.
SAVES = """\
import os, signal, sys, time
received = []
signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
open("ready" + os.environ["RANK"], "w").close()
while not received:
    time.sleep(0.02)
time.sleep(1)
open("saved" + os.environ["RANK"], "w").write(str(len(received)))
sys.exit(128 + received[0])
"""


def environment() -> dict[str, str]:
    """Without what a launcher around the tests may have set."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LT_", "PET_", "TORCHELASTIC_"))}
    return {**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the launcher to its end in `folder`."""
    return subprocess.run(
        [*LAUNCHER, *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S
    )


def script(folder: Path, text: str) -> str:
    """Write a script; returns its name."""
    (folder / "script.py").write_text(text)
    return "script.py"


# --- in real processes ------------------------------------------------------------------------------------------------


def test_arguments_code_and_error_line_are_the_scripts(tmp_path):
    theirs = ["2", "--devices", "5", "--n", "3", "--nnodes=2", "--precision=x", "--help", "--", "-m"]
    done = launch(tmp_path, "run", "model", "--accelerator=cpu", "--devices=1", script(tmp_path, PLAIN), *theirs)
    assert done.returncode == 2
    assert done.stderr == "error: a line of the script's own\n"
    assert json.loads(done.stdout) == ["0", "1", "1", theirs]


def test_two_processes_meet_and_the_failing_one_decides(tmp_path):
    done = launch(tmp_path, "run", "model", "--accelerator", "cpu", "--devices", "2", script(tmp_path, FABRIC), "3")
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["2 3.0 DDPStrategy"] * 2
    assert done.returncode == 3, done.stderr
    assert done.stderr.endswith("error: a line of the script's own\n") and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_every_process_save(tmp_path, number):
    # Where the tests run in the background of a shell, Ctrl-C is ignored, and would be below them too.
    heard = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); from lit_gpt.launcher import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", heard, "run", "model", "--accelerator=cpu", "--devices=2", script(tmp_path, SAVES)],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    time.sleep(0.3)
    # A scheduler that repeats itself.
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + number
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    expected = "\nstopping when the processes have saved (Ctrl-C again: at once)\n" if number == signal.SIGINT else ""
    assert err == expected


def test_waiting_for_another_machine_can_be_stopped(tmp_path):
    # The first of two machines takes the second's call and never answers.
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        options = ["--accelerator=cpu", "--num-nodes=2", "--node-rank=1", f"--main-port={port}"]
        process = subprocess.Popen(
            [*LAUNCHER, "run", "model", *options, script(tmp_path, PLAIN)],
            cwd=tmp_path,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        first.settimeout(TIMEOUT_S)
        call, _ = first.accept()
        with call:
            process.terminate()
            err = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in err


def test_mistakes_are_one_line_and_code_2(tmp_path):
    done = launch(tmp_path, "run", "model", "--accelerator=cpu", "--strategy=magic", script(tmp_path, PLAIN))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: lightning run model: ") and "magic" in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_is_quick_and_complete(tmp_path):
    done = launch(tmp_path, "run", "model", "--help")
    assert done.returncode == 0
    for name in vars(LauncherOptions()):
        assert f"--{name.replace('_', '-')} " in done.stdout


# --- the command line -------------------------------------------------------------------------------------------------


def documented(tmp_path: Path, *options: str) -> tuple[LauncherOptions, str, list[str]]:
    """Parse a command line of the published form."""
    path = tmp_path / "train_mdm.py"
    path.touch()
    options_, found, rest = split_command_line(
        ["run", "model", *options, str(path), "--model", "170", "--flops", "10."]
    )
    assert found == str(path)
    return options_, found, rest


def test_published_commands(tmp_path):
    options, _, rest = documented(tmp_path, "--node-rank=0", "--accelerator=cuda", "--devices=8", "--num-nodes=1")
    assert options == LauncherOptions(accelerator="cuda", devices="8", num_nodes="1", node_rank="0")
    assert rest == ["--model", "170", "--flops", "10."]
    options, _, _ = documented(
        tmp_path, "--node-rank=1", "--main-address=node0", "--accelerator=cuda", "--devices=8", "--num-nodes=2"
    )
    assert options == LauncherOptions(
        accelerator="cuda", devices="8", num_nodes="2", node_rank="1", main_address="node0"
    )


def test_spellings(tmp_path):
    with_equals, _, _ = documented(tmp_path, "--node_rank=1", "--num_nodes=2", "--main_port=7", "--main_address=h")
    apart, _, _ = documented(
        tmp_path, "--node-rank", "1", "--num-nodes", "2", "--main-port", "7", "--main-address", "h", "--"
    )
    assert with_equals == apart == LauncherOptions(node_rank="1", num_nodes="2", main_port="7", main_address="h")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["start"], "lightning start: the only command is `lightning run model"),
        (["run", "x.py"], "lightning run x.py: the only command is"),
        (["run", "model"], "no script given"),
        (["run", "model", "--devices=1"], "no script given"),
        (["run", "model", "nowhere.py"], "script nowhere.py not found"),
        (["run", "model", "--main-address=", "x.py"], "--main-address has no value"),
        (["run", "model", "--node-rank", "--devices=2", "x.py"], "--node-rank has no value"),
        (["run", "model", "--dev=1", "x.py"], "unknown option --dev before the script; known are --accelerator,"),
    ],
)
def test_wrong_command_lines(arguments, message):
    with pytest.raises(ValueError) as caught:
        split_command_line(arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LauncherOptions(accelerator="tpu"), "--accelerator tpu is unknown: choose from auto, cpu, cuda, gpu"),
        (LauncherOptions(accelerator="cpu", devices="0"), "--devices 0: expected a whole number of at least 1"),
        (LauncherOptions(accelerator="cpu", devices="two"), "--devices two: expected a whole number"),
        (
            LauncherOptions(accelerator="cpu", devices="0,1"),
            "--devices 0,1: a list takes different numbers of CUDA devices",
        ),
        (LauncherOptions(accelerator="cpu", node_rank="1"), "--node-rank 1: expected less than --num-nodes 1"),
        (LauncherOptions(accelerator="cpu", num_nodes="x"), "--num-nodes x: expected a whole number"),
        (LauncherOptions(accelerator="cpu", main_port="http"), "--main-port http: expected a whole number"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError) as caught:
        fabric_options(options)
    assert message in str(caught.value)


def test_cuda_must_be_there():
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with pytest.raises(ValueError, match=f"has {there} CUDA device" if there else "torch sees no CUDA device here"):
        fabric_options(LauncherOptions(accelerator="cuda", devices=str(there + 1)))


def test_options_for_fabric(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words, environment_ = fabric_options(
        LauncherOptions(
            "cpu", "2", num_nodes="2", node_rank="1", main_address="node0", strategy="ddp", precision="32-true"
        )
    )
    assert words == [
        "--devices=2", "--num-nodes=2", "--node-rank=1", "--main-address=node0", "--main-port=29400",
        "--accelerator=cpu", "--strategy=ddp", "--precision=32-true",
    ]  # fmt: skip
    assert int(environment_["OMP_NUM_THREADS"]) >= 1
    # A machine alone does not look for itself elsewhere, and two runs on it must not meet at one port.
    assert "--main-address=127.0.0.1" in fabric_options(LauncherOptions("cpu", main_address="node0"))[0]
    assert (
        fabric_options(LauncherOptions("cpu"))[0][4]
        != fabric_options(LauncherOptions("cpu"))[0][4]
        != "--main-port=29400"
    )


def test_one_code_for_all_processes(capsys):
    term, kill = -signal.SIGTERM, -signal.SIGKILL
    assert _code_of({0: term, 1: 2}) == 2
    assert _code_of({0: 1, 1: 2}) == 2
    assert _code_of({0: term, 1: 1}) == 1
    assert capsys.readouterr().err == ""
    assert _code_of({0: term, 1: kill}) == 137
    # The only failure that no process can report itself.
    assert capsys.readouterr().err == "error: process 1 was ended by SIGKILL; the system does so when memory runs out\n"
    assert _code_of({0: 143, 1: 143}) == 143
    assert _code_of({0: term, 1: 130}) == 130
