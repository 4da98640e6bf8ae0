"""A checkpoint as a person uses it: typed text in, states of the text being written out.

Decisions: a prompt is read as the tokenizer gives it, without bos, like the documents in training; an ARM's empty prompt
is bos, since it cannot start from nothing. A chat is one question in the template of fine-tuning, in which underscores
are plain text. Whoever shows the states (a terminal, a page) uses `Writer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lit_gpt.checkpoints.weights import load_model, load_tokenizer
from lit_gpt.data.sft_formats import CHAT
from lit_gpt.devices import choose_device
from lit_gpt.model.causal import GPT
from lit_gpt.model.layers import Transformer
from lit_gpt.sampling.infill import DEFAULT_GAP, has_gaps, infill_row, infill_states
from lit_gpt.sampling.sequence import State
from lit_gpt.sampling.settings import Sampling
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.ui.trajectory import TrajectoryRecorder


@dataclass(frozen=True)
class Request:
    """What a person asked for, as tokens."""

    row: list[int]
    """Token ids; [MASK] at gaps."""
    context_length: int
    """Tokens of the finished row."""
    start: int
    """Where the shown text begins: 0, or in a chat behind the question."""


@dataclass(frozen=True)
class Writer:
    """A model and its tokenizer."""

    model: Transformer
    tokenizer: Tokenizer

    @classmethod
    def load(
        cls, ckpt_path: str, model_name: str | None = None, tokenizer: str | None = None, device: str | None = None
    ) -> Writer:
        """Load a checkpoint and the tokenizer that belongs to it.

        Args:
            ckpt_path: as `weights.load_weights`.
            model_name: the size, for a file that does not say.
            tokenizer: a folder or hub name; None takes the checkpoint's own.
            device: as `runtime.choose_device`.

        Raises:
            FileNotFoundError: no such checkpoint or tokenizer.
            ValueError: as `load_model`; the tokenizer is another model's.
        """
        model, record = load_model(ckpt_path, model_name, device=choose_device(device))
        return cls(model, load_tokenizer(ckpt_path, model, record, tokenizer))

    @property
    def kind(self) -> str:
        """`arm` or `mdm`."""
        return self.model.kind

    def request(self, text: str, context_length: int, gap: int = DEFAULT_GAP, chat: bool = False) -> Request:
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
            row = [self.tokenizer.bos_id, *self.tokenizer.encode_ids(CHAT.format(question=text))]
            return Request(row, context_length, len(row))
        row = infill_row(text, self.tokenizer, self.model.config.mask_id, gap)
        if not row and isinstance(self.model, GPT):
            row = [self.tokenizer.bos_id]
        # A row that is too long keeps the limit: the sampler's error says both.
        return Request(row, min(len(row), context_length) if has_gaps(text) else context_length, 0)

    def states(self, request: Request, sampling: Sampling) -> Iterator[State]:
        """Write: one state before the first step and one after each.

        Raises:
            ValueError: as `infill_states`, before anything is written.
        """
        return infill_states(self.model, [request.row], sampling, request.context_length, self.tokenizer.eos_id)

    def recorder(self, request: Request) -> TrajectoryRecorder:
        """The recorder of a request's row, to be given its states."""
        return TrajectoryRecorder(self.model.config.mask_id, self.tokenizer, start=request.start)

    def text(self, state: State, request: Request) -> str:
        """The text on a state, masks as `trajectory.PLAIN_MASK`; in a chat the answer alone, up to its end token."""
        ids = state.tokens()[0][request.start :].tolist()
        if self.model.config.mask_id in ids:
            recorder = self.recorder(request)
            recorder.add(state)
            return recorder.trajectory().plain_text(state.step)
        if request.start and self.tokenizer.eos_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_id)]
        return self.tokenizer.decode(ids)

    def record(self, state: State, request: Request) -> dict[str, Any]:
        """A state as JSON values: step, text, and the whole row's tokens and confidences."""
        return {
            "step": state.step,
            "text": self.text(state, request),
            "tokens": state.tokens()[0].tolist(),
            "confidence": state.confidences()[0].tolist(),
        }
