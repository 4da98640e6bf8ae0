"""Runs that launchers start again, or on two nodes: they go on as one run, and end with the weights of an unbroken one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.training_runs import (
    ROOT,
    assert_same_run,
    make_packed_data,
    one_thread_environment,
    pretraining_command,
    read_losses,
    run_pretraining,
    run_pretraining_process,
)

BIN = Path(sys.executable).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
FLAGS = {"max_steps": 150, "save_interval": 20, "val_samples": 0, "log_interval": 5}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run of two processes that nothing happens to."""
    whole = tmp_path_factory.mktemp("whole")
    make_packed_data(whole / "data")
    run_pretraining_process("train_mdm.py", whole, **FLAGS, devices=2)
    return whole


def start(command, folder, **environment):
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**one_thread_environment(), "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("rank", "resume"),
    [("1", {}), ("0", {"resume": "never", "overwrite": "true"})],
    ids=["second, auto", "first, never"],
)
def test_torchrun_restarts_into_the_same_run(folder, unbroken, rank, resume):
    """A process is killed once; the others and it are started again and go on, whatever --resume said at first."""
    if resume:
        run_pretraining_process("train_mdm.py", folder, max_steps=150, val_samples=0, save_interval=60)
        shutil.rmtree(folder / "out")
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "--max-restarts", "2"]
    process = start([*command, *pretraining_command("train_mdm.py", folder, **FLAGS, **resume)], folder)
    assert any("step 50:" in line for line in process.stdout), process.stderr.read()
    workers = psutil.Process(process.pid).children()
    (victim,) = [one for one in workers if one.environ().get("RANK") == rank]
    victim.kill()
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    resumed = next(line for line in out.splitlines() if line.startswith("resumed at step "))
    assert int(resumed.split()[3]) >= 40
    assert not [one for one in workers if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert_same_run(unbroken, folder)


# srun's part of Slurm: two tasks with its variables, which get its signals; the largest code is its own.
SRUN = """#!{python}
import os, signal, subprocess, sys
def variables(rank):
    return {{"SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2",
             "SLURM_NODEID": "0", "SLURM_NNODES": "1", "MASTER_ADDR": "127.0.0.1"}}
assert sys.argv[1] == "--kill-on-bad-exit=1"
tasks = [subprocess.Popen(sys.argv[2:], env=os.environ | variables(rank)) for rank in range(2)]
signal.signal(signal.SIGTERM, lambda number, frame: [task.terminate() for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""


def test_a_slurm_job_is_queued_again_and_goes_on(folder, unbroken):
    """Slurm's two commands are played: srun starts tasks, scontrol notes what it is asked."""
    commands = folder / "bin"
    commands.mkdir()
    (commands / "srun").write_text(SRUN.format(python=sys.executable))
    (commands / "scontrol").write_text('#!/bin/sh\necho "$@" >> asked\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    job = ["bash", str(ROOT / "scripts/slurm_train.sh"), *pretraining_command("train_mdm.py", folder, **FLAGS)]
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "SMDM_VENV": str(BIN.parent), "SLURM_JOB_ID": "4711"}
    process = start(job, folder, **environment)
    assert any("step 50:" in line for line in process.stdout), process.stderr.read()
    (srun,) = psutil.Process(process.pid).children()
    srun.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM and "and saved" in err, err
    assert (folder / "asked").read_text() == "requeue 4711\n"
    process = start(job, folder, **environment, SLURM_RESTART_COUNT="1")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and "resumed at step" in out, err
    assert_same_run(unbroken, folder)
    process = start([*job, "--learning_rate=-1"], folder, **environment)
    assert process.wait(100) == 2
    assert (folder / "asked").read_text() == "requeue 4711\n"


@pytest.fixture
def nodes():
    """Two network namespaces with a cable between them, as commands' first words."""
    names = [f"smdm{os.getpid()}{letter}" for letter in "ab"]
    made = []

    def ip(*words):
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no network namespaces here: {done.stderr.strip()}")

    if not shutil.which("ip"):
        pytest.skip("no network namespaces here: the command ip (iproute2) is missing")
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ends = [["name", "cable0", "netns", name] for name in names]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for number, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "cable0")
            for device in ("lo", "cable0"):
                ip("-n", name, "link", "set", device, "up")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=True)


LAUNCHERS = {
    "lightning": [str(BIN / "lightning"), "run", "model", "--accelerator=cpu", "--devices=1", "--num-nodes=2"],
    "fabric": [str(BIN / "fabric"), "run", "--accelerator=cpu", "--devices=1", "--num-nodes=2"],
    "torchrun": [*TORCHRUN, "--nproc_per_node=1", "--nnodes=2", "--master_addr=10.77.0.1", "--master_port=29400"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_nodes_are_one_run(folder, tmp_path_factory, nodes, launcher):
    single = tmp_path_factory.mktemp("single")
    make_packed_data(single / "data")
    flags = FLAGS | {"max_steps": 30}
    run_pretraining("train_mdm.py", single, **flags)
    script = pretraining_command("train_mdm.py", folder, **flags)
    started = []
    for rank, node in enumerate(nodes):
        rank_words = (
            [f"--node_rank={rank}"] if launcher == "torchrun" else [f"--node-rank={rank}", "--main-address=10.77.0.1"]
        )
        # gloo looks for a network by the machine's name, which both nodes share here.
        started.append(start([*node, *LAUNCHERS[launcher], *rank_words, *script], folder, GLOO_SOCKET_IFNAME="cable0"))
    results = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0, 0], results
    assert "device: 2 x cpu" in results[0][0] and "device:" not in results[1][0]
    assert read_losses(folder) == pytest.approx(read_losses(single), rel=1e-5)
