"""A checkpoint as a person uses it: typed text in, states of the text being written out.

Decisions: a prompt is read as the tokenizer gives it, without bos, like the documents in training; an ARM's empty prompt
is bos, since it cannot start from nothing. A chat is one question in the template of fine-tuning, in which underscores
are plain text. Whoever shows the states (a terminal, a page) uses `Completer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lit_gpt.checkpoints.loaded import LoadedModel
from lit_gpt.data.sft_formats import CHAT_TEMPLATE
from lit_gpt.sampling.infill import DEFAULT_GAP, has_gaps, infill_row, spaced_positions, with_typed_spaces
from lit_gpt.sampling.sequence import State
from lit_gpt.sampling.settings import Sampling
from lit_gpt.ui.trajectory import TrajectoryRecorder


@dataclass(frozen=True)
class CompletionRequest:
    """What a person asked for, as tokens."""

    row: list[int]
    """Token ids; [MASK] at gaps."""
    context_length: int
    """Tokens of the finished row."""
    start: int
    """Where the shown text begins: 0, or in a chat behind the question."""
    spaced: frozenset[int] = frozenset()
    """Positions of gaps before which a space was typed."""


@dataclass(frozen=True)
class Completer:
    """Completes, fills or answers typed text with one model."""

    loaded: LoadedModel

    @property
    def kind(self) -> str:
        """`arm` or `mdm`."""
        return self.loaded.kind

    def request(self, text: str, context_length: int, gap: int = DEFAULT_GAP, chat: bool = False) -> CompletionRequest:
        """Turn typed text into tokens.

        Args:
            text: a prompt, a text with gaps for an MDM, or a question.
            context_length: the limit, and where a prompt's row ends.
            gap: tokens of a gap without a number.
            chat: put the text into the chat template.

        Raises:
            ValueError: gaps of no token, or more of them than the context has room for.
        """
        if chat:
            row = self.loaded.prompt_ids(CHAT_TEMPLATE.format(question=text))
            return CompletionRequest(row, context_length, len(row))
        config = self.loaded.model.config
        # The model's own limit too: a typed context length makes no room for gaps.
        limit = min(context_length, config.block_size)
        row = self.loaded.started(infill_row(text, self.loaded.tokenizer, config.mask_id, limit, gap))
        # A row that is too long keeps the limit: the sampler's error says both.
        if not has_gaps(text):
            return CompletionRequest(row, context_length, 0)
        return CompletionRequest(
            row, min(len(row), context_length), 0, spaced_positions(text, self.loaded.tokenizer, gap)
        )

    def states(self, request: CompletionRequest, sampling: Sampling) -> Iterator[State]:
        """Write: one state before the first step and one after each.

        Raises:
            ValueError: as `LoadedModel.states`, before anything is written.
        """
        return self.loaded.states(request.row, request.context_length, sampling)

    def recorder(self, request: CompletionRequest) -> TrajectoryRecorder:
        """The recorder of a request's row, to be given its states."""
        mask_id, tokenizer = self.loaded.model.config.mask_id, self.loaded.tokenizer
        return TrajectoryRecorder(mask_id, tokenizer, start=request.start, spaced=request.spaced)

    def text(self, state: State, request: CompletionRequest) -> str:
        """The text on a state, masks as `trajectory.PLAIN_MASK`; in a chat the answer alone, up to its end token."""
        ids = state.tokens()[0][request.start :].tolist()
        if self.loaded.model.config.mask_id in ids:
            recorder = self.recorder(request)
            recorder.add(state)
            return recorder.trajectory().plain_text(state.step)
        ids = self.loaded.until_end(ids) if request.start else ids
        return with_typed_spaces(ids, request.spaced, self.loaded.tokenizer)

    def record(self, state: State, request: CompletionRequest) -> dict[str, Any]:
        """A state as JSON values: step, text, and the whole row's tokens and confidences."""
        return {
            "step": state.step,
            "text": self.text(state, request),
            "tokens": state.tokens()[0].tolist(),
            "confidence": state.confidences()[0].tolist(),
        }
