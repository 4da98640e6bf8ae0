"""The information about a file or folder (`info.path_info`) as a table on the terminal.

Sizes have the unit that fits, counts have commas. Rich is imported when it is used.
"""

from __future__ import annotations

import sys
from typing import Any

_COUNTS = ("tokens", "parameters", "non-embedding parameters", "tokens without padding")


def print_info(info: dict[str, Any]) -> None:
    """Print a table of names and values, then a line per checkpoint."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=not sys.stdout.isatty())
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in info.items():
        if name != "checkpoints" and value not in (None, {}, []):
            table.add_row(name, _format_value(name, value))
    console.print(table)
    for entry in info.get("checkpoints", []):
        step = f"step {entry['step']}, " if "step" in entry else ""
        console.print(
            f"  {entry['file']}: {step}{_format_size(entry['size'])}, {entry['state']}", markup=False, highlight=False
        )


def _format_value(name: str, value: Any) -> Any:
    """A value as a person reads it."""
    from rich.text import Text

    if isinstance(value, dict):
        lines = (f"{key}: {_format_value(str(key), item)}".replace("\n", "\n  ") for key, item in value.items())
        return Text("\n".join(lines))
    if name == "size" and isinstance(value, int):
        return Text(f"{_format_size(value)} ({value:,} bytes)")
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, int) and name in _COUNTS:
        return Text(f"{value:,}")
    if isinstance(value, list):
        return Text(", ".join(str(item) for item in value))
    return Text(str(value))


def _format_size(count: int) -> str:
    """Bytes in the unit that fits."""
    amount = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError
