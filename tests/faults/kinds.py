"""What is done to a run: at which moment, and what.

A kind strikes a running start, and afterwards, when all of its processes have ended, may damage what they left. Every
choice is drawn from one generator, so that a fault is known by the seed and its number.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.setups import SAVE_EVERY, SETUPS, STEPS, TIMEOUT_S, VALIDATE_EVERY, Start, send

# Room for a run's checkpoints, with its data; small enough to be filled at once.
DISK_BYTES = 24 << 20
# A checkpoint's size, about: a disk or a file ends somewhere within it.
CHECKPOINT_BYTES = 1_100_000
# Seconds from a start to its first step, about; more on a busy machine.
STARTING_S = 9.0


@dataclass
class Struck:
    """What was done."""

    what: str
    """In words, for the report."""
    undo: Callable[[], object] | None = None
    """Called when the start has ended."""


def wait_for_moment(start: Start, chance: random.Random, before_save: bool = False) -> str | None:
    """Wait for a random moment of a start.

    Args:
        start: of a run.
        chance: decides the moment.
        before_save: only one that a save is sure to follow; files on a small disk are written too fast to be met.

    Returns:
        Its name; None when the start ended before.
    """
    phases = ["starting", "training", "training", "validating", "saving", "saving", "finishing"]
    phase = chance.choice(phases[:3] if before_save else phases)
    pause = chance.random()
    if phase == "starting":
        seconds, pause = pause * STARTING_S, 0.0
        moment = time.monotonic() + seconds
        # Where a save must follow, not after the first step: a quick run could be past its last save by then.
        name, reached = (
            f"after {seconds:.2f} s",
            lambda: time.monotonic() >= moment or (before_save and start.last_step() >= 1),
        )
    elif phase == "training":
        step = chance.randrange(1, STEPS - 2 * SAVE_EVERY if before_save else STEPS)
        pause *= 0.05
        name, reached = f"training, step {step}", lambda: start.last_step() >= step
    elif phase == "validating":
        step = chance.choice([*range(VALIDATE_EVERY, STEPS, VALIDATE_EVERY), STEPS])
        pause *= 0.3
        name, reached = f"validating after step {step}", lambda: start.last_step() >= step
    elif phase == "saving":
        step = chance.randrange(SAVE_EVERY, STEPS + 1, SAVE_EVERY)
        pause *= 0.008
        name, reached = f"saving step {step}", lambda: start.last_step() >= step and start.temporary("workdir")
    else:
        pause *= 0.02
        name, reached = "exporting", lambda: start.last_step() >= STEPS and start.temporary("models")
    deadline = time.monotonic() + 120
    while reached is not None and not reached():
        if start.process.poll() is not None or time.monotonic() > deadline:
            return None
        if start.last_step() and not before_save:
            start.find_roles()  # now, while there is time
        time.sleep(0.0005)
    time.sleep(pause)
    return name if start.process.poll() is None else None


# --- strikes ------------------------------------------------------------------------------------------------------


def kill(start: Start, chance: random.Random) -> Struck:
    """Kill one process, or all, without warning."""
    name = _choose(start, chance, "all")
    _signal(start, name, signal.SIGKILL)
    return Struck(f"kill {name}")


def stop(start: Start, chance: random.Random) -> Struck:
    """Stop a process for longer than the others wait for it; if the run has not ended by then, let it go on."""
    name = _choose(start, chance)
    seconds = TIMEOUT_S + 10 + 5 * chance.random()
    _signal(start, name, signal.SIGSTOP)
    end = time.monotonic() + seconds
    # A stopped process whose run has ended must not be left behind.
    while time.monotonic() < end and start.process.poll() is None:
        time.sleep(0.1)
    if start.process.poll() is None:
        _signal(start, name, signal.SIGCONT)
    return Struck(f"stop {name} for {seconds:.0f} s")


def preempt(start: Start, chance: random.Random) -> Struck:
    """SIGTERM as schedulers send it: to one process or all, once or twice, perhaps with SIGKILL to follow."""
    name = chance.choice(["all", "all", "first", _choose(start, chance)])
    times, killed, grace = chance.choice([1, 1, 2]), chance.random() < 0.4, 3 * chance.random() ** 2
    for count in range(times):
        if count:
            time.sleep(0.3 * chance.random())
        _signal(start, name, signal.SIGTERM)
    words = f"SIGTERM to {name}" + (", twice" if times > 1 else "")
    if killed:
        time.sleep(grace)
        start.signal_all(signal.SIGKILL)
        words += f", SIGKILL after {grace:.1f} s"
    return Struck(words)


def fill_disk(start: Start, chance: random.Random) -> Struck:
    """Fill the file system that holds the run, but for a random rest."""
    rest = int(CHECKPOINT_BYTES * chance.random() ** 2)
    filler = start.folder / "filler"
    with filler.open("wb") as file:
        free = os.statvfs(start.folder).f_bavail * os.statvfs(start.folder).f_frsize
        with contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(1, free - rest))
    return Struck(f"full disk, {rest} bytes left", filler.unlink)


def limit_files(start: Start, chance: random.Random) -> Struck:
    """From now on, no file may grow beyond a random size: what a quota does."""
    size = int(CHECKPOINT_BYTES * chance.random() ** 2)
    for one in start.processes():
        with contextlib.suppress(ProcessLookupError):
            hard = resource.prlimit(one.pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (size, hard))
    return Struck(f"no file above {size} bytes")


def _choose(start: Start, chance: random.Random, *more: str) -> str:
    """A process by its role."""
    return chance.choice([*sorted(start.find_roles()), *more] or ["all"])


def _signal(start: Start, name: str, number: int) -> None:
    if name == "all":
        start.signal_all(number)
    elif name == "first":
        start.process.send_signal(number)
    else:
        send(start.find_roles()[name], number)


# --- damage to what a killed run left -----------------------------------------------------------------------------


def damage(folder: Path, chance: random.Random) -> tuple[str, Path, bytes] | None:
    """Truncate a file of the run, or flip bits in it: the newest checkpoint, its marker, or run.json.

    Returns:
        What was done, the file, and its contents before; None where there is no such file yet.
    """
    weights = ("iter-*-ckpt.pth", "iter-*-ckpt/*.safetensors")
    patterns = chance.choice([weights, weights, ("iter-*-ckpt.json", "iter-*-ckpt/checkpoint.json"), ("run.json",)])
    files = sorted(path for pattern in patterns for path in folder.glob(f"workdir/*/*/{pattern}"))
    truncates, share = chance.random() < 0.4, chance.random()
    flips = [(chance.random(), chance.randrange(8)) for _ in range(chance.choice([1, 1, 2, 8]))]
    if not files:
        return None
    whole = files[-1].read_bytes()
    if truncates:
        size = int(len(whole) * share)
        files[-1].write_bytes(whole[:size])
        return f"{files[-1].name} cut to {size} of {len(whole)} bytes", files[-1], whole
    content = bytearray(whole)
    for place, bit in flips:
        content[int(place * len(content))] ^= 1 << bit
    files[-1].write_bytes(content)
    return f"{len(flips)} bit(s) flipped in {files[-1].name}", files[-1], whole


# --- the kinds ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    strike: Callable[[Start, random.Random], Struck]
    share: int
    """Of 20 faults."""
    damages: bool = False
    """Whether what is left is damaged, too."""
    fails_saves: bool = False
    """Whether the next save must fail, which ends the start with an error."""
    setups: tuple[str, ...] = ()
    """Where it makes sense; empty means everywhere."""


KINDS = {
    "kill": Kind(kill, 6),
    "preempt": Kind(preempt, 5),
    "damage": Kind(kill, 4, damages=True),
    "disk": Kind(fill_disk, 2, fails_saves=True),
    "quota": Kind(limit_files, 1, fails_saves=True),
    "stop": Kind(stop, 2, setups=tuple(name for name, setup in SETUPS.items() if setup.processes > 1)),
}


@contextlib.contextmanager
def small_disk(folder: Path):
    """Mount a small file system at a folder; yields whether that is permitted."""
    mount = shutil.which("mount")
    command = [mount or "false", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
