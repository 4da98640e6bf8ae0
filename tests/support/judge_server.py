"""A judge on this machine: an HTTP server that speaks OpenAI's chat completions and Anthropic's messages."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-test-0123456789abcdef"
Answer = tuple[int, dict[str, Any] | str, dict[str, str]]
"""Status, body, headers."""


def openai_error(message: str, **more: Any) -> dict[str, Any]:
    """An error as OpenAI words it."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None, **more}}


@dataclass
class FakeJudge:
    """What the server does, and what it was asked."""

    url: str = ""
    judge: Callable[[str], str] = lambda prompt: "Good. Rating: [[7]]"
    """From a user's prompt to the judgment."""
    trouble: Callable[[int, dict[str, Any]], Answer | None] = lambda number, body: None
    """From a request's number (from 1) and body to another answer than a judgment."""
    delay_s: float = 0.0
    finish: str = "stop"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    """How often each user's prompt got a judgment."""
    most_at_once: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Answer:
        """What is sent back."""
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            number = len(self.bodies)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.delay_s)
            if trouble := self.trouble(number, body):
                return trouble
            user = body["messages"][-1]["content"]
            with self._lock:
                self.answered[user] += 1
            text = self.judge(user)
        finally:
            with self._lock:
                self._at_once -= 1
        if path == "/v1/chat/completions":
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": self.finish}
            return 200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}, {}
        assert path == "/v1/messages", path
        reply = {"id": "1", "type": "message", "role": "assistant", "model": "m", "stop_sequence": None}
        usage = {"input_tokens": 1, "output_tokens": 1}
        content = [{"type": "text", "text": text[:4]}, {"type": "text", "text": text[4:]}]
        stop = "max_tokens" if self.finish == "length" else "end_turn"
        return 200, {**reply, "content": content, "stop_reason": stop, "usage": usage}, {}


@contextmanager
def serve_fake_judge() -> Iterator[FakeJudge]:
    """A server of this kind, for as long as the context lasts."""
    fake = FakeJudge()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each answer's second part waits 40 ms for the first one's receipt

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, answer, more = fake.answer(self.path, headers, body)
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            try:
                self.send_response(status)
                for name, value in {
                    "content-type": "application/json",
                    "content-length": str(len(data)),
                    **more,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                self.close_connection = True  # the client was stopped

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    server = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
