"""Pipelines of scripts: stages that are done once per setting, and child processes whose output somebody watches.

Decisions: a stage owns a folder and a stamp in it, `stage.json`, with the settings that its result depends on; the
stamp is written before the work (so that interrupted work is known to be of these settings and can go on) and completed
after it. Children run in a session of their own: a Ctrl-C reaches them once, through us. May import cli and files.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lit_gpt.cli import Interrupted
from lit_gpt.files import make_folder, read_json_object, write_json

_STAMP = "stage.json"
_SHOWN_LINES = 20


@dataclass(frozen=True)
class Stage:
    """A piece of work with a folder of its own."""

    folder: Path
    """Everything that the stage makes lies in here; it is emptied when the settings have changed."""
    settings: dict[str, Any]
    """JSON values that the result depends on, those of the stages before it included."""

    def begin(self) -> dict[str, Any] | None:
        """Look whether there is something to do, and prepare the folder for it.

        Returns:
            The finished stage's result; None if it has to be done, or gone on with.

        Raises:
            ValueError: the folder holds files that are not a stage's.
        """
        stamp = self.folder / _STAMP
        if stamp.exists():
            found = read_json_object(stamp)
            if found.get("settings") == self.settings:
                return found.get("result")
            shutil.rmtree(self.folder)
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds files of something else: choose another folder")
        make_folder(self.folder)
        write_json(stamp, {"settings": self.settings, "result": None})
        return None

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Keep the result (JSON values): the next `begin` with the same settings returns it."""
        write_json(self.folder / _STAMP, {"settings": self.settings, "result": result})
        return result


def run_script(command: Sequence[str], on_line: Callable[[str], None], unbuffered: bool = True) -> None:
    """Run a Python script to its end and hand on what it prints, stdout and stderr together, line by line.

    Args:
        command: the script and its arguments; the interpreter is ours.
        on_line: called with every line, without its newline.
        unbuffered: let the child write every line at once.

    Raises:
        ValueError: the script failed; its own one line, or the end of what it printed.
        Interrupted: a Ctrl-C or SIGTERM came; the script was told and has ended (training saves first).
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"} if unbuffered else None
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    lines: list[str] = []
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # Once politely, then at once.
        process.send_signal(signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines = [*lines[1 - _SHOWN_LINES :], line.rstrip("\n")]
            on_line(lines[-1])
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        raise Interrupted("interrupted: what is finished is kept; the same command goes on from there", received[0])
    if code:
        name = Path(command[0]).name
        ours = next((line for line in reversed(lines) if line.startswith("error: ")), None)
        said = ours.removeprefix("error: ") if ours else f"ended with code {code}: {' | '.join(lines[-5:])}"
        raise ValueError(f"{name}: {said}")
