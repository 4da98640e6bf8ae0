"""Texts that lm-evaluation-harness asks for with `generate_until`: its requests as tokens, written in batches.

Decisions: what a task's `generation_kwargs` say goes before `--model_args`; requests with the same settings are written
together, and no text depends on its batch; a text ends where the first of its stop strings is complete, and nothing is
computed behind that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lit_gpt.checkpoints.loaded import LoadedModel
from lit_gpt.cli import warn
from lit_gpt.evaluation.settings import ModelArgs
from lit_gpt.randomness import hash_int
from lit_gpt.sampling.many import SAMPLING_VERSION, sample_many
from lit_gpt.sampling.sequence import SampleRequest
from lit_gpt.sampling.settings import Sampling
from lit_gpt.tokenizer import Tokenizer

_DEFAULT_NEW_TOKENS = 256  # the harness's own default for max_gen_toks
# A new text is shortened to no fewer tokens before its prompt is cut: room for a word or a number, whatever the prompt.
_LEAST_NEW_TOKENS = 16
# One setting under the names that tasks use; the first that is given counts, as in the harness.
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN_NAMES = {*_LENGTH_NAMES, "until", "do_sample", "temperature", "top_p", "top_k"}
# Names whose value says that they are off.
_OFF = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}


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
    stop_strings: tuple[str, ...]
    """The text ends before the one of them that is complete first."""
    missing: int
    """New tokens that were asked for and do not fit."""
    cut: int
    """Tokens of the context that do not fit, at its beginning."""

    def identity(self) -> list[Any]:
        """Everything that decides the text besides the model, as JSON values."""
        return [
            SAMPLING_VERSION,
            self.prompt,
            self.length,
            dataclasses.asdict(self.sampling),
            self.row,
            self.stop_strings,
        ]


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
        self.loaded, self.max_length, self.batch_tokens = loaded, max_length, batch_tokens
        self._ignored: set[str] = set()
        self.how = arguments.sampling()

    def request(self, context: str, settings: dict[str, Any], number: int) -> GenerationRequest:
        """A request as tokens.

        Where context and new text do not fit together, the new text is shortened, to `_LEAST_NEW_TOKENS` at least, and
        then the context's beginning is left out.

        Args:
            context: what the new text follows.
            settings: the task's `generation_kwargs`.
            number: how often the same was asked for before.

        Raises:
            ValueError: a setting has a value that it cannot have; names it.
        """
        self._warn_of_unknown(settings)
        name = next((name for name in _LENGTH_NAMES if settings.get(name) is not None), None)
        wanted = _DEFAULT_NEW_TOKENS if name is None else int(_number(settings, name, 0))
        if wanted < 1:
            raise ValueError(f"generation_kwargs: {name} is {wanted}: at least 1 new token is needed")
        prompt = self.loaded.prompt_ids(context)
        least = min(wanted, _LEAST_NEW_TOKENS, self.max_length // 2)
        new_tokens = min(wanted, max(self.max_length - len(prompt), least))
        kept = prompt[-(self.max_length - new_tokens) :]
        return GenerationRequest(
            prompt=kept,
            length=len(kept) + new_tokens,
            sampling=self._sampling(settings),
            row=hash_int(number, *kept) >> 1,  # an int64
            stop_strings=_stop_strings(settings.get("until")),
            missing=wanted - new_tokens,
            cut=len(prompt) - len(kept),
        )

    def texts(self, requests: dict[str, GenerationRequest]) -> Iterator[tuple[str, str]]:
        """Texts by key, those with the same settings together; a text does not depend on its batch."""
        # Now, not when the first text is asked for: a progress bar's line would swallow it.
        _warn_of_lengths(list(requests.values()), self.max_length)
        return self._texts(requests)

    def _texts(self, requests: dict[str, GenerationRequest]) -> Iterator[tuple[str, str]]:
        """`texts`, as they are written."""
        alike: dict[Sampling, list[str]] = {}
        for key, request in requests.items():
            alike.setdefault(request.sampling, []).append(key)
        tokenizer = self.loaded.tokenizer
        silent_ids = frozenset((tokenizer.token_bytes() == 0).nonzero()[0].tolist())
        for sampling, keys in alike.items():
            wanted = [
                SampleRequest(one.prompt, one.length, one.row, TextEnd(tokenizer, silent_ids, one.stop_strings))
                for one in (requests[key] for key in keys)
            ]
            with self.loaded.autocast():
                found = sample_many(self.loaded.model, wanted, sampling, tokenizer.eos_id, self.batch_tokens)
                for number, ids in found:
                    key = keys[number]
                    yield key, cut_text(tokenizer.decode(self.loaded.until_end(ids)), requests[key].stop_strings)

    def _sampling(self, settings: dict[str, Any]) -> Sampling:
        """The settings of a request: the task's, else those of `--model_args`."""
        how = self.how
        sampled = settings.get("do_sample")
        temperature = _number(settings, "temperature", how.temperature or float(sampled is True))
        return dataclasses.replace(
            how,
            temperature=0.0 if sampled is False else temperature,
            top_p=_number(settings, "top_p", how.top_p),
            # Some libraries' word for all tokens is -1.
            top_k=max(0, int(_number(settings, "top_k", how.top_k))),
        )

    def _warn_of_unknown(self, settings: dict[str, Any]) -> None:
        """Name once each setting that has no effect."""
        given = {name for name, value in settings.items() if value is not None and value != _OFF.get(name)}
        for name in sorted(given - _KNOWN_NAMES - self._ignored):
            self._ignored.add(name)
            warn(f"generation_kwargs: {name}={settings[name]} has no effect: this setting is unknown here")


