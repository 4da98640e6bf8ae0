"""Pages of results: the command that gives them, and that a short look never replaces those of the repository.

Benchmarks and studies write such pages; all of them ask here.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
"""The repository's own pages."""


def changed_flags(flags: Any, but: Collection[str] = ()) -> dict[str, Any]:
    """The flags of a dataclass that are not their defaults, by name.

    Args:
        flags: every field has a default.
        but: names that are left out.
    """
    default = type(flags)()
    names = [field.name for field in dataclasses.fields(flags) if field.name not in but]
    return {name: getattr(flags, name) for name in names if getattr(flags, name) != getattr(default, name)}


def command_line(script: str, flags: Any, but: Collection[str] = ()) -> str:
    """The command that runs a script with these flags, as a user types it; arguments as `changed_flags`."""
    words = ["python", script]
    for name, value in changed_flags(flags, but).items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(words)


def check_page(flag: str, page: Path, full: bool, what: str = "a full run") -> None:
    """Refuse to write a page of the repository's results by a short look.

    Args:
        flag: names the page.
        page: the file.
        full: whether the run is the one that the page is about.
        what: that run.

    Raises:
        ValueError: it is not.
    """
    if not full and page.resolve().parent == RESULTS:
        raise ValueError(f"--{flag} {page}: only {what} may write this page; name another one")
