"""`lightning run model [OPTIONS] SCRIPT [ARGS]`: start a training script in one process per device.

The command that users' shell scripts contain. Lightning no longer ships it, so this is an entry point of ours that
hands over to its successor, `fabric run`. Decisions: options are read here, up to the script's path, because `fabric
run` also swallows options that follow the script; a mistake is one line and exit code 2, whether it is made here or in
the script, whose exit code is kept; a signal is handed to the processes once, and they get time to save. Everything
heavy is imported late.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lit_gpt import cli

USAGE = """\
usage: lightning run model [OPTIONS] SCRIPT [ARGS]

Start SCRIPT in one process per device; ARGS go to the script as they stand.

options (before SCRIPT; as --name=VALUE or --name VALUE, with - or _):
  --accelerator NAME   cpu, cuda (or gpu), auto (the default: CUDA where there is some)
  --devices N          processes on this machine: a count, a list of CUDA devices (0,2), or auto for all; default 1
  --num-nodes N        machines in the run, default 1
  --node-rank N        which of them this is, from 0, default 0
  --main-address HOST  address of machine 0, default 127.0.0.1
  --main-port PORT     port of machine 0, default 29400 (on a single machine: one that is free)
  --strategy NAME      left to the script unless given: auto, ddp, fsdp, hybrid
  --precision NAME     left to the script unless given: bf16-mixed, bf16-true, 32-true
  --help               show this text

Plain `python SCRIPT ARGS` and `fabric run OPTIONS SCRIPT ARGS` start the same scripts."""

ACCELERATORS = ("auto", "cpu", "cuda", "gpu")
LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29400
# Seconds that a signalled process gets to write its checkpoint: 12 GB (the 1028M model with its optimizer) at 20 MB/s.
SHUTDOWN_S = 600
# Seconds in which a main thread that runs Python has surely taken notice of a signal.
UNHEARD_S = 2
# The exit code of `timeout`, shells and schedulers for a process that a signal ended is 128 plus the signal.
SIGNAL_BASE = 128


@dataclass
class LauncherOptions:
    """The launcher's options as typed; the fields are the options' names."""

    accelerator: str = "auto"
    """One of ACCELERATORS."""
    devices: str = "1"
    """Count, list of CUDA device numbers, or `auto`."""
    num_nodes: str = "1"
    """Machines."""
    node_rank: str = "0"
    """This machine's number."""
    main_address: str = LOOPBACK
    """Host of machine 0."""
    main_port: str = ""
    """Port of machine 0; empty means chosen here."""
    strategy: str = ""
    """Fabric's name of a strategy; empty leaves it to the script."""
    precision: str = ""
    """Fabric's name of a precision; empty leaves it to the script."""


