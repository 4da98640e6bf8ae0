"""A page in the browser on which one watches text being sampled: choose a checkpoint and a sampler, press Generate.

    python scripts/web.py --models quickstart                  every .safetensors below that folder
    python scripts/web.py --models models/mdm-170M-10e18.safetensors models/ar-170M-10e18.safetensors --port 8080

Prints the address to open and serves until Ctrl-C; needs starlette and uvicorn (`./setup.sh web`). Every state of the
sampler is sent as it comes, and the page steps back and forth through them. One generation runs at a time; Stop, or
closing the page, ends it between two states. Only the listed checkpoints can be opened, and only this machine reaches
the page unless --host says otherwise. The page is `web_page.html` beside this script and loads nothing from elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import fail, parse, run, warn
from lit_gpt.sampling.settings import Sampling

if TYPE_CHECKING:
    import socket

    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

    from lit_gpt.config import Config
    from lit_gpt.sampling.sequence import State
    from lit_gpt.ui.completion import Completer, CompletionRequest

PAGE = Path(__file__).with_name("web_page.html")
_MOST_STEPS = 4096
"""States that a page can hold and a person would look through."""
_LONGEST_REQUEST = 1_000_000
"""Bytes; a prompt that any model could read is far shorter."""
_PATIENCE_S = 5.0
"""How long a request waits for one that was stopped a moment ago and still computes its last state."""
_DEFAULT_LENGTH = 128
_USER_ERROR, _BUSY = 422, 409
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
Described = tuple[str, "Config"]  # a checkpoint's kind (`arm` or `mdm`) and its model's shape


@dataclass
class Flags:
    """What to offer, and where."""

    models: list[str] = field(default_factory=list)
    """Checkpoints to choose from: folders (with their subfolders) and .safetensors files."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen on. Whoever reaches another one may use the page: it knows no passwords."""
    tokenizer: str | None = None
    """Tokenizer of all checkpoints; by default each one's own record says it."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default a GPU if there is one."""


def main() -> None:
    """Find the checkpoints, then serve."""
    flags = parse(Flags, None, __doc__)
    if not flags.models:
        fail("which checkpoints? python scripts/web.py --models FOLDER_OR_FILES")
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        fail(f"{error.name} is not installed: ./setup.sh web")

    from lit_gpt.devices import choose_device

    choose_device(flags.device)
    checkpoints = find_checkpoints(flags.models)
    listening = _listen(flags.host, flags.port)
    server = Server(checkpoints, flags.tokenizer, flags.device)
    app = make_app(server, flags.host)
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=5))
    server.leaving = lambda: running.should_exit
    host = f"[{flags.host}]" if ":" in flags.host else flags.host
    address = f"http://{host}:{listening.getsockname()[1]}/"
    print(f"{len(checkpoints)} checkpoint{'s' * (len(checkpoints) != 1)}: {address} (Ctrl-C ends)", flush=True)
    running.run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    import socket

    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: {error}; --port 0 takes a free one") from error


# --- checkpoints --------------------------------------------------------------------------------------------------


def find_checkpoints(sources: Sequence[str]) -> dict[str, Described]:
    """All models in the `.safetensors` files at or below some paths, by path.

    Raises:
        FileNotFoundError: a path is missing, or there is no model at all.
    """
    found: dict[str, Described] = {}
    for source in map(Path, sources):
        if not source.exists():
            raise FileNotFoundError(f"--models {source}: no such file or folder")
        for path in sorted(source.rglob("*.safetensors")) if source.is_dir() else [source]:
            try:
                found[str(path)] = _inspect(path)
            except (ValueError, OSError) as error:
                warn(f"passed over: {error}")
    if not found:
        raise FileNotFoundError(f"--models {' '.join(sources)}: no model in any .safetensors file there")
    return found


def _inspect(path: Path) -> Described:
    """A file's kind and config, from its record or its shapes; the weights are not read."""
    import torch
    from safetensors import safe_open

    from lit_gpt.checkpoints.export import read_record
    from lit_gpt.checkpoints.run_files import clean_names
    from lit_gpt.checkpoints.weights import infer_config, infer_kind, of_family

    if record := read_record(path):
        return record.kind, record.config
    with safe_open(path, framework="pt") as file:
        shapes = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
    state = of_family(path, clean_names(shapes))
    return infer_kind(path, state), infer_config(path, state)


@lru_cache(maxsize=2)
def load(path: str, changed_ns: int, tokenizer: str | None, device: str | None) -> Completer:
    """A checkpoint's model and tokenizer; the last two stay in memory, unless a file has changed meanwhile."""
    from lit_gpt.checkpoints.loaded import load_model
    from lit_gpt.ui.completion import Completer

    return Completer(load_model(path, tokenizer=tokenizer, device=device, dtype="float32"))


# --- the form -----------------------------------------------------------------------------------------------------


def controls() -> list[dict[str, Any]]:
    """The form's controls: the row's length, and whatever else `Sampling` can be told.

    Returns:
        Name, type, default (None: none, or the page decides), choices, help, and the kind of model (`only`) and the
        algorithm (`with`) that alone have a use for it.
    """
    length = "Tokens of the finished row, prompt included; a text with gaps keeps its own."
    result = [_control("context_length", "int", None, {"text": length})]
    return result + [_control(one.name, str(one.type), one.default, one.metadata) for one in fields(Sampling)]


def _control(name: str, kind: str, default: Any, about: Mapping[str, Any]) -> dict[str, Any]:
    """One control; `about` is as the metadata of a field of `Sampling`."""
    control = {"name": name, "type": kind, "default": default, "choices": list(about.get("choices", ()))}
    return control | {"only": about.get("kind"), "with": about.get("algorithm"), "help": about["text"]}


def read_settings(given: Any) -> dict[str, Any]:
    """What the page sent, as arguments of `Sampling` and perhaps a `context_length`; what is empty keeps its default.

    Raises:
        ValueError: an unknown name, or a value of another type.
    """
    known = {control["name"]: control for control in controls()}
    if not isinstance(given, dict):
        raise ValueError(f"sampling: expected an object, got {type(given).__name__}")
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"unknown parameter {', '.join(unknown)}: known are {', '.join(known)}")
    result = {name: _read_value(known[name], value) for name, value in given.items() if value not in (None, "")}
    if result.get("steps", 0) > _MOST_STEPS:
        raise ValueError(f"steps is {result['steps']}: this page shows at most {_MOST_STEPS}")
    return result


def _read_value(control: dict[str, Any], value: Any) -> Any:
    """One value, as a JSON value of its type or written out."""
    kind = control["type"]
    try:
        if kind == "bool":
            return {"true": True, "false": False}[str(value).lower()]
        if kind == "str" and isinstance(value, str):
            return value
        whole = not isinstance(value, float) or value.is_integer()
        if kind in ("int", "float") and not isinstance(value, bool) and (whole or kind == "float"):
            return int(value) if kind == "int" else float(value)
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{control['name']}: expected {kind}, got {str(value)[:40]!r}")


# --- generating ---------------------------------------------------------------------------------------------------


class Job:
    """A generation that has passed all checks; a state is told as what changed since the one before."""

    def __init__(self, name: str, completer: Completer, typed: CompletionRequest, sampling: Sampling) -> None:
        """Nothing is computed yet; ValueError if the prompt or the settings do not suit the model."""
        self.name, self._completer, self._typed = name, completer, typed
        self._states = completer.states(typed, sampling)
        self._last: State | None = None
        self._row: list[tuple[int, float]] = []

    def step(self) -> dict[str, Any] | None:
        """The next state, or None; a change is [position, text or None for a mask, confidence, token id]."""
        from lit_gpt.ui.trajectory import token_texts

        state = next(self._states, None)
        if state is None:
            return None
        tokenizer, mask_id = self._completer.loaded.tokenizer, self._completer.loaded.model.config.mask_id
        ids, confidence = state.tokens()[0].tolist(), state.confidences()[0].tolist()
        before = [*self._row, *[(-1, 0.0)] * (len(ids) - len(self._row))]
        self._last, self._row = state, [(token, round(value, 4)) for token, value in zip(ids, confidence, strict=True)]
        changed = [position for position in range(len(ids)) if self._row[position] != before[position]]
        texts = token_texts(tokenizer, [ids[position] for position in changed], mask_id)
        if changed[:1] == [0] and texts[0].startswith(" ") and not tokenizer.decode(ids[:1]).startswith(" "):
            texts[0] = texts[0][1:]  # the dummy space that the tokenizer puts before a text
        changes: list[list[Any]] = []
        for position, text in zip(changed, texts, strict=True):
            token, value = self._row[position]
            changes.append([position, None if token == mask_id else text, value, token])
        return {"step": state.step, "changes": changes, "masked": ids.count(mask_id)}

    def text(self) -> str:
        """What stands there now, as text."""
        return self._completer.text(self._last, self._typed) if self._last else ""


