"""The validation losses of several models as a table on the terminal.

A bound is marked as one: an MDM's likelihood is not known exactly. Rich is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_loss_table(results: Mapping[str, Mapping[str, Any]], title: str, console: Console) -> None:
    """Print loss, perplexity and bits per byte.

    Args:
        results: by the models' names, a run's result: `val_loss`, `val_ppl`, `val_bits_per_byte`, and `val_is_bound`.
        title: above the table.
        console: where to.
    """
    from rich.table import Table

    table = Table(title=title)
    for column in ("", "loss, nats/token", "perplexity/token", "bits per byte"):
        table.add_column(column, justify="right" if column else "left")
    for name, result in results.items():
        bound = "<= " if result["val_is_bound"] else ""
        cells = (result["val_loss"], result["val_ppl"], result["val_bits_per_byte"])
        table.add_row(name, *(f"{bound}{cell:.3f}" for cell in cells))
    console.print(table)
    console.print("<= marks an upper bound: an MDM's likelihood is not known exactly.\n")
