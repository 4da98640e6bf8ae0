"""A person at a terminal: lines in, text that is written before their eyes, steps saved to files.

Decisions: on a terminal an MDM's masks resolve and an ARM's tokens come one by one; into a pipe goes the finished text
alone. Ctrl-C keeps what has been written: it is shown and saved like a finished text. Rich is imported when it is used.
May import completion, display, plots, files and cli.
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
from lit_gpt.ui.completion import Request, Writer
from lit_gpt.ui.display import Denoising, print_snapshots, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_TITLE_CHARACTERS = 60


@dataclass(frozen=True)
class Manner:
    """How texts are read and shown."""

    gap: int
    """Tokens of a gap without a number."""
    chat: bool
    """Questions in the chat template; the answer alone is shown."""
    delay: float
    """Seconds that each step stays on a terminal."""
    snapshots: int
    """Steps of an MDM that are printed where there is no terminal."""
    save: str | None
    """File for the steps: .jsonl, or .png or .gif for an MDM's. The second text's goes to FILE-2, and so on."""


@dataclass
class Session:
    """One model and one person."""

    writer: Writer
    sampling: Sampling
    context_length: int
    manner: Manner
    console: Console
    turns: int = field(default=0, init=False)
    """Completions so far."""

    def converse(self) -> None:
        """Answer line after line; a mistake in a line ends the session only where nobody can type another one."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys in input())
        attended = sys.stdin.isatty()
        while True:
            try:
                line = input("> " if attended and self.console.is_terminal else "")
            except EOFError:
                break
            if not line:
                break
            try:
                self.complete(line)
            except ValueError as error:
                if not attended:
                    raise
                print(f"error: {error}", file=sys.stderr, flush=True)

    def complete(self, text: str) -> None:
        """Write one text, show it, save its steps.

        Raises:
            ValueError: the text does not fit the model or its context.
            Interrupted: by Ctrl-C; what was there is shown and saved.
        """
        request = self.writer.request(text, self.context_length, self.manner.gap, self.manner.chat)
        states = self.writer.states(request, self.sampling)
        self.turns += 1
        seen: list[State] = []
        stopped = False
        try:
            self._watch(states, request, seen)
        except KeyboardInterrupt:
            stopped = True
        if seen:
            self._finish(text, request, seen)
        if stopped:
            done = seen[-1].step if seen else 0
            raise Interrupted(f"interrupted after step {done}", signal.SIGINT)

    # --- while it is written ------------------------------------------------------------------------------------------

    def _watch(self, states: Iterator[State], request: Request, seen: list[State]) -> None:
        """Collect the states; on a terminal, show each as it comes."""
        if not self.console.is_terminal:
            for state in states:
                seen.append(state)
        elif self.writer.kind == "arm":
            self._watch_tokens(states, request, seen)
        else:
            self._watch_masks(states, request, seen)

    def _watch_tokens(self, states: Iterator[State], request: Request, seen: list[State]) -> None:
        """The text as it grows."""
        shown = ""
        try:
            for state in states:
                seen.append(state)
                text = self.writer.text(state, request)
                # The bytes of one character may come in several tokens.
                if text.startswith(shown) and not text.endswith("\ufffd"):
                    print(printable(text[len(shown) :]), end="", flush=True)
                    shown = text
                time.sleep(self.manner.delay)
        finally:
            whole = self.writer.text(seen[-1], request) if seen else ""
            print(printable(whole.removeprefix(shown)), flush=True)

    def _watch_masks(self, states: Iterator[State], request: Request, seen: list[State]) -> None:
        """The text as it emerges; the view goes when it is done, since a long text does not fit it."""
        from rich.live import Live

        watch = self.writer.watch(request)
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            for state in states:
                seen.append(state)
                if watch.see(state):
                    live.update(_view(watch.denoising(), self.sampling.steps), refresh=True)
                    time.sleep(self.manner.delay)

    # --- afterwards ---------------------------------------------------------------------------------------------------

    def _finish(self, text: str, request: Request, seen: list[State]) -> None:
        """Print the text where `_watch` has not, and save."""
        final = self.writer.text(seen[-1], request)
        watch = self.writer.watch(request)
        if self.writer.kind == "mdm":
            for state in seen:
                watch.see(state)
            denoising = watch.denoising()
            if self.console.is_terminal:
                styled = denoising.rich(denoising.steps)
                # Characters of several tokens, and what follows a chat's end token, are right in the plain text only.
                self.console.print(
                    styled if denoising.plain(denoising.steps) == final else printable(final), markup=False
                )
            elif self.manner.snapshots:
                print_snapshots(denoising, self.console, self.manner.snapshots)
        if not self.console.is_terminal:
            print(final, flush=True)
        if self.manner.save:
            path = Path(self.manner.save)
            path = path if self.turns == 1 else path.with_stem(f"{path.stem}-{self.turns}")
            if path.suffix == ".jsonl":
                self._save_steps(path, request, seen)
            else:
                self._save_picture(path, text, denoising)
            print(f"saved {path}", file=sys.stderr, flush=True)

    def _save_steps(self, path: Path, request: Request, seen: list[State]) -> None:
        """One JSON object per step."""
        lines = [json.dumps(self.writer.record(state, request), ensure_ascii=False) + "\n" for state in seen]
        write_file(path, lambda file: file.write("".join(lines).encode()))

    def _save_picture(self, path: Path, text: str, denoising: Denoising) -> None:
        """The steps side by side, or moving."""
        from lit_gpt.ui.plots import animate_denoising, draw_denoising

        if path.suffix == ".gif":
            animate_denoising(denoising, path)
            return
        line = " ".join(text.split())
        title = line if len(line) <= _TITLE_CHARACTERS else line[: _TITLE_CHARACTERS - 1] + "…"
        draw_denoising(denoising, title, path)


def _view(denoising: Denoising, steps: int) -> RenderableType:
    """The text at this moment above a line that says how far it is."""
    from rich.console import Group
    from rich.text import Text

    hidden = sum(at > denoising.steps for at in denoising.revealed)
    status = Text(f"step {denoising.steps} of {steps}, {hidden} masked", "dim")
    return Group(status, denoising.rich(denoising.steps))
