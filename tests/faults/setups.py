"""The training runs that are hurt: small, real, started as users start them, with one process and with two.

A run's clock is its log: `metrics.csv` has a row for every step, written at once, so that a moment of a run is a step
and a few milliseconds, whatever the machine does beside it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from tests.support.training_runs import make_packed_data, one_thread_environment, pretraining_command

BIN = Path(sys.executable).parent
STEPS, SAVE_EVERY, VALIDATE_EVERY = 48, 8, 20
# Seconds after which processes give up waiting for one that is stopped. Starting takes them a few seconds more or less.
TIMEOUT_S = 20
# In the environment of all processes of a start, so that none of them is overlooked.
MARK = "SMDM_FAULT"
# Seconds that a start may take, on a busy machine too.
LONGEST_START_S = 240
FLAGS = {
    "max_steps": STEPS, "save_interval": SAVE_EVERY, "log_interval": 1, "val_interval": VALIDATE_EVERY,
    "val_samples": 12, "val_draws": 16, "n_embd": 64, "intermediate_size": 128, "data_dir": "data",
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """How a run is started."""

    launcher: tuple[str, ...]
    """The command's first words, up to the script."""
    flags: dict[str, object] = field(default_factory=dict)
    """Of the script, besides FLAGS."""
    processes: int = 2
    """That train; a launcher is one more."""
    attempts: int = 1
    """How often the launcher starts them; each attempt may say why it ended."""

    @property
    def command(self) -> list[str]:
        """The whole command line; the run's folder is where it is started."""
        return [*self.launcher, *pretraining_command("train_mdm.py", Path(), **{**FLAGS, **self.flags})]


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
LIGHTNING = (str(BIN / "lightning"), "run", "model", "--accelerator=cpu", "--devices=2")
TWO = {"devices": 2}
SHARDED = {"strategy": "fsdp"}
FOLDERS = {"strategy": "fsdp", "shard_checkpoints_gb": 0}
SETUPS = {
    "one": Setup((sys.executable,), processes=1),
    "ddp": Setup((sys.executable,), TWO),
    "fsdp": Setup((sys.executable,), TWO | SHARDED),
    "folders": Setup((sys.executable,), TWO | FOLDERS),
    "torchrun": Setup(TORCHRUN),
    "torchrun-fsdp": Setup(TORCHRUN, SHARDED),
    "torchrun-folders": Setup(TORCHRUN, FOLDERS),
    "torchrun-restarts": Setup((*TORCHRUN, "--max-restarts", "2"), attempts=3),
    "lightning": Setup(LIGHTNING),
}


class Start:
    """A run that was started, once.

    Args:
        setup: how.
        folder: of the run, where it is started.
        mark: tells its processes from all others.
    """

    def __init__(self, setup: Setup, folder: Path, mark: str) -> None:
        self.setup, self.folder, self.mark = setup, folder, mark
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            setup.command,
            cwd=folder,
            env={**one_thread_environment(), "SMDM_TIMEOUT_S": str(TIMEOUT_S), MARK: mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.lines: dict[str, list[str]] = {"out": [], "err": []}
        streams = {"out": self.process.stdout, "err": self.process.stderr}
        self._readers = [
            threading.Thread(target=self._read, args=(name, stream), daemon=True) for name, stream in streams.items()
        ]
        for reader in self._readers:
            reader.start()
        self._known: dict[str, psutil.Process] = {}

    def _read(self, name: str, stream: IO[str]) -> None:
        self.lines[name] += iter(stream.readline, "")

    # --- its processes --------------------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """All that live, whoever their parents are by now."""
        return [one for one in psutil.process_iter() if _environ(one).get(MARK) == self.mark and _lives(one)]

    def find_roles(self) -> dict[str, psutil.Process]:
        """`launcher`, and `rank 0`, `rank 1`, as far as they are there; looked up once they all are."""
        if len(self._known) < self.setup.processes + (len(self.setup.launcher) > 1):
            found = {}
            for one in self.processes():
                if not any(word.endswith("train_mdm.py") for word in _words(one)):
                    continue
                environ = _environ(one)
                rank = environ.get("RANK") or environ.get("LOCAL_RANK")
                if one.pid == self.process.pid:
                    name = "launcher" if len(self.setup.launcher) > 1 else "rank 0"
                elif rank is None:
                    continue
                else:
                    name = f"rank {rank}"
                found[name] = one
            self._known = found
        return self._known

    def signal_all(self, number: int) -> None:
        """Send a signal to every process."""
        for one in self.processes():
            send(one, number)

    def wait(self) -> str | None:
        """Wait until all processes have ended; what is wrong with their end, if anything.

        The launcher's children may live for a moment longer than it.
        """
        try:
            self.process.wait(LONGEST_START_S)
        except subprocess.TimeoutExpired:
            self.end()
            return f"hangs: no end after {LONGEST_START_S} s"
        deadline = time.monotonic() + 15
        while left := self.processes():
            if time.monotonic() > deadline:
                names = "; ".join(f"{' '.join(_words(one))[:120]} ({one.status()})" for one in left)
                self.end()
                return f"processes left behind: {names}"
            time.sleep(0.05)
        for reader in self._readers:
            reader.join(10)
        return None

    def end(self) -> None:
        """Kill whatever is left."""
        self.signal_all(signal.SIGKILL)
        self.process.wait()

    # --- its clock ------------------------------------------------------------------------------------------------

    def last_step(self) -> int:
        """The newest step in the log; 0 before the first."""
        for path in self.folder.glob("out/*/version_*/metrics.csv"):
            rows = path.read_bytes().split(b"\n")[1:-1]
            if rows and (first := rows[-1].split(b",")[0]).isdigit():
                return int(first)
        return 0

    def temporary(self, below: str) -> bool:
        """Whether a file is being written below `workdir` or `models`."""
        return any((self.folder / below).glob("**/*.tmp"))


def end_all(folder: str) -> None:
    """Kill the processes of all starts below a folder."""
    for one in psutil.process_iter():
        if folder in _environ(one).get(MARK, ""):
            send(one, signal.SIGKILL)


def send(process: psutil.Process, number: int) -> None:
    """Signal a process, which may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)


def make_folder(folder: Path) -> Path:
    """The data of a run, in its folder."""
    make_packed_data(folder / "data")
    return folder


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.Error, OSError):
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
