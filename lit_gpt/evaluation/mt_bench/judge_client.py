"""A judge over the network as one function, and many requests at once.

Decisions: the clients' own retries are used (exponential back-off with jitter, Retry-After, on connection errors, 408,
409, 429 and 5xx); what is left is either one request's failure or a refusal that all others would share, which stops the
work. Parameters that newer models refuse are changed by the refusal, once for a judge. The key is in no message.
Threads are daemons, so that Ctrl-C does not wait for answers.
"""

from __future__ import annotations

import importlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

RETRIES = 10
"""Of one request: with the clients' pauses, which double up to 8 s, about a minute."""
# Of one request; judges that think before they write take minutes.
_TIMEOUT_S = 600.0
_LONGEST_REASON = 300
# 4xx answers that are about one prompt alone, by the server's code or by words of its message.
_OF_ONE_PROMPT = ("context_length_exceeded", "content_filter", "string_above_max_length", "prompt is too long")
_OUT_OF_MONEY = "insufficient_quota"
_WORTH_RETRYING = (408, 409, 429)

_log = logging.getLogger("lit_gpt")
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class JudgeError(Exception):
    """A request failed for good; its argument is the reason."""


class JudgeRefused(JudgeError):
    """A request failed in a way that any other would, too."""


@dataclass(frozen=True)
class JudgeReply:
    """A judge's answer."""

    text: str
    is_cut: bool
    """Whether it ended for want of tokens."""


class Judge:
    """A model that is asked for its judgment; threads may share it.

    Args:
        model: `claude-...` is asked by Anthropic's API (ANTHROPIC_API_KEY, ANTHROPIC_BASE_URL), any other by OpenAI's
            (OPENAI_API_KEY, OPENAI_BASE_URL for compatible servers).
        max_tokens: of a reply.
        retries: of a request, before it counts as failed.

    Raises:
        ValueError: there is no key, or none that can be sent; the client is not installed.
    """

    def __init__(self, model: str, max_tokens: int, retries: int = RETRIES) -> None:
        self.model = model
        # Greedy, as published; replaced as a whole by _adapt.
        self._parameters: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0}
        self._changing = threading.Lock()
        self._is_claude = is_claude(model)
        self._key = _read_key("ANTHROPIC" if self._is_claude else "OPENAI", model)
        self._library: Any = _library("anthropic" if self._is_claude else "openai")
        client = self._library.Anthropic if self._is_claude else self._library.OpenAI
        self._client = client(api_key=self._key, max_retries=retries, timeout=_TIMEOUT_S)

    def __call__(self, system: str, user: str) -> JudgeReply:
        """Ask.

        Args:
            system: the system prompt.
            user: the user's.

        Raises:
            JudgeRefused: the key, the model's name or the form of the request is refused.
            JudgeError: anything else that retries did not mend.
        """
        ask = self._ask_claude if self._is_claude else self._ask_openai
        while True:
            parameters = self._parameters
            try:
                text, is_cut = ask(system, user, parameters)
                # Half of a character, which no file could hold, becomes a question mark.
                return JudgeReply(text.encode(errors="replace").decode(), is_cut)
            except self._library.APIError as error:
                if not self._adapt(error, parameters):
                    raise self._explain(error) from None
            except (AttributeError, IndexError, TypeError, ValueError):
                raise JudgeError(f"{self.model}: the server's answer is not of the judge's interface") from None

    def _ask_openai(self, system: str, user: str, parameters: dict[str, Any]) -> tuple[str, bool]:
        """By OpenAI's chat completions; returns the text and whether it was cut."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        answer = self._client.chat.completions.create(model=self.model, messages=messages, **parameters)
        choice = answer.choices[0]
        return choice.message.content or "", choice.finish_reason == "length"

    def _ask_claude(self, system: str, user: str, parameters: dict[str, Any]) -> tuple[str, bool]:
        """By Anthropic's messages; returns the text and whether it was cut."""
        answer = self._client.messages.create(
            model=self.model,
            **({"system": system} if system else {}),
            messages=[{"role": "user", "content": user}],
            max_tokens=parameters["max_tokens"],
            # Not every version of the client knows a temperature; this passes it on.
            extra_body={name: value for name, value in parameters.items() if name != "max_tokens"},
        )
        text = "".join(block.text for block in answer.content if block.type == "text")
        return text, answer.stop_reason == "max_tokens"

    def _adapt(self, error: Exception, used: dict[str, Any]) -> bool:
        """Leave out or rename a parameter that the model refuses; whether it is worth asking again."""
        if getattr(error, "status_code", None) != 400:
            return False
        parameter, words = getattr(error, "param", None), str(error)
        with self._changing:
            if self._parameters is not used:
                return True  # another thread met the same refusal first
            now = dict(used)
            if "max_tokens" in now and (parameter == "max_tokens" or "max_completion_tokens" in words):
                if self._is_claude:
                    return False
                now["max_completion_tokens"] = now.pop("max_tokens")
                change = "its limit of tokens is sent as max_completion_tokens"
            elif "temperature" in now and (parameter == "temperature" or "temperature" in words):
                del now["temperature"]
                change = "it takes no temperature 0 and judges at its own; judgments may differ from run to run"
            else:
                return False
            self._parameters = now
        _log.warning("%s: %s", self.model, change)
        return True

    def _explain(self, error: Any) -> JudgeError:
        """What a client raised, as a line without the key."""
        status, body = getattr(error, "status_code", None), getattr(error, "body", None)
        inner = body.get("error", body) if isinstance(body, dict) else None
        said = inner if isinstance(inner, dict) else {}
        code, reason = str(said.get("code")), str(said.get("message") or error)
        if error.__cause__ is not None:
            reason += f" ({error.__cause__})"
        # The key before the cut: a part of it would no longer be found.
        reason = reason.replace(self._key, "[the key]")[:_LONGEST_REASON]
        if status is None:
            return JudgeError(f"{self.model}: {reason}")
        is_final = 400 <= status < 500 and status not in _WORTH_RETRYING or code == _OUT_OF_MONEY
        about_one = any(words == code or words in reason for words in _OF_ONE_PROMPT)
        kind = JudgeRefused if is_final and not about_one else JudgeError
        return kind(f"{self.model}: the server answered {status}: {reason}")


