"""A training script's output as a person watches it: a progress bar on a terminal, some lines of the log elsewhere.

The step, loss and speed are read from the lines that the training loop prints. Rich is imported when it is used.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_STEP_LINE = re.compile(r"step (\d+): loss ([\d.]+), .* (\d+) tokens/s")
"""As `training.loop` prints it."""
_SHOWN_EVERY = 5
"""Of the step lines in a log that is no terminal: a run of 1200 steps prints 120, its loss changes little between two."""


class TrainingProgress:
    """Shows a training script's lines: a progress bar on a terminal, every fifth line of the log elsewhere.

    A context manager; call it with each line.
    """

    def __init__(self, console: Console, steps: int | None) -> None:
        """Nothing is shown before the context is entered.

        Args:
            console: where to.
            steps: of the whole training; None where a budget decides them.
        """
        self._console, self._steps, self._logged = console, steps, 0
        self._bar: Progress | None = None

    def __enter__(self) -> TrainingProgress:
        if self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self._steps)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, line: str) -> None:
        """Show a line."""
        found = _STEP_LINE.search(line)
        if found and self._bar is not None:
            text = f"loss {float(found[2]):.3f}  {int(found[3]):,} tokens/s"
            self._bar.update(self._task, completed=int(found[1]), description=text)
            return
        if found:
            self._logged += 1
            if self._logged % _SHOWN_EVERY != 1 and int(found[1]) != self._steps:
                return
        if not line.startswith("error: "):
            self._console.print(f"  {line}", markup=False, soft_wrap=True)