class _Stop(BaseException):
    """The first signal; not an Exception, so that nothing on the way takes it for an error."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Signals:
    """Turns the first signal into `_Stop`, and stands aside while the processes save.

    The agent below then sends SIGTERM to every process, once, and waits. A second Ctrl-C is handed on (the scripts take
    it as 'stop at once'), a third kills. Repeated SIGTERMs are what schedulers send, and change nothing.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

    def __init__(self) -> None:
        self.interrupts = 0
        self.stopping = False
        # While torch waits for other machines, in C++, no handler of Python's runs: a thread hears the signals too.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._stop_if_unheard, args=(reading,), daemon=True).start()
        for number in self.NUMBERS:
            # A signal that `nohup` or the like had ignored stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        if not self.stopping:
            self.stopping = True
            if number == signal.SIGINT:
                os.write(2, b"\nstopping when the processes have saved (Ctrl-C again: at once)\n")
            raise _Stop(number)
        if number == signal.SIGINT:
            for child in _children():
                _signal_group(child.pid, signal.SIGINT if self.interrupts == 2 else signal.SIGKILL)

    def _stop_if_unheard(self, reading: int) -> None:
        """End this process where the main thread does not answer to a signal; it has no processes to wait for then."""
        while number := os.read(reading, 1):
            if number[0] not in self.NUMBERS or self.stopping:
                continue
            time.sleep(UNHEARD_S)
            if not self.stopping:
                os._exit(_after_signal(number[0]))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; always ends the process, with the script's code or 2 for a mistake in the command.

    Args:
        argv: the arguments after the program's name; None means sys.argv.
    """
    signals = _Signals()
    try:
        command = sys.argv[1:] if argv is None else list(argv)
        if "LT_CLI_USED" in os.environ:
            cli.fail("lightning run model: started inside another launcher; start the script with python there")
        options, script, arguments = split_command_line(command)
        handed_over, environment = fabric_options(options)
        os.environ.update(environment)
        # The first -- ends fabric's options, the second those of torchrun's parser below it, which would take even
        # abbreviations of its own (--n) from behind the script.
        code = _launch([*handed_over, "--", script, "--", *arguments])
    except _Stop as stop:
        code = _after_signal(stop.number)
    except BrokenPipeError:
        code = SIGNAL_BASE + signal.SIGPIPE
    except ValueError as error:
        cli.fail(str(error))
    finally:
        signals.stopping = True
    sys.exit(code)


def split_command_line(argv: Sequence[str]) -> tuple[LauncherOptions, str, list[str]]:
    """Split a command line into the launcher's options, the script, and the script's own arguments.

    Args:
        argv: what follows `lightning`.

    Raises:
        ValueError: an unknown sub-command or option, an option without value, no script.
        SystemExit: after `--help`.
    """
    words = list(argv)
    if not words:
        print(USAGE, file=sys.stderr)
        raise SystemExit(cli.USER_ERROR_CODE)
    if _asks_help(words[0]) or (words[0] == "run" and len(words) > 1 and _asks_help(words[1])):
        _show_help()
    if words[:2] != ["run", "model"]:
        got = " ".join(words[:2])
        raise ValueError(f"lightning {got}: the only command is `lightning run model [OPTIONS] SCRIPT [ARGS]`")
    options, rest = LauncherOptions(), words[2:]
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        if word == "--":
            break
        if _asks_help(word):
            _show_help()
        name, equals, value = word.partition("=")
        field = name[2:].replace("-", "_") if name.startswith("--") else ""
        if field not in vars(options):
            known = ", ".join(f"--{known.replace('_', '-')}" for known in vars(options))
            raise ValueError(f"lightning run model: unknown option {name} before the script; known are {known}")
        if not equals:
            value = rest.pop(0) if rest else ""
        if not value or (not equals and value.startswith("--")):
            raise ValueError(f"lightning run model: {name} has no value (an unset variable?)")
        setattr(options, field, value)
    if not rest:
        raise ValueError("lightning run model: no script given, such as pretrain/train_mdm.py (--help shows the form)")
    script = rest.pop(0)
    if not Path(script).is_file():
        raise ValueError(f"lightning run model: script {script} not found (looked in {Path.cwd()})")
    return options, script, rest


def _asks_help(word: str) -> bool:
    return word in ("--help", "-h")


def _show_help() -> NoReturn:
    print(USAGE, flush=True)
    raise SystemExit(0)


def fabric_options(options: LauncherOptions) -> tuple[list[str], dict[str, str]]:
    """Check the options against this machine and put them into `fabric run`'s words.

    Returns:
        The options for `fabric run`, and what to add to the environment.

    Raises:
        ValueError: a value that is no number, CUDA asked for but absent, more devices asked for than there are.
    """
    nodes = _count("--num-nodes", options.num_nodes, least=1)
    rank = _count("--node-rank", options.node_rank, least=0)
    if rank >= nodes:
        raise ValueError(f"--node-rank {rank}: expected less than --num-nodes {nodes}")
    accelerator, devices, environment = _devices(options.accelerator, options.devices)
    if options.main_port:
        port = _count("--main-port", options.main_port, least=1)
    else:
        port = _free_port() if nodes == 1 else DEFAULT_PORT
    words = [f"--devices={devices}", f"--num-nodes={nodes}", f"--node-rank={rank}"]
    # Alone, a machine need not be reachable under the name that others would know it by.
    words += [f"--main-address={options.main_address if nodes > 1 else LOOPBACK}", f"--main-port={port}"]
    if accelerator != "auto":
        words.append(f"--accelerator={accelerator}")
    words += [f"--{name}={value}" for name in ("strategy", "precision") if (value := getattr(options, name))]
    # All of a machine's cores, shared out among its processes.
    environment.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", str(max(1, _cores() // devices))))
    return words, environment


def _devices(accelerator: str, devices: str) -> tuple[str, int, dict[str, str]]:
    """Fabric's accelerator, the number of processes, and the environment that picks CUDA devices from a list."""
    if accelerator not in ACCELERATORS:
        raise ValueError(f"--accelerator {accelerator} is unknown: choose from {', '.join(ACCELERATORS)}")
    cuda_wanted = accelerator in ("cuda", "gpu")
    gpus = 0 if accelerator == "cpu" else _cuda_devices()
    if cuda_wanted and not gpus:
        raise ValueError(f"--accelerator {accelerator}: torch sees no CUDA device here; use --accelerator cpu")
    fabric_name = "cuda" if cuda_wanted else accelerator
    if devices in ("auto", "-1"):
        return fabric_name, max(gpus, 1), {}
    if "," in devices or devices.startswith("["):
        chosen = _listed_devices(devices, gpus)
        return fabric_name, len(chosen), {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}
    count = _count("--devices", devices, least=1)
    if gpus and count > gpus:
        raise ValueError(f"--devices {devices}: this machine has {gpus} CUDA device(s)")
    return fabric_name, count, {}


