"""A page in the browser on which one watches text being sampled: choose a checkpoint and a sampler, press Generate.

    python scripts/web.py --models quickstart                  every .safetensors below that folder
    python scripts/web.py --models models/mdm-170M-10e18.safetensors models/ar-170M-10e18.safetensors --port 8080

Prints the address to open and serves until Ctrl-C; needs starlette and uvicorn (`./setup.sh web`). Every state of the
sampler is sent as it comes, and the page steps back and forth through them. One generation runs at a time; Stop, or
closing the page, ends it between two states. Only the listed checkpoints can be opened, and only this machine reaches
the page unless --host says otherwise. The page is `lit_gpt/ui/page.html` and loads nothing from elsewhere.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import fail, parse, run


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
        import uvicorn  # noqa: F401
    except ImportError as error:
        fail(f"{error.name} is not installed: ./setup.sh web")

    from lit_gpt.devices import choose_device
    from lit_gpt.ui.page import PageModels, find_checkpoints
    from lit_gpt.ui.page_server import listen, serve

    choose_device(flags.device)
    models = PageModels(find_checkpoints(flags.models), flags.tokenizer, flags.device)
    listening = listen(flags.host, flags.port)
    host = f"[{flags.host}]" if ":" in flags.host else flags.host
    address = f"http://{host}:{listening.getsockname()[1]}/"
    count = len(models.checkpoints)
    print(f"{count} checkpoint{'s' * (count != 1)}: {address} (Ctrl-C ends)", flush=True)
    serve(models, listening, flags.host)


if __name__ == "__main__":
    run(main)
