"""Pipelines of scripts: stages that are done once for their settings, and scripts that run as child processes.

A stage owns a folder and a file in it, `stage.json`, with the settings that its result depends on. The file is written
before the work, so that interrupted work is known to be of these settings and can be continued, and completed after it.
Scripts run in a process session of their own: a Ctrl-C reaches them once, through us.
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
from typing import TYPE_CHECKING, Any

from lit_gpt.cli import Interrupted
from lit_gpt.files import make_folder, read_json_object, write_json

if TYPE_CHECKING:
    from rich.console import Console

_STAGE_FILE = "stage.json"
_SHOWN_LINES = 20
"""Kept of a script's output, for the message if it fails."""
ROOT = Path(__file__).resolve().parents[1]
"""Folder of the scripts."""


@dataclass
class Stage:
    """A piece of work with a folder of its own."""

    folder: Path
    """Everything that the stage makes lies in here; it is emptied when the settings have changed."""
    settings: dict[str, Any]
    """JSON values that the result depends on, those of the stages before it included."""
    result: dict[str, Any] | None
    """JSON values, if the stage is finished; None if it has to be done, or continued."""

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any]) -> Stage:
        """Look whether the work is done, and if not, prepare the folder for it.

        Raises:
            ValueError: the folder holds files that are not a stage's.
        """
        path = folder / _STAGE_FILE
        if path.exists():
            found = read_json_object(path)
            if found.get("settings") == settings:
                return cls(folder, settings, found.get("result"))
            shutil.rmtree(folder)
        elif folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds files of something else: choose another folder")
        make_folder(folder)
        write_json(path, {"settings": settings, "result": None})
        return cls(folder, settings, None)

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Keep the result: the next `open` with the same settings finds it."""
        write_json(self.folder / _STAGE_FILE, {"settings": self.settings, "result": result})
        self.result = result
        return result


@dataclass(frozen=True)
class Pipeline:
    """Stages in the subfolders of one folder, and the scripts that they run."""

    out: Path
    """The folder."""
    console: Console
    """Where stages are announced and the scripts' lines are shown."""
    is_shown: Callable[[str], bool] = lambda line: True
    """Which of the scripts' lines; all by default."""

    def begin(self, name: str, title: str, settings: dict[str, Any]) -> Stage:
        """Open a stage and announce it."""
        stage = Stage.open(self.out / name, settings)
        self.console.print(title if stage.result is None else f"{title}: done before", style="bold")
        return stage

    def is_finished(self, name: str) -> bool:
        """Whether a stage has a result, of whatever settings."""
        path = self.out / name / _STAGE_FILE
        return path.exists() and read_json_object(path).get("result") is not None

    def run(self, command: Sequence[object], on_line: Callable[[str], None] | None = None) -> list[str]:
        """Run a script of this project and show what it prints.

        Args:
            command: the script's path below the project's folder, then its arguments.
            on_line: called with every line; None prints those that are shown.

        Returns:
            The lines that were printed here.

        Raises:
            ValueError: as `run_script`.
            Interrupted: as `run_script`.
        """
        printed: list[str] = []

        def print_line(line: str) -> None:
            if self.is_shown(line):
                printed.append(line)
                self.console.print(f"  {line}", markup=False, soft_wrap=True)

        script, *arguments = map(str, command)
        run_script([str(ROOT / script), *arguments], on_line or print_line)
        return printed


def run_script(command: Sequence[str], on_line: Callable[[str], None], unbuffered: bool = True) -> None:
    """Run a Python script to its end and pass on what it prints, stdout and stderr together, line by line.

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

    def forward_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # Once politely, then at once.
        process.send_signal(signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    previous = {number: signal.signal(number, forward_signal) for number in (signal.SIGINT, signal.SIGTERM)}
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