def is_claude(model: str) -> bool:
    """Whether a judge is asked by Anthropic's interface."""
    return model.startswith("claude")


def _library(name: str) -> Any:
    """A client's package, which not every installation has.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"this judge is asked through the package {name}: ./setup.sh judge installs it ({error})"
        ) from None


def _read_key(provider: str, model: str) -> str:
    """The key from the environment, without white space around it.

    Raises:
        ValueError: there is none, or it holds what no header can.
    """
    key = os.environ.get(f"{provider}_API_KEY", "").strip()
    if not key:
        raise ValueError(
            f"no key for the judge {model}: set {provider}_API_KEY (to any word for a server at {provider}_BASE_URL "
            "that asks for none)"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{provider}_API_KEY holds a character that no key has: copy the key alone")
    return key


def in_threads(
    work: Callable[[ItemT], ResultT], items: Sequence[ItemT], threads: int
) -> Iterator[tuple[ItemT, ResultT | JudgeError]]:
    """Work on items in several threads at once.

    Args:
        work: what to do with each.
        items: what to work on, begun in this order.
        threads: how many at once.

    Yields:
        Each item with its result, or the `JudgeError` that `work` raised, as they are finished. After Ctrl-C or a
        refusal no item is begun, and those that are finished come before the exception.

    Raises:
        JudgeRefused: `work` raised it.
        KeyboardInterrupt: the user stopped it.
    """
    finished: queue.SimpleQueue[tuple[ItemT, Any]] = queue.SimpleQueue()
    todo: queue.SimpleQueue[ItemT] = queue.SimpleQueue()
    stopped = threading.Event()
    for item in items:
        todo.put(item)

    def serve() -> None:
        while not stopped.is_set():
            try:
                item = todo.get_nowait()
            except queue.Empty:
                return
            try:
                finished.put((item, work(item)))
            except BaseException as error:
                if type(error) is not JudgeError:
                    stopped.set()
                finished.put((item, error))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=serve, daemon=True).start()
    try:
        for _ in items:
            item, result = finished.get()
            if isinstance(result, BaseException) and type(result) is not JudgeError:
                raise result
            yield item, result
    except (KeyboardInterrupt, JudgeRefused):
        stopped.set()
        while not finished.empty():
            item, result = finished.get_nowait()
            if not isinstance(result, BaseException):
                yield item, result
        raise
    finally:
        stopped.set()
