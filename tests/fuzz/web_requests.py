"""Requests to the page's server, damaged: the server itself, in a thread of the process that asks it.

What is sent are bytes, so that headers, paths and lengths can be anything. Afterwards the server must still answer a
request that is in order, and have said nothing of an error of its own.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import random
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from tests.fuzz.commands import load_scripts
from tests.fuzz.mutations import WILD_VALUES, mutate_bytes, mutate_value
from tests.fuzz.readers import FileKind, require
from tests.support.small_models import export_arm_and_mdm

# Seconds without a byte after which an answer is over, or none comes: the server waits for the rest of a request.
_SILENCE_S = 1.0
_SERVER_S = 15.0
_ANSWERS = (200, 307, 400, 404, 405, 409, 413, 414, 422, 426, 431)
_BODY = {
    "checkpoint": "mdm/tiny.safetensors",
    "prompt": "My lord",
    "sampling": {"context_length": 16, "steps": 4, "temperature": 0.5, "seed": 1, "algorithm": "origin", "top_k": 5},
}
_WILD = (
    *WILD_VALUES,
    "___",
    "a ___ b",
    "___999999999",
    "___0",
    "___" + "9" * 5000,
    "___3 " * 300,
    "\u00fc\U0001f600",
    "\r\n",
    "arm/tiny.safetensors",
    "mdm",
    "/etc/passwd",
    "greedy",
    "threshold",
    "entropy",
    "dual",
    "true",
    "1e400",
    4096,
    4097,
)
_HEADS = (
    b"GET /",
    b"POST /",
    b"PUT /api/options",
    b"DELETE /api/generate",
    b"GET /../../etc/passwd",
    b"GET /%2e%2e/%00",
    b"GET //",
    b"GET http://elsewhere/",
    b"OPTIONS *",
    b"CONNECT a:1",
    b"HEAD /api/options",
    b"POST /api/options",
    b"GET /?" + b"a" * 70_000,
    b"PRI *",
    b"\x16\x03\x01\x02\x00\x01",
    b"GET /\xff\xfe",
    b"POST /api/generate/",
    b"POST /api/generate?a=b",
    b"G" * 100_000,
)
_HEADERS = (
    "Content-Length: -1",
    "Content-Length: 99999999999999999999",
    "Content-Length: x",
    "Content-Length: 5",
    "Transfer-Encoding: chunked",
    "Content-Type: text/plain",
    "Content-Type: application/json; charset=x",
    "Content-Type:",
    "Host: elsewhere.example",
    "Host:",
    "Host: 127.0.0.1:99999",
    "Host: [::1",
    "X: " + "a" * 70_000,
    "Expect: 100-continue",
    "Upgrade: websocket\r\nConnection: Upgrade",
    "Content-Encoding: gzip",
    "Range: bytes=0-99999999999",
    "Range: bytes=x",
    "If-Range: \x00",
    "If-None-Match: *",
    "Cookie: \xff",
    "Connection: keep-alive",
    "Accept-Encoding: zstd;q=nan",
    "\x00: \x00",
    " folded",
)


def make_request(folder: Path) -> None:
    """Two models, and a request for one."""
    export_arm_and_mdm(folder, block_size=64)
    (folder / "request").write_bytes(request(json.dumps(_BODY).encode()))


def request(body: bytes, head: bytes = b"POST /api/generate", headers: tuple[str, ...] = ()) -> bytes:
    """A request as it is sent."""
    own = {
        "Host": "127.0.0.1",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    given = {line.split(":")[0] for line in headers}
    lines = [f"{name}: {value}" for name, value in own.items() if name not in given] + list(headers)
    return head + b" HTTP/1.1\r\n" + "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def damage_request(folder: Path, chance: random.Random) -> None:
    """Other JSON values, other bytes, another path, other headers, or another length."""
    kind, body = chance.randrange(10), json.dumps(_BODY).encode()
    if kind <= 3:
        content = request(json.dumps(mutate_value(_BODY, chance, _WILD)).encode())
    elif kind == 4:
        document: Any = json.loads(body)
        document["sampling"][
            chance.choice(("cache", "block_length", "remask", "refresh", "x", "early_stop", "threshold"))
        ] = chance.choice(_WILD)
        document["checkpoint"] = chance.choice(("mdm", "arm")) + "/tiny.safetensors"
        content = request(json.dumps(document).encode())
    elif kind == 5:
        content = request(mutate_bytes(body, chance))
    elif kind == 6:
        content = request(body, chance.choice(_HEADS))
    elif kind == 7:
        content = request(body, headers=tuple(chance.sample(_HEADERS, chance.choice((1, 2)))))
    elif kind == 8:
        content = mutate_bytes(request(body), chance)
    else:
        body = chance.choice(
            (b"[" * 900_000, b'{"a":' * 100_000, b" " * 2_000_000, b'"' + b"a" * 999_000 + b'"', b"", b"\xff\xfe")
        )
        content = request(body)
    (folder / "request").write_bytes(content)


def ask_server(folder: Path) -> None:
    """Start the server, send the request, read the answer, and ask once more.

    Raises:
        ValueError: the answer is a refusal; its status and line.
        AssertionError: another answer, an error in the server's log, or no answer to a good request afterwards.
    """
    from lit_gpt.ui.page import PageModels, find_checkpoints
    from lit_gpt.ui.page_server import listen, serve

    os.chdir(folder)
    log = io.StringIO()
    sys.stdout = sys.stderr = log
    models = PageModels(find_checkpoints(["mdm", "arm"]), None, "cpu")
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    threading.Thread(target=serve, args=(models, listening, "127.0.0.1"), daemon=True).start()
    status, answer = _send(port, Path("request").read_bytes())
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SERVER_S)
    connection.request("POST", "/api/generate", json.dumps(_BODY), {"Content-Type": "application/json"})
    good = connection.getresponse().read().splitlines()
    require(bool(json.loads(good[-1]).get("done")), f"a good request is answered: {good[-1][:300]!r}")
    require("Traceback" not in log.getvalue(), f"the server said: {log.getvalue()[-1500:]}")
    require(status is None or status in _ANSWERS, f"status {status}: {answer[:300]!r}")
    require(b"sampler failed" not in answer, f"{answer[-300:]!r}")
    if status != 200:
        line = answer[:300].decode("utf-8", "replace").replace("\n", " ").strip()
        raise ValueError(f"status {status}: {line}")


def _send(port: int, content: bytes) -> tuple[int | None, bytes]:
    """Status and body of the answer to some bytes; no status where there is no answer."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=_SILENCE_S) as connection:
        with contextlib.suppress(ConnectionError, TimeoutError):
            connection.sendall(content)
        with contextlib.suppress(ConnectionError, TimeoutError):
            while part := connection.recv(1 << 16):
                answer += part
                connection.settimeout(_SILENCE_S)
            # Nothing more.
    head, _, body = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    words = head.split(maxsplit=2)
    return (int(words[1]) if len(words) > 1 and words[1].isdigit() else None), body


REQUEST_KINDS = {"requests": FileKind(make_request, damage_request, ask_server, load_scripts)}
