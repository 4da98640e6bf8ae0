"""The world that a launcher sets up is taken, by training and evaluation: torchrun's for real, srun's by its variables."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch

from lit_gpt import devices, processes
from lit_gpt.training import strategies
from tests.support.training_runs import (
    ROOT,
    final_state,
    make_packed_data,
    one_thread_environment,
    pretraining_command,
    read_losses,
    run_pretraining,
)

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4",
    "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_NODELIST": "node[07-08]",
}  # fmt: skip


@pytest.fixture
def environ(monkeypatch):
    """The environment, for changes that end with the test; no launcher's."""
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if not key.startswith("SLURM")})
    return os.environ


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_who_a_process_is(environ):
    assert processes.launched_world() is None
    assert devices.join_processes() == (0, 1)
    environ.update(TORCHRUN)
    world = processes.launched_world()
    assert world == processes.LaunchedWorld("torchrun", rank=3, size=4, local_size=2) and world.nodes == 2


def test_sruns_words_are_translated(environ):
    environ.update(SRUN)
    assert processes.launched_world() == processes.LaunchedWorld("srun", rank=3, size=4, local_size=2)
    assert {name: environ[name] for name in (*TORCHRUN, "GROUP_RANK")} == {**TORCHRUN, "GROUP_RANK": "1"}
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("node07", "18456")


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_ID": None},
        {"SLURM_NTASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": None},
    ],
    ids=["sbatch's own script", "one task", "one task of a larger job", "salloc's shell"],
)
def test_what_is_no_task_of_several(environ, changes):
    environ.update(SRUN)
    for name, value in changes.items():
        environ.pop(name, None)
        environ.update({name: value} if value else {})
    assert processes.launched_world() is None


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (TORCHRUN | {"RANK": "4"}, "contradict each other"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "contradict each other"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "are no numbers"),
        (TORCHRUN | {"WORLD_SIZE": "5"}, "start as many on every machine"),
        (SRUN | {"SLURM_NTASKS": "5"}, "such as --ntasks-per-node=8"),
    ],
)
def test_a_world_that_cannot_be_is_refused(environ, variables, line):
    environ.update(variables)
    with pytest.raises(ValueError, match=line):
        processes.launched_world()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"devices": 3}, "--devices 3 but torchrun started 2 process(es) on this machine: leave it out"),
        ({"nodes_num": 3}, "--nodes_num 3 but torchrun started 2 node(s): leave it out"),
    ],
)
def test_flags_that_contradict_the_launcher_are_refused(folder, monkeypatch, flags, line):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, "0" if name == "RANK" else value)
    _, err = run_pretraining("train_mdm.py", folder, code=2, max_steps=5, **flags)
    assert err == f"error: {line}\n"


FLAGS = {"max_steps": 12, "log_interval": 1, "val_samples": 0}


