"""The processes of a run as a launcher started them: torchrun, `fabric run`, `lightning run model`, or Slurm's srun.

torchrun says who a process is by RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE, srun by variables of its own, which are
put into torchrun's here, so that everything else (torch.distributed, Lightning) reads one spelling.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

# A day: one process's share of an evaluation may take hours longer than another's.
EVALUATION_TIMEOUT_S = 24 * 3600
# Where srun's tasks meet: this port and the last four digits of the job's number, as Lightning has it, so that two jobs
# on a machine seldom take the same one.
_LEAST_PORT = 15000
# torch's and Lightning's own default.
_TRAINING_TIMEOUT_S = "1800"
# Exit codes with which a process ends after it has said why: an error (2: the user's) or, from Python itself, a traceback.
_TOLD_CODES = (1, 2)
# How long a process other than the first waits before it reports an error of its own.
_OTHERS_WAIT_S = 3.0

# Processes of this run that this one has started.
_started: list[int] = []


@dataclass(frozen=True)
class LaunchedWorld:
    """What a launcher has started."""

    launcher: str
    """`torchrun` (or another that sets its variables) or `srun`."""
    rank: int
    """This process's number among all."""
    size: int
    """All processes."""
    local_size: int
    """Those on this machine; every machine has as many."""

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.size // self.local_size


def launched_world() -> LaunchedWorld | None:
    """The world that a launcher has set up around this process; None where there is none.

    Where srun set it up, torchrun's variables are added to the environment.

    Raises:
        ValueError: the variables contradict each other, or the machines have different numbers of processes.
    """
    launcher = "torchrun" if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() else "srun"
    if launcher == "srun":
        if not _started_by_srun():
            return None
        _translate_srun()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not all(value.isdigit() for value in given.values()):
        raise ValueError(f"the launcher's variables are no numbers: {given}")
    rank, local_rank, size = (int(given[name]) for name in names[:3])
    local_size = int(given.get("LOCAL_WORLD_SIZE", size))
    if not rank < size or not local_rank < local_size <= size:
        raise ValueError(f"the launcher's variables contradict each other: {given}")
    if size % local_size:
        raise ValueError(f"{size} processes, {local_size} of them on this machine: start as many on every machine")
    return LaunchedWorld(launcher, rank, size, local_size)


def training_timeout() -> datetime.timedelta:
    """How long a run's processes wait for one that does not answer: SMDM_TIMEOUT_S in the environment, or half an hour.

    Raises:
        ValueError: the variable is no number of seconds.
    """
    text = os.environ.get("SMDM_TIMEOUT_S", _TRAINING_TIMEOUT_S)
    if not re.fullmatch(r"[1-9]\d{0,7}", text):
        raise ValueError(
            f"the environment's SMDM_TIMEOUT_S is {text[:20]!r}: expected whole seconds, such as {_TRAINING_TIMEOUT_S}"
        )
    return datetime.timedelta(seconds=int(text))


def launch_name() -> str | None:
    """What stays the same when the launcher starts its processes again: Slurm's job, or torchrun's agent; None without."""
    if "SLURM_JOB_ID" in os.environ:
        return f"slurm job {os.environ['SLURM_JOB_ID']}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun on {socket.gethostname()}, process {os.getppid()}"
    return None


def connect_after_restart(backend: str) -> None:
    """Connect processes that torchrun has started again; at their first start nothing happens.

    Its store is shared by all starts and still holds the addresses of processes that are gone: keys of its own for each.
    """
    from torch import distributed

    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if count == "0" or int(os.environ["WORLD_SIZE"]) == 1 or distributed.is_initialized():
        return
    store = distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    distributed.init_process_group(
        backend,
        timeout=training_timeout(),
        store=distributed.PrefixStore(f"start_{count}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def is_restart() -> bool:
    """Whether the launcher has started these processes before: `torchrun --max-restarts`, `sbatch --requeue`."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count.isdigit() and int(count) > 0 for count in counts)


def _started_by_srun() -> bool:
    """Whether this is one of several tasks that srun started; sbatch's own script looks like task 0 of a step."""
    if "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ:
        return False
    return {"SLURM_PROCID", "SLURM_LOCALID"} <= os.environ.keys() and _slurm_tasks() not in ("", "1")


def _slurm_tasks() -> str:
    """Tasks of the step, as text; the job may have more."""
    return os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "")


def _translate_srun() -> None:
    """Say in torchrun's variables what srun said in its own."""
    from lightning_fabric.plugins.environments import SLURMEnvironment

    environ = os.environ
    tasks = _slurm_tasks()
    nodes = environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES", "1")
    if not tasks.isdigit() or not nodes.isdigit() or not int(nodes) or int(tasks) % int(nodes):
        raise ValueError(
            f"srun started {tasks} tasks on {nodes} nodes: start as many on every node, such as --ntasks-per-node=8"
        )
    environ["WORLD_SIZE"], environ["LOCAL_WORLD_SIZE"] = tasks, str(int(tasks) // int(nodes))
    environ["RANK"], environ["LOCAL_RANK"] = environ["SLURM_PROCID"], environ["SLURM_LOCALID"]
    environ["GROUP_RANK"] = environ.get("SLURM_NODEID", "0")
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "127.0.0.1")
    environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(hosts))
    job = environ.get("SLURM_JOB_ID", "")
    environ.setdefault("MASTER_PORT", str(_LEAST_PORT + int(job[-4:]) if job.isdigit() else _LEAST_PORT))


def lost_a_process(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process; gloo says so in words only, by the place in its source."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return False
    return isinstance(error, distributed.DistError) or "gloo/transport/" in str(error)


def process_rank() -> int:
    """This process's number in a distributed run."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if os.environ.get(name, "").isdigit()), 0))


def speaks_for_run() -> bool:
    """Whether this process reports an error: the first one does, unless another has; another only if it fails alone.

    When all fail alike, the first one's end ends the others (its launcher stops them, or they are its children) while
    they wait here. One that reports found the first one stopped, or waiting for something else.
    """
    if process_rank() == 0:
        return not any(_has_told(process) for process in _started)
    parent = os.getppid()
    time.sleep(_OTHERS_WAIT_S)
    return os.getppid() == parent


def note_started(process_ids: Iterable[int]) -> None:
    """Remember processes of this run that this one has started."""
    _started.extend(process_ids)


def _has_told(process_id: int) -> bool:
    """Whether a child has ended with an error of its own."""
    try:
        # The end stays there for whoever waits for it.
        end = os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return end is not None and end.si_code == os.CLD_EXITED and end.si_status in _TOLD_CODES


def end_with_parent() -> None:
    """From now on, end a process that a launcher has started as soon as the launcher is gone, however that ended.

    Called before anything slow: while processes start and look for each other nothing else would end them for half an hour.
    """
    if "LOCAL_RANK" in os.environ:
        threading.Thread(target=_await_another_parent, args=(os.getppid(),), daemon=True).start()


def _await_another_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def end_children() -> None:
    """Kill the processes that this one has started; they end with it anyhow, but for one that hangs or is stopped."""
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
