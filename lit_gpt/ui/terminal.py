"""Completions on the command line: prompts are read, the text is shown while it is sampled, its steps saved to files.

On a terminal every state of the sampler is shown: an MDM's row with fewer and fewer masks, an ARM's tokens one by one. A
pipe gets the finished text alone. Ctrl-C keeps the tokens sampled so far: they are shown and saved like a finished text.
Rich is imported when it is used.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lit_gpt.cli import Interrupted
from lit_gpt.files import write_file
from lit_gpt.sampling.sequence import State
from lit_gpt.sampling.settings import Sampling
from lit_gpt.ui.completion import Completer, CompletionRequest
from lit_gpt.ui.trajectory import DenoisingTrajectory, print_trajectory, without_control_characters

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_TITLE_CHARACTERS = 60


@dataclass(frozen=True)
class TerminalSettings:
    """How texts are read and shown."""

    gap: int
    """Tokens of a gap without a number."""
    chat: bool
    """Put each text as a question into the chat template; the answer alone is shown."""
    delay: float
    """Seconds that each step stays on a terminal."""
    snapshots: int
    """Steps of an MDM that are printed where there is no terminal."""
    save: str | None
    """File for the steps: .jsonl, or .png or .gif for an MDM's. The second text's goes to FILE-2, and so on."""


@dataclass
class TerminalSession:
    """Completions by one model, one after the other."""

    completer: Completer
    sampling: Sampling
    context_length: int
    settings: TerminalSettings
    console: Console
    completions: int = field(default=0, init=False)
    """Started so far."""

    def complete_lines(self) -> None:
        """Complete line after line; a wrong line ends the session only where nobody can type another one."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys in input())
        interactive = sys.stdin.isatty()
        while True:
            try:
                line = input("> " if interactive and self.console.is_terminal else "")
            except EOFError:
                break
            if not line:
                break
            try:
                self.complete(line)
            except ValueError as error:
                if not interactive:
                    raise
                print(f"error: {error}", file=sys.stderr, flush=True)

    def complete(self, text: str) -> None:
        """Complete one text, show it, save its steps.

        Raises:
            ValueError: the text does not fit the model or its context.
            Interrupted: by Ctrl-C; what was sampled is shown and saved.
        """
        request = self.completer.request(text, self.context_length, self.settings.gap, self.settings.chat)
        states = self.completer.states(request, self.sampling)
        self.completions += 1
        collected: list[State] = []
        stopped = False
        try:
            self._collect(states, request, collected)
        except KeyboardInterrupt:
            stopped = True
        if collected:
            self._finish(text, request, collected)
        if stopped:
            done = collected[-1].step if collected else 0
            raise Interrupted(f"interrupted after step {done}", signal.SIGINT)

    # --- while it is sampled ------------------------------------------------------------------------------------------

    def _collect(self, states: Iterator[State], request: CompletionRequest, collected: list[State]) -> None:
        """Collect the states; on a terminal, show each as it comes."""
        if not self.console.is_terminal:
            for state in states:
                collected.append(state)
        elif self.completer.kind == "arm":
            self._show_tokens(states, request, collected)
        else:
            self._show_masks(states, request, collected)

    def _show_tokens(self, states: Iterator[State], request: CompletionRequest, collected: list[State]) -> None:
        """The text as it grows."""
        shown = ""
        try:
            for state in states:
                collected.append(state)
                text = self.completer.text(state, request)
                # The bytes of one character may come in several tokens.
                if text.startswith(shown) and not text.endswith("\ufffd"):
                    print(without_control_characters(text[len(shown) :]), end="", flush=True)
                    shown = text
                time.sleep(self.settings.delay)
        finally:
            whole = self.completer.text(collected[-1], request) if collected else ""
            print(without_control_characters(whole.removeprefix(shown)), flush=True)

    def _show_masks(self, states: Iterator[State], request: CompletionRequest, collected: list[State]) -> None:
        """The row with its masks; it is removed when it is finished, since a long text does not fit on the screen."""
        from rich.live import Live

        recorder = self.completer.recorder(request)
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            for state in states:
                collected.append(state)
                if recorder.add(state):
                    live.update(_with_status(recorder.trajectory(), self.sampling.steps), refresh=True)
                    time.sleep(self.settings.delay)

    # --- afterwards ---------------------------------------------------------------------------------------------------

    def _finish(self, text: str, request: CompletionRequest, collected: list[State]) -> None:
        """Print the text where `_collect` has not, and save."""
        final = self.completer.text(collected[-1], request)
        recorder = self.completer.recorder(request)
        if self.completer.kind == "mdm":
            for state in collected:
                recorder.add(state)
            trajectory = recorder.trajectory()
            if self.console.is_terminal:
                # Characters of several tokens, and what follows a chat's end token, are right in the plain text only.
                if trajectory.plain_text(trajectory.steps) == final:
                    self.console.print(trajectory.styled_text(trajectory.steps), markup=False)
                else:
                    self.console.print(without_control_characters(final), markup=False)
            elif self.settings.snapshots:
                print_trajectory(trajectory, self.console, self.settings.snapshots)
        if not self.console.is_terminal:
            print(final, flush=True)
        if self.settings.save:
            path = Path(self.settings.save)
            path = path if self.completions == 1 else path.with_stem(f"{path.stem}-{self.completions}")
            if path.suffix == ".jsonl":
                self._save_steps(path, request, collected)
            else:
                self._save_picture(path, text, trajectory)
            print(f"saved {path}", file=sys.stderr, flush=True)

    def _save_steps(self, path: Path, request: CompletionRequest, collected: list[State]) -> None:
        """One JSON object per step."""
        lines = [json.dumps(self.completer.record(state, request), ensure_ascii=False) + "\n" for state in collected]
        write_file(path, lambda file: file.write("".join(lines).encode()))

    def _save_picture(self, path: Path, text: str, trajectory: DenoisingTrajectory) -> None:
        """The steps side by side, or moving."""
        from lit_gpt.ui.trajectory_images import animate_trajectory, draw_trajectory

        if path.suffix == ".gif":
            animate_trajectory(trajectory, path)
            return
        line = " ".join(text.split())
        title = line if len(line) <= _TITLE_CHARACTERS else line[: _TITLE_CHARACTERS - 1] + "…"
        draw_trajectory(trajectory, title, path)


def _with_status(trajectory: DenoisingTrajectory, steps: int) -> RenderableType:
    """The text so far below a line with the step and the number of masks."""
    from rich.console import Group
    from rich.text import Text

    hidden = sum(at > trajectory.steps for at in trajectory.revealed)
    status = Text(f"step {trajectory.steps} of {steps}, {hidden} masked", "dim")
    return Group(status, trajectory.styled_text(trajectory.steps))