def test_torchrun_starts_one_run(folder, tmp_path_factory):
    single = tmp_path_factory.mktemp("single")
    make_packed_data(single / "data")
    run_pretraining("train_mdm.py", single, **FLAGS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += pretraining_command("train_mdm.py", folder, **FLAGS)
    done = subprocess.run(
        command, cwd=folder, env=one_thread_environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("device: 2 x cpu") == 1
    assert read_losses(folder) == pytest.approx(read_losses(single), rel=1e-5)


def two_machines(command, folder):
    """Run a command as two machines of two processes each do, which are both this one."""
    address = ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank)]
            + ["--nproc_per_node", "2", *address, *command],
            cwd=folder,
            env=one_thread_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [agent.communicate(timeout=200)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    return outputs[0]


@pytest.mark.parametrize(
    ("strategy", "steps"),
    [("hybrid", 6), *(pytest.param(name, 50, marks=pytest.mark.slow) for name in ("ddp", "fsdp", "hybrid"))],
)
def test_four_processes_on_two_machines_have_the_losses_of_one(folder, tmp_path_factory, strategy, steps):
    single = tmp_path_factory.mktemp("single")
    make_packed_data(single / "data")
    flags = {**FLAGS, "max_steps": steps, "seed": 2**33 + 5}
    run_pretraining("train_mdm.py", single, **flags)
    assert "device: 4 x cpu" in two_machines(
        pretraining_command("train_mdm.py", folder, **flags, strategy=strategy), folder
    )
    assert read_losses(folder) == pytest.approx(read_losses(single), rel=1e-5)
    one, four = final_state(single), final_state(folder)
    # A sharded optimizer's state is saved under the parameters' names.
    weights = [name for name in one if name.startswith("model.")]
    assert weights == [name for name in four if name.startswith("model.")]
    for name in weights:
        torch.testing.assert_close(four[name], one[name], rtol=1e-3, atol=1e-4)


def start_tasks(command, folder):
    """Two processes with the variables that srun gives its tasks."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "PYTHONPATH": str(ROOT)}
    common = {
        **one_thread_environment(),
        **SRUN,
        **address,
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env={**common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_sruns_tasks_are_one_run(folder):
    tasks = start_tasks(pretraining_command("train_mdm.py", folder, **FLAGS), folder)
    results = [task.communicate(timeout=200) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], results
    assert "device: 2 x cpu" in results[0][0] and results[1][0] == ""
    assert 12 in read_losses(folder)


STARTING = """
import os, subprocess, sys, time
from lit_gpt import cli

def main():
    print(os.getpid(), flush=True)
    time.sleep(60)

if sys.argv[1:] == ["launcher"]:
    subprocess.run([sys.executable, sys.argv[0]], env={**os.environ, "LOCAL_RANK": "1"})
else:
    cli.run(main)
"""


def test_processes_end_with_their_launcher_while_they_still_start(tmp_path):
    """Whatever they are doing then: they look for each other, or read the data, and would wait for half an hour."""
    script = tmp_path / "starting.py"
    script.write_text(STARTING)
    environment = {**one_thread_environment(), "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen(
        [sys.executable, script, "launcher"], env=environment, stdout=subprocess.PIPE, text=True
    )
    process = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    launcher.wait()
    try:
        process.wait(20)
    finally:
        if process.is_running():
            process.kill()


@pytest.fixture
def started(folder, request):
    """A run of two processes by --devices, with a short time-out; nothing is left of it afterwards."""
    flags = FLAGS | {"max_steps": 10**6, "devices": 2} | getattr(request, "param", {})
    command = [sys.executable, *pretraining_command("train_mdm.py", folder, **flags)]
    environment = {**one_thread_environment(), "SMDM_TIMEOUT_S": "15"}  # starting takes several seconds
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
    yield process
    for child in psutil.Process(process.pid).children() if process.poll() is None else ():
        child.kill()
    process.kill()
    process.communicate()


def second_process(first):
    """The process that the first one starts."""
    while not (children := psutil.Process(first.pid).children()):
        assert first.poll() is None
        time.sleep(0.01)
    return children[0]


def test_a_process_that_ends_while_it_starts_is_named(started):
    """Lightning would kill the first process five seconds later, without a word."""
    second_process(started).kill()
    _, err = started.communicate(timeout=100)
    assert (started.returncode, err) == (1, "error: process 1 was ended by SIGKILL while the processes were starting\n")


def test_a_stopped_process_ends_the_run_and_is_not_left_behind(started):
    assert any("step 5:" in line for line in started.stdout)
    second = second_process(started)
    second.suspend()
    _, err = started.communicate(timeout=100)
    assert (
        started.returncode == 1 and err.count("\n") == 1 and "another process of this run has ended, or does not" in err
    )
    second.wait(5)


@pytest.mark.slow
def test_a_stopped_first_process_does_not_tell_again_what_the_second_has_told(started):
    assert any("step 5:" in line for line in started.stdout)
    second, first = second_process(started), psutil.Process(started.pid)
    first.suspend()
    try:
        while second.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.1)
    finally:
        first.resume()
    _, err = started.communicate(timeout=100)
    assert started.returncode == 1 and err.count("\n") == 1 and "another process of this run has ended" in err


@pytest.mark.parametrize(
    "started", [{"strategy": "fsdp", "shard_checkpoints_gb": 0, "save_interval": 1}], indirect=True, ids=["shards"]
)
def test_a_lost_process_is_told_once_where_it_has_a_part_of_the_model(started):
    """What could not be saved without it needs no lines of its own: the error says what the run goes on from."""
    assert any("step 5:" in line for line in started.stdout)
    second_process(started).kill()
    _, err = started.communicate(timeout=100)
    assert started.returncode == 1 and err.count("\n") == 1 and "another process of this run has ended" in err


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("raise SystemExit(1)", True),
        ("raise SystemExit(2)", True),
        ("pass", False),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", False),
        ("raise SystemExit(143)", False),
    ],
)
def test_an_error_that_another_process_has_told_is_not_told_again(monkeypatch, end, told):
    monkeypatch.setattr(processes, "_started", [])
    with subprocess.Popen([sys.executable, "-c", end]) as child:
        processes.note_started([child.pid])
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert processes.speaks_for_run() == (not told)
    assert processes.speaks_for_run()  # nothing is known of it any more


@pytest.mark.parametrize("text", ["", "0", "half an hour", "1e3", "9" * 99])
def test_a_timeout_that_is_none_is_refused(folder, monkeypatch, text):
    monkeypatch.setenv("SMDM_TIMEOUT_S", text)
    with pytest.raises(ValueError, match="SMDM_TIMEOUT_S is .* expected whole seconds"):
        processes.training_timeout()


LATE = """
import datetime, json, sys, time
from unittest import mock
import torch.distributed as dist
from lit_gpt import devices

# torch's own time-out is half an hour, NCCL's ten minutes: here two seconds.
with mock.patch("torch.distributed.distributed_c10d._get_default_timeout", lambda backend: datetime.timedelta(seconds=2)):
    rank, size = devices.join_processes()
    if rank == 1:
        time.sleep(6)
    parts = [None] * size
    dist.all_gather_object(parts, rank)
    print(json.dumps(parts))
dist.destroy_process_group()
"""


def test_evaluation_waits_for_a_late_process(tmp_path):
    tasks = start_tasks(["-c", LATE], tmp_path)
    results = [task.communicate(timeout=100) for task in tasks]
    assert [json.loads(out or "null") for out, _ in results] == [[0, 1], [0, 1]], results


def test_gpus_processes_are_connected_for_both_kinds_of_memory():
    """Counts and texts travel between hosts, whatever the model runs on."""
    import torch

    config = torch.distributed.distributed_c10d.BackendConfig(torch.distributed.Backend(devices.group_backend("cuda")))
    assert config.get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}
    assert devices.group_backend("cpu") == "gloo"
    made = [strategies._strategy(name, "cuda", 2, 1, "32-true") for name in ("ddp", "fsdp", "hybrid")]
    assert [strategy.process_group_backend for strategy in made] == ["cpu:gloo,cuda:nccl"] * 3
