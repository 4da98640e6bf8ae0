"""What somebody watches in a terminal: text that emerges from masks, and a training script's progress.

Decisions: what is watched is a `Denoising`, the finished tokens of one row and the step in which each was revealed;
every picture of any step follows from that, here and in `plots`. Rich is imported when it is used; torch never is. May
import canvas and tokenizer only, for their types.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from unicodedata import category

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

    from lit_gpt.sampling.sequence import State
    from lit_gpt.tokenizer import Tokenizer

PLAIN_MASK = " __"
"""A masked token in plain text."""
_RICH_MASK = " ▒▒"
_NEW, _GIVEN, _HIDDEN = "bold green", "bold", "dim"
_STEP_LINE = re.compile(r"step (\d+): loss ([\d.]+), .* (\d+) tokens/s")
_EVERY = 5


@dataclass(frozen=True)
class Denoising:
    """How one row of text came out of its masks."""

    texts: list[str]
    """The finished tokens' texts; joined they are the row's text."""
    revealed: list[int]
    """The step in which each token was revealed, from 1; 0 where it was given; more than `steps` where it never was."""
    steps: int
    """Steps of the sampler."""

    @classmethod
    def from_states(cls, states: Sequence[State], row: int, mask_id: int, tokenizer: Tokenizer) -> Denoising:
        """Collect one row.

        Args:
            states: from `sampling.sample_states` of an MDM, the first one before the first step.
            row: which row of the batch.
            mask_id: id of [MASK].
            tokenizer: of the model.
        """
        watch = RowWatch(mask_id, tokenizer, row)
        for state in states:
            watch.see(state)
        return watch.denoising()

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def plain(self, step: int) -> str:
        """The text after a step, without colours; each hidden token is `PLAIN_MASK`."""
        shown = zip(self.texts, self.revealed, strict=True)
        return "".join(text if at <= step else PLAIN_MASK for text, at in shown)

    def rich(self, step: int) -> Text:
        """The text after a step: what was given is bold, what the step revealed is green, masks are dim."""
        from rich.text import Text

        shown = Text()
        for text, at in zip(self.texts, self.revealed, strict=True):
            if at > step:
                shown.append(_RICH_MASK, _HIDDEN)
            else:
                shown.append(printable(text), _GIVEN if at == 0 else _NEW if at == step else "")
        return shown

    def snapshots(self, count: int) -> list[int]:
        """At most `count` steps worth looking at: before the first, the last, and evenly many tokens between."""
        order = sorted(at for at in self.revealed if 0 < at <= self.steps)
        if not order:
            return [0]
        if len(set(order)) < count:
            return [0, *sorted(set(order))]
        picked = [order[round(part * (len(order) - 1) / (count - 1))] for part in range(1, count - 1)]
        return sorted({0, *picked, order[-1]})


class RowWatch:
    """Follows one row of an MDM's canvas state by state; `denoising` is what has been seen so far."""

    def __init__(self, mask_id: int, tokenizer: Tokenizer, row: int = 0, start: int = 0) -> None:
        """Nothing has been seen.

        Args:
            mask_id: id of [MASK].
            tokenizer: of the model.
            row: which row of the batch.
            start: tokens of the row that are left out, such as a chat's question.
        """
        self._mask_id, self._tokenizer, self._row, self._start = mask_id, tokenizer, row, start
        self._ids: list[int] = []
        self._since: list[int] = []
        self._step = 0

    def see(self, state: State) -> bool:
        """Take in the next state; returns whether it shows something new."""
        ids = state.tokens()[self._row].tolist()[self._start :]
        changed = ids != self._ids
        before = zip(self._ids, self._since, strict=True) if self._ids else [(None, 0)] * len(ids)
        self._since = [since if token == old else state.step for token, (old, since) in zip(ids, before, strict=True)]
        self._ids, self._step = ids, state.step
        return changed

    def denoising(self) -> Denoising:
        """The row up to the last state; a token counts as revealed in the step since which it stands there."""
        revealed = [
            self._step + 1 if token == self._mask_id else since
            for token, since in zip(self._ids, self._since, strict=True)
        ]
        texts = token_texts(self._tokenizer, self._ids, self._mask_id)
        if texts and texts[0].startswith(" ") and not self._tokenizer.decode(self._ids[:1]).startswith(" "):
            texts[0] = texts[0][1:]  # the dummy space that the tokenizer put before the text
        return Denoising(texts, revealed, self._step)


def print_snapshots(denoising: Denoising, console: Console, count: int) -> None:
    """Print the text at some steps, below a line that says which."""
    for step in denoising.snapshots(count):
        console.print(f"  --- after step {step} of {denoising.steps}")
        console.print(indented(denoising.plain(step)), markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """The text with U+FFFD for characters that would command a terminal, which a model may write."""
    return "".join("\ufffd" if category(one) == "Cc" and one not in "\n\t" else one for one in text)


def indented(text: str) -> str:
    """Four spaces before every line."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def token_texts(tokenizer: Tokenizer, ids: Iterable[int], mask_id: int | None = None) -> list[str]:
    """The text of every single token, leading spaces included; "" for special tokens and the mask."""
    # A LLaMA-style tokenizer drops the space that begins a text: read each token behind another one.
    anchor = tokenizer.encode_ids("a")
    skip = len(tokenizer.decode(anchor))
    known: dict[int, str] = {} if mask_id is None else {mask_id: ""}
    ids = list(ids)
    for token in set(ids) - known.keys():
        known[token] = tokenizer.decode([*anchor, token])[skip:]
    return [known[token] for token in ids]


class TrainingProgress:
    """Shows a training script's lines: a progress bar on a terminal, every fifth line of the log elsewhere.

    A context manager; call it with each line.
    """

    def __init__(self, console: Console, steps: int) -> None:
        """Nothing is shown before the context is entered.

        Args:
            console: where to.
            steps: of the whole training.
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
            if self._logged % _EVERY != 1 and int(found[1]) != self._steps:
                return
        if not line.startswith("error: "):
            self._console.print(f"  {line}", markup=False, soft_wrap=True)
