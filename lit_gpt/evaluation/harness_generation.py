"""Texts that lm-evaluation-harness asks for with `generate_until`: its requests as tokens, written in batches.

Decisions: what a task's `generation_kwargs` say goes before `--model_args`; requests with the same settings are written
together, and no text depends on its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lit_gpt.checkpoints.loaded import LoadedModel
from lit_gpt.evaluation.settings import ModelArgs
from lit_gpt.randomness import hash_int
from lit_gpt.sampling.sample import sample
from lit_gpt.sampling.settings import Sampling

_DEFAULT_NEW_TOKENS = 256  # the harness's own default for max_gen_toks


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt whose continuation the harness asks for."""

    prompt: list[int]
    """Token ids."""
    length: int
    """Tokens of the finished row."""
    sampling: Sampling
    row: int
    """The row's number, which decides its random numbers."""
    stop_strings: list[str]
    """The text ends before the first one of them."""


class TextWriter:
    """A checkpoint that writes texts behind the harness's contexts.

    Args:
        loaded: the checkpoint.
        arguments: from `--model_args`.
        max_length: tokens of a finished row, at most.
        batch_tokens: tokens of a batch.

    Raises:
        ValueError: a setting is wrong; it shows here, not at the first text.
    """

    def __init__(self, loaded: LoadedModel, arguments: ModelArgs, max_length: int, batch_tokens: int) -> None:
        self.loaded, self.arguments = loaded, arguments
        self.max_length, self.batch_tokens = max_length, batch_tokens
        self._sampling(arguments.steps or 1, arguments.temperature)

    def request(self, context: str, settings: dict[str, Any], number: int) -> GenerationRequest:
        """A request as tokens; what the task's `generation_kwargs` say goes before `--model_args`."""
        new_tokens = min(int(settings.get("max_gen_toks", _DEFAULT_NEW_TOKENS)), self.max_length - 1)
        prompt = self.loaded.prompt_ids(context)[-(self.max_length - new_tokens) :]
        temperature = float(settings.get("temperature", self.arguments.temperature))
        if settings.get("do_sample") is False:
            temperature = 0.0
        sampling = self._sampling(self.arguments.steps or new_tokens, temperature)
        until = settings.get("until") or []
        row = hash_int(number, *prompt) >> 1  # an int64
        stop_strings = [until] if isinstance(until, str) else list(until)
        return GenerationRequest(prompt, len(prompt) + new_tokens, sampling, row, stop_strings)

    def _sampling(self, steps: int, temperature: float) -> Sampling:
        """The settings of generate_until."""
        arguments = self.arguments
        return Sampling(arguments.alg, steps, float(temperature), float(arguments.cfg), arguments.seed)

    def texts(self, requests: dict[str, GenerationRequest]) -> Iterator[tuple[str, str]]:
        """Texts by key, those with the same settings together; a text does not depend on its batch."""
        alike: dict[Sampling, list[str]] = {}
        for key, request in requests.items():
            alike.setdefault(request.sampling, []).append(key)
        at_once = max(1, self.batch_tokens // self.max_length)
        for sampling, names in alike.items():
            # Rows of about the same length waste the least.
            names.sort(key=lambda name: -len(requests[name].prompt))
            for start in range(0, len(names), at_once):
                batch = {name: requests[name] for name in names[start : start + at_once]}
                prompts, lengths, rows = zip(
                    *((one.prompt, one.length, one.row) for one in batch.values()), strict=True
                )
                with self.loaded.autocast():
                    ids = sample(self.loaded.model, prompts, sampling, lengths, self.loaded.tokenizer.eos_id, rows)
                for (name, request), row in zip(batch.items(), ids, strict=True):
                    yield name, self._text(row.tolist()[len(request.prompt) :], request.stop_strings)

    def _text(self, ids: list[int], stop_strings: Sequence[str]) -> str:
        """What was written, up to the end token or a stop string."""
        text = self.loaded.tokenizer.decode(self.loaded.until_end(ids))
        for stop in filter(None, stop_strings):
            text = text.split(stop)[0]
        return text