class Server:
    """One generation at a time, in one thread of its own."""

    def __init__(self, checkpoints: dict[str, Described], tokenizer: str | None, device: str | None) -> None:
        """Nothing is loaded before the first request, and never anything but these checkpoints."""
        self._checkpoints, self._tokenizer, self._device = checkpoints, tokenizer, device
        self._turn, self._worker = asyncio.Lock(), ThreadPoolExecutor(1)
        self.leaving: Callable[[], bool] = bool  # false, until `main` says otherwise

    async def options(self, _: Request) -> JSONResponse:
        """What can be chosen."""
        found = [
            {"name": name, "kind": kind, "size": f"{config.size_in_millions:.3g}M", "block_size": config.block_size}
            for name, (kind, config) in self._checkpoints.items()
        ]
        return _json({"checkpoints": found, "controls": controls(), "busy": self._turn.locked()})

    async def generate(self, request: Request) -> Response:
        """Sample, and send a line of JSON per state; the last one has the text. Mistakes are a line before the first."""
        try:
            wanted = await _read_request(request)
            await asyncio.wait_for(self._turn.acquire(), _PATIENCE_S)
        except ValueError as error:
            return _json({"error": str(error)}, _USER_ERROR)
        except TimeoutError:
            return _json({"error": "another generation is running here: stop it, or wait for its end"}, _BUSY)
        try:
            job = await self._in_worker(lambda: self._begin(wanted))
        except BaseException as error:
            self._turn.release()
            if isinstance(error, ValueError | OSError):
                return _json({"error": " ".join(str(error).split())}, _USER_ERROR)
            raise
        return _streaming(self._lines(job, request), self._turn.release)

    def _begin(self, wanted: dict[str, Any]) -> Job:
        """Load and check everything.

        Raises:
            ValueError: whatever the user can get wrong.
            OSError: a file has gone.
        """
        name, prompt = str(wanted.get("checkpoint")), wanted.get("prompt", "")
        if name not in self._checkpoints:
            raise ValueError(f"no checkpoint {name[:80]!r}: choose one of the list")
        if not isinstance(prompt, str):
            raise ValueError(f"prompt: expected text, got {type(prompt).__name__}")
        length = min(_DEFAULT_LENGTH, self._checkpoints[name][1].block_size)
        settings = read_settings(wanted.get("sampling", {}))
        length = settings.pop("context_length", length)
        # Its mistakes are told before a large model is read.
        sampling = Sampling(**settings)
        completer = load(name, Path(name).stat().st_mtime_ns, self._tokenizer, self._device)
        return Job(name, completer, completer.request(prompt, length), sampling)

    async def _lines(self, job: Job, request: Request) -> AsyncIterator[str]:
        """The body of an answer; ends early when nobody reads it any more."""
        started, count, ending = time.monotonic(), 0, "stopped"
        try:
            while not (self.leaving() or await request.is_disconnected()):
                state = await self._in_worker(job.step)
                elapsed_s = round(time.monotonic() - started, 3)
                yield json.dumps(state or {"done": True, "text": job.text(), "elapsed_s": elapsed_s}) + "\n"
                if state is None:
                    ending = "finished"
                    break
                count += 1
        except Exception as error:
            # The answer has begun: its status can no longer say so.
            ending = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
            yield json.dumps({"error": f"the sampler {ending}"}) + "\n"
        finally:
            print(f"{Path(job.name).name}: {count} states in {time.monotonic() - started:.1f} s, {ending}", flush=True)

    async def _in_worker(self, work: Callable[[], Any]) -> Any:
        """Run in the one thread that touches models: what is left of a stopped request ends before the next begins."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)


async def _read_request(request: Request) -> dict[str, Any]:
    """The body, if it is a JSON object of reasonable length and says so (which other sites' pages cannot)."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _LONGEST_REQUEST:
            raise ValueError(f"the request is longer than {_LONGEST_REQUEST:,} bytes: shorten the prompt")
    try:
        wanted = json.loads(body)
    except (ValueError, RecursionError):
        wanted = None
    if not isinstance(wanted, dict) or request.headers.get("content-type") != "application/json":
        raise ValueError("expected a JSON object with checkpoint, prompt and sampling, of type application/json")
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


def make_app(server: Server, host: str) -> Starlette:
    """The page and its two questions; on a local host no other name is answered, which a site could point here."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import FileResponse
    from starlette.routing import Route

    async def page(_: Request) -> Response:
        headers = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff", "cache-control": "no-store"}
        return FileResponse(PAGE, media_type="text/html", headers=headers)

    local = host == "localhost" or host.startswith("127.")
    names = ["localhost", "127.0.0.1", host] if local else ["*"]
    routes = [
        Route("/", page),
        Route("/api/options", server.options),
        Route("/api/generate", server.generate, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=names)])


if __name__ == "__main__":
    run(main)
