"""The denoising trajectory of a text: the order in which the tokens of one row came out of their masks, as text.

What is kept is a `DenoisingTrajectory`, the finished tokens of one row and the step in which each was revealed; the text
after any step follows from that, here and in `trajectory_images`. Torch and rich are imported where they are needed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from unicodedata import category

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from lit_gpt.sampling.sequence import State
    from lit_gpt.tokenizer import Tokenizer

PLAIN_MASK = " __"
"""A masked token in plain text."""
_STYLED_MASK = " ▒▒"
_NEW_STYLE, _GIVEN_STYLE, _MASK_STYLE = "bold green", "bold", "dim"
_REPLAY_S = 4
"""Seconds of a whole replay: short enough to wait for, long enough to see where tokens appear first."""


@dataclass(frozen=True)
class DenoisingTrajectory:
    """The finished tokens of one row, and the step in which each was revealed."""

    texts: list[str]
    """The finished tokens' texts; joined they are the row's text."""
    revealed: list[int]
    """The step in which each token was revealed, from 1; 0 where it was given; more than `steps` where it never was."""
    steps: int
    """Steps of the sampler."""

    @classmethod
    def from_states(cls, states: Sequence[State], row: int, mask_id: int, tokenizer: Tokenizer) -> DenoisingTrajectory:
        """The trajectory of one row.

        Args:
            states: from `sample.sample_states` of an MDM, the first one before the first step.
            row: which row of the batch.
            mask_id: id of [MASK].
            tokenizer: of the model.
        """
        recorder = TrajectoryRecorder(mask_id, tokenizer, row)
        for state in states:
            recorder.add(state)
        return recorder.trajectory()

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def plain_text(self, step: int) -> str:
        """The text after a step, without colours; each hidden token is `PLAIN_MASK`."""
        shown = zip(self.texts, self.revealed, strict=True)
        return "".join(text if at <= step else PLAIN_MASK for text, at in shown)

    def styled_text(self, step: int) -> Text:
        """The text after a step: what was given is bold, what the step revealed is green, masks are dim."""
        from rich.text import Text

        shown = Text()
        for text, at in zip(self.texts, self.revealed, strict=True):
            if at > step:
                shown.append(_STYLED_MASK, _MASK_STYLE)
                continue
            style = _GIVEN_STYLE if at == 0 else _NEW_STYLE if at == step else ""
            shown.append(without_control_characters(text), style)
        return shown

    def select_steps(self, count: int) -> list[int]:
        """At most `count` steps worth looking at: before the first, the last, and evenly many tokens between."""
        order = sorted(at for at in self.revealed if 0 < at <= self.steps)
        if not order:
            return [0]
        if len(set(order)) < count:
            return [0, *sorted(set(order))]
        picked = [order[round(part * (len(order) - 1) / (count - 1))] for part in range(1, count - 1)]
        return sorted({0, *picked, order[-1]})


class TrajectoryRecorder:
    """Collects one row of an MDM's states; `trajectory` is what it has been given so far."""

    def __init__(
        self, mask_id: int, tokenizer: Tokenizer, row: int = 0, start: int = 0, spaced: Collection[int] = ()
    ) -> None:
        """Nothing has been collected.

        Args:
            mask_id: id of [MASK].
            tokenizer: of the model.
            row: which row of the batch.
            start: tokens of the row that are left out, such as a chat's question.
            spaced: positions behind `start` whose token has a space before it that a person typed.
        """
        self._mask_id, self._tokenizer, self._row, self._start = mask_id, tokenizer, row, start
        self._spaced = spaced
        self._ids: list[int] = []
        self._since: list[int] = []
        self._step = 0

    def add(self, state: State) -> bool:
        """Take the next state; returns whether a token of the row differs from the state before."""
        ids = state.tokens()[self._row].tolist()[self._start :]
        changed = ids != self._ids
        before = zip(self._ids, self._since, strict=True) if self._ids else [(None, 0)] * len(ids)
        self._since = [since if token == old else state.step for token, (old, since) in zip(ids, before, strict=True)]
        self._ids, self._step = ids, state.step
        return changed

    def trajectory(self) -> DenoisingTrajectory:
        """The row up to the last state; a token counts as revealed in the step since which it stands there."""
        revealed = [
            self._step + 1 if token == self._mask_id else since
            for token, since in zip(self._ids, self._since, strict=True)
        ]
        texts = token_texts(self._tokenizer, self._ids, self._mask_id, starts_text=True)
        for position in self._spaced:
            texts[position] = with_space(texts[position])
        return DenoisingTrajectory(texts, revealed, self._step)


def print_trajectory(trajectory: DenoisingTrajectory, console: Console, count: int) -> None:
    """Print the text after some steps, each below a line with the step's number."""
    for step in trajectory.select_steps(count):
        console.print(f"  --- after step {step} of {trajectory.steps}")
        console.print(indented(trajectory.plain_text(step)), markup=False, soft_wrap=True)


def replay_trajectory(trajectory: DenoisingTrajectory, console: Console, count: int) -> None:
    """Show the text after every step in turn, within about 4 seconds; where there is no terminal, after `count` steps."""
    if not console.is_terminal:
        print_trajectory(trajectory, console, count)
        return

    from rich.live import Live
    from rich.padding import Padding

    with Live(console=console, auto_refresh=False) as live:
        for step in trajectory.select_steps(trajectory.steps):
            live.update(Padding(trajectory.styled_text(step), (0, 0, 0, 2)), refresh=True)
            time.sleep(_REPLAY_S / trajectory.steps)


def without_control_characters(text: str) -> str:
    """The text with U+FFFD in place of characters that control a terminal, which a model may write."""
    return "".join("\ufffd" if category(one) == "Cc" and one not in "\n\t" else one for one in text)


def with_space(text: str) -> str:
    """A token's text, with a space before it if it does not begin with one."""
    return text if text.startswith(" ") else f" {text}"


def indented(text: str) -> str:
    """Four spaces before every line."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def token_texts(
    tokenizer: Tokenizer, ids: Sequence[int], mask_id: int | None = None, starts_text: bool = False
) -> list[str]:
    """The text of every single token, leading spaces included.

    Args:
        tokenizer: of the ids.
        ids: special tokens and the mask have the text "".
        mask_id: id of [MASK].
        starts_text: the first token begins a text: it is without the space that the tokenizer puts before one.
    """
    # A LLaMA-style tokenizer drops the space that begins a text: read each token behind another one.
    anchor = tokenizer.encode_ids("a")
    skip = len(tokenizer.decode(anchor))
    known: dict[int, str] = {} if mask_id is None else {mask_id: ""}
    for token in set(ids) - known.keys():
        known[token] = tokenizer.decode([*anchor, token])[skip:]
    texts = [known[token] for token in ids]
    if starts_text and texts and texts[0].startswith(" ") and not tokenizer.decode(ids[:1]).startswith(" "):
        texts[0] = texts[0][1:]
    return texts
