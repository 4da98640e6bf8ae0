"""What several benchmarks need: sides that do not share a process, and tables.

A side of a comparison runs in a process of its own, which works when it is told to, so that none inherits another's
memory, threads or settings of the C library.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from typing import Any


class OwnProcess:
    """A function that is made, and called, in a process of its own.

    Args:
        build: makes the function there; a module's own, since it is sent by name.
        *arguments: of `build`.
    """

    def __init__(self, build: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, build, arguments), daemon=True)
        self._process.start()
        # Held by the child alone, so that its end is heard here.
        other.close()

    def run(self, *arguments: Any) -> Any:
        """Call the function there; returns what it returns."""
        self._connection.send(arguments)
        return self._connection.recv()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


def _serve(connection: Any, build: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    work = build(*arguments)
    # The other side has ended, or was interrupted.
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            connection.send(work(*connection.recv()))


def table(heads: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(line[i]) for line in [heads, *body]) for i in range(len(heads))]
    lines = [heads, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def print_table(heads: list[str], body: list[list[str]]) -> None:
    """Print a `table`."""
    print(table(heads, body), flush=True)
