"""One damaged input in a process of its own, with limits on its time and memory, and what came of it."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_LONGEST_LINE = 2000


@dataclass(frozen=True)
class Limits:
    """Of one input."""

    seconds: float = 60.0
    """Of waiting."""
    more_memory: int = 3 << 30
    """Bytes of addresses beyond what the process has when it begins."""


@dataclass(frozen=True)
class Outcome:
    """What came of an input."""

    kind: str
    """`accepted`, `refused` (in one line), or a failure: `traceback`, `hang`, `memory`, `died`, `line`."""
    text: str
    """The line, or the end of the traceback."""

    @property
    def failed(self) -> bool:
        """Whether the input found a fault."""
        return self.kind not in ("accepted", "refused")

    @property
    def place(self) -> str:
        """Kind and last line of code of this project: equal faults have equal places."""
        lines = [line.strip() for line in self.text.splitlines() if "lit_gpt" in line and "line " in line]
        last = self.text.splitlines()[-1][:80] if self.text else ""
        return f"{self.kind}: {lines[-1] if lines else ''} {last if self.kind != 'line' else last[:30]}"


def run_limited(work: Callable[[], object], limits: Limits) -> Outcome:
    """Do some work in a forked process.

    Args:
        work: reads an input; a ValueError or OSError of one line is a refusal, anything else that is raised a fault.
        limits: of time and memory.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.setsid()
        try:
            outcome = _attempt(work, limits)
            os.write(writing, f"{outcome.kind}\n{outcome.text[-20_000:]}".encode("utf-8", "replace"))
        finally:
            os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], limits.seconds)
    if not ready:
        os.kill(child, signal.SIGKILL)
    with open(reading, "rb") as file:
        content = file.read().decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # whatever it started
    if not ready:
        return Outcome("hang", f"nothing after {limits.seconds:g} s")
    if not content:
        return Outcome("died", f"wait status {status}")
    kind, _, text = content.partition("\n")
    return Outcome(kind, text)


def _attempt(work: Callable[[], object], limits: Limits) -> Outcome:
    """The child's part."""
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + limits.more_memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        work()
    except (ValueError, OSError) as error:
        line = str(error)
        if "\n" in line.strip() or not line.strip() or len(line) > _LONGEST_LINE:
            return Outcome("line", traceback.format_exc())
        return Outcome("refused", line)
    except MemoryError:
        return Outcome("memory", traceback.format_exc())
    except BaseException as error:  # noqa: BLE001 (whatever it is, it is a fault)
        kind = "memory" if "not enough memory" in str(error) or "DefaultCPUAllocator" in str(error) else "traceback"
        return Outcome(kind, traceback.format_exc())
    return Outcome("accepted", "")