class TextEnd:
    """Whether the tokens of a text that have come so far hold its end: the end token, or a whole stop string."""

    def __init__(self, tokenizer: Tokenizer, silent_ids: frozenset[int], stop_strings: Sequence[str]) -> None:
        """Before the first token; `silent_ids` are those without text."""
        self._tokenizer, self._silent_ids, self._stop_strings = tokenizer, silent_ids, stop_strings
        # A stop string's tokens have a byte each at least; the tail's first token may lose a space.
        self._overlap = max((len(stop.encode()) for stop in stop_strings), default=0) + 1
        self._seen, self._tail = 0, list[int]()

    def __call__(self, ids: list[int]) -> bool:
        """Look at what is new in the tokens of the text so far, which only grow unless the text is begun anew."""
        if len(ids) < self._seen:
            self._seen, self._tail = 0, []
        fresh, self._seen = ids[self._seen :], len(ids)
        if self._tokenizer.eos_id in fresh:
            return True
        if not self._stop_strings or not fresh:
            return False
        self._tail += [token for token in fresh if token not in self._silent_ids]
        text = self._tokenizer.decode(self._tail)
        self._tail = self._tail[-self._overlap :]
        return any(stop in text for stop in self._stop_strings)


def cut_text(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the stop string that is complete first; of several that end there, before the longest."""
    ends = [(at + len(stop), at) for stop in stop_strings if (at := text.find(stop)) >= 0]
    return text[: min(ends)[1]] if ends else text


def _stop_strings(until: Any) -> tuple[str, ...]:
    """What tasks give as `until`: a text, a list of them, or nothing; an empty text stops nothing."""
    several = until if isinstance(until, list | tuple) else [until]
    if wrong := [one for one in several if not isinstance(one, str | None)]:
        raise ValueError(f"generation_kwargs: until holds {wrong[0]!r}: expected texts")
    return tuple(filter(None, several))


def _number(settings: dict[str, Any], name: str, default: float) -> float:
    """A setting's number; the default where none is given."""
    value = settings.get(name)
    if value is None:
        return default
    with contextlib.suppress(TypeError, ValueError):
        if math.isfinite(number := float(value)):
            return number
    raise ValueError(f"generation_kwargs: {name} is {value!r}: expected a number")


def _warn_of_lengths(requests: Sequence[GenerationRequest], max_length: int) -> None:
    """Say once how many texts cannot have the length that was asked for, and how many contexts are cut."""
    short = [one for one in requests if one.missing]
    if short:
        least = min(one.length - len(one.prompt) for one in short)
        cut = sum(one.cut > 0 for one in short)
        warn(
            f"{len(short)} of {len(requests)} requests do not fit into {max_length} tokens: their new texts are "
            f"shortened, to {least} tokens at least"
            + (f", and the beginnings of {cut} contexts are left out" * (cut > 0))
        )