def _listed_devices(devices: str, gpus: int) -> list[str]:
    """A list of CUDA devices (`0,2`, `1,`, `[0, 2]`) in the names that CUDA_VISIBLE_DEVICES uses."""
    numbers = [number.strip() for number in devices.strip("[]").split(",") if number.strip()]
    if not all(number.isdigit() and int(number) < gpus for number in numbers) or len(set(numbers)) < max(
        len(numbers), 1
    ):
        raise ValueError(
            f"--devices {devices}: a list takes different numbers of CUDA devices, of which there are {gpus}"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(str(number) for number in range(gpus))
    names = visible.split(",")
    return [names[int(number)].strip() for number in numbers]


def _launch(arguments: list[str]) -> int:
    """Hand over to `fabric run` and wait for its processes; the exit code is theirs."""
    # Its agent would report every failure at length around the script's own line.
    logging.disable(logging.CRITICAL)
    # Signals are handled here (no name on this list exists), and saving a checkpoint may take longer than its 30 s.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "none"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_S))
    import click
    from lightning_fabric.cli import _main as fabric
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        fabric(["run", *arguments], standalone_mode=False)
    except ChildFailedError as error:
        return _code_of({rank: failure.exitcode for rank, failure in error.failures.items()})
    except click.ClickException as error:
        raise ValueError(f"lightning run model: {error.format_message()}") from error
    except (OSError, RuntimeError) as error:
        # The processes could not meet: an address that is not this machine's, a port in use, another machine missing.
        if os.environ.get("SMDM_TRACEBACK"):
            raise
        line = " ".join(str(error).split())
        raise ValueError(f"lightning run model: the processes could not be started: {line}") from error
    return 0


def _code_of(codes: dict[int, int]) -> int:
    """One exit code for all processes of a failed run.

    A mistake of the user's (2) comes first, then any other code that a process chose, then signals; SIGTERM last, since
    the agent sends it to the processes that were still running when the first failed.

    Args:
        codes: by rank, of the processes that failed; negative where a signal ended one.
    """
    chosen = [code for code in codes.values() if 0 < code < SIGNAL_BASE]
    if chosen:
        return cli.USER_ERROR_CODE if cli.USER_ERROR_CODE in chosen else chosen[0]
    by_signal = {rank: SIGNAL_BASE - code if code < 0 else code for rank, code in codes.items()}
    rank, code = min(by_signal.items(), key=lambda item: item[1] == SIGNAL_BASE + signal.SIGTERM)
    if codes[rank] < 0 and codes[rank] != -signal.SIGTERM:
        name = signal.Signals(-codes[rank]).name
        hint = "; the system does so when memory runs out" if -codes[rank] == signal.SIGKILL else ""
        print(f"error: process {rank} was ended by {name}{hint}", file=sys.stderr, flush=True)
    return code


def _after_signal(number: int) -> int:
    """Make sure that no process is left behind; the agent has waited for them unless the signal came as it began."""
    deadline = time.monotonic() + SHUTDOWN_S
    children = _children()
    for child in children:
        _signal_group(child.pid, signal.SIGTERM)
    while children and time.monotonic() < deadline:
        time.sleep(0.1)
        children = _children()
    for child in children:
        _signal_group(child.pid, signal.SIGKILL)
    return SIGNAL_BASE + number


def _children() -> list[Any]:
    """This process's own children that are still running."""
    import psutil

    running = []
    for child in psutil.Process().children():
        try:
            if child.status() != psutil.STATUS_ZOMBIE:
                running.append(child)
        except psutil.NoSuchProcess:
            continue
    return running


def _signal_group(pid: int, number: int) -> None:
    """Signal a process that leads a group of its own (the agent starts them so), or it alone."""
    try:
        if os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
    except ProcessLookupError:
        pass


def _count(name: str, text: str, least: int) -> int:
    """A whole number of at least `least`."""
    if not text.isdigit() or int(text) < least:
        raise ValueError(f"{name} {text}: expected a whole number of at least {least}")
    return int(text)


def _cuda_devices() -> int:
    """How many CUDA devices torch can use here."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cores() -> int:
    """Physical cores that this process may use, which is also how many threads torch takes by itself."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)


def _free_port() -> int:
    """A port that nothing on this machine listens on, so that several runs can start side by side."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
