"""The web page's HTTP server: `/` is the page, `/api/options` what can be chosen, `/api/generate` a generation as it runs.

One generation runs at a time, in one thread of its own; it ends between two states when nobody reads it any more. The
page is `page.html` beside this module and loads nothing from elsewhere; pages of other sites cannot ask. Starlette and
uvicorn are imported when they are used.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.files import parse_json
from lit_gpt.ui.page import Generation, PageModels, form_controls

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

PAGE = Path(__file__).with_name("page.html")
_MAX_REQUEST_BYTES = 1_000_000
"""A prompt that any model could read is far shorter."""
_WAIT_S = 5.0
"""How long a request waits for one that was stopped a moment ago and still computes its last state."""
_USER_ERROR, _BUSY = 422, 409
_CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address.

    Raises:
        ValueError: the address is taken, unknown or not allowed.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: {error}; --port 0 takes a free one") from error


def serve(models: PageModels, listening: socket.socket, host: str) -> None:
    """Serve the page until Ctrl-C; a generation that runs then ends after its next state."""
    import uvicorn

    page = PageServer(models)
    config = uvicorn.Config(
        make_app(page, listening, host), log_level="warning", lifespan="off", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    page.is_ending = lambda: server.should_exit
    server.run(sockets=[listening])


class PageServer:
    """The answers to the page's requests."""

    def __init__(self, models: PageModels) -> None:
        """Nothing is loaded before the first request."""
        self._models = models
        self._lock, self._worker = asyncio.Lock(), ThreadPoolExecutor(1)
        self.is_ending: Callable[[], bool] = bool
        """Whether generations should end; false, until `serve` says otherwise."""

    async def options(self, _: Request) -> JSONResponse:
        """What can be chosen."""
        busy = self._lock.locked()
        return _json({"checkpoints": self._models.listing(), "controls": form_controls(), "busy": busy})

    async def generate(self, request: Request) -> Response:
        """Sample, and send a line of JSON per state; the last one has the text. Mistakes are a line before the first."""
        try:
            wanted = await _read_request(request)
            await asyncio.wait_for(self._lock.acquire(), _WAIT_S)
        except ValueError as error:
            return _json({"error": str(error)}, _USER_ERROR)
        except TimeoutError:
            return _json({"error": "another generation is running here: stop it, or wait for its end"}, _BUSY)
        try:
            generation = await self._in_worker(lambda: self._models.begin(wanted))
        except BaseException as error:
            self._lock.release()
            if isinstance(error, ValueError | OSError):
                return _json({"error": " ".join(str(error).split())}, _USER_ERROR)
            raise
        return _streaming(self._lines(generation, request), self._lock.release)

    async def _lines(self, generation: Generation, request: Request) -> AsyncIterator[str]:
        """The body of an answer; ends early when nobody reads it any more."""
        started, count, ending = time.monotonic(), 0, "stopped"
        try:
            while not (self.is_ending() or await request.is_disconnected()):
                state = await self._in_worker(generation.next_state)
                elapsed_s = round(time.monotonic() - started, 3)
                yield json.dumps(state or {"done": True, "text": generation.text(), "elapsed_s": elapsed_s}) + "\n"
                if state is None:
                    ending = "finished"
                    break
                count += 1
        except Exception as error:
            # The answer has begun: its status can no longer say so.
            ending = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
            yield json.dumps({"error": f"the sampler {ending}"}) + "\n"
        finally:
            name, elapsed_s = Path(generation.name).name, time.monotonic() - started
            print(f"{name}: {count} states in {elapsed_s:.1f} s, {ending}", flush=True)

    async def _in_worker(self, work: Callable[[], Any]) -> Any:
        """Run in the one thread that touches models: what is left of a stopped request ends before the next begins."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)


async def _read_request(request: Request) -> dict[str, Any]:
    """The body, if it is a JSON object of reasonable length and says so (which other sites' pages cannot)."""
    from starlette.requests import ClientDisconnect

    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > _MAX_REQUEST_BYTES:
                raise ValueError(f"the request is longer than {_MAX_REQUEST_BYTES:,} bytes: shorten the prompt")
    except ClientDisconnect:
        raise ValueError("the request ended before its body did") from None
    expected = "expected a JSON object with checkpoint, prompt and sampling, of type application/json"
    try:
        wanted = parse_json(body)
    except ValueError as error:
        raise ValueError(f"{expected} ({error})") from error
    if not isinstance(wanted, dict) or request.headers.get("content-type") != "application/json":
        raise ValueError(expected)
    return wanted


def _json(value: dict[str, Any], status: int = 200) -> JSONResponse:
    """An answer that no cache keeps."""
    from starlette.responses import JSONResponse

    return JSONResponse(value, status, {"cache-control": "no-store"})


def _streaming(lines: AsyncIterator[str], at_end: Callable[[], None]) -> Response:
    """An answer that comes line by line, and what to do after it, however it ends."""
    from starlette.requests import ClientDisconnect
    from starlette.responses import StreamingResponse
    from starlette.types import Receive, Scope, Send

    class Streaming(StreamingResponse):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            try:
                with contextlib.suppress(ClientDisconnect, asyncio.CancelledError):
                    await super().__call__(scope, receive, send)
            finally:
                at_end()

    return Streaming(lines, media_type="application/x-ndjson", headers={"cache-control": "no-store"})


def make_app(server: PageServer, listening: socket.socket, host: str) -> Starlette:
    """The page and its two requests; what only this machine reaches answers to its names alone: a site could point others here.

    Args:
        server: the answers.
        listening: where they are asked for.
        host: how the user wrote its address.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import FileResponse
    from starlette.routing import Route

    async def page(_: Request) -> Response:
        headers = {
            "content-security-policy": _CONTENT_POLICY,
            "x-content-type-options": "nosniff",
            "cache-control": "no-store",
        }
        return FileResponse(PAGE, media_type="text/html", headers=headers)

    address = ipaddress.ip_address(listening.getsockname()[0])
    # Browsers write IPv6 addresses in brackets, and shortened.
    names = ["localhost", "127.0.0.1", "[::1]", str(address), host] if address.is_loopback else ["*"]
    routes = [
        Route("/", page),
        Route("/api/options", server.options),
        Route("/api/generate", server.generate, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=names)])
