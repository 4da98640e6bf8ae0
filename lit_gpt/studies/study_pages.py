"""What the pages of all studies have: where they go, the command and the commit, tables, and the numbers as CSV."""

from __future__ import annotations

import csv
import io
import math
import platform
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_gpt.evaluation.result_pages import changed_flags, check_page, command_line
from lit_gpt.evaluation.versions import commit
from lit_gpt.files import write_file
from lit_gpt.likelihood.decision import student_tail
from lit_gpt.pipeline import ROOT

FALSE_VERDICTS = 0.05
"""Chance that a page whose comparisons all have no effect says that there is one."""
_NOT_SETTINGS = ("out", "docs")


def report_folder(flags: Any, page: str) -> Path:
    """Where a study's page is written: docs/results, or `--out` where a flag makes it another study; `--docs` decides.

    Args:
        flags: the study's, `out` and `docs` among them.
        page: its file name.

    Raises:
        ValueError: it would replace the repository's, which is another study's.
    """
    whole = not changed_flags(flags, but=_NOT_SETTINGS)
    folder = Path(flags.docs or ("docs/results" if whole else flags.out))
    check_page("docs", folder / page, whole, "the study as it is, with no other flag,")
    return folder


def typed(command: Sequence[object]) -> str:
    """A command as a user types it in this project's folder."""
    return shlex.join(["python", *(str(word).replace(f"{ROOT}/", "") for word in command)])


def written_by(script: str, flags: Any) -> str:
    """The command, the day and the commit, for the head of a page."""
    return f"`{command_line(script, flags)}` on {time.strftime('%Y-%m-%d')}, commit {(commit() or 'unknown')[:8]}"


def processor_name() -> str:
    """The processor's name, as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row has the names of the columns."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of the same keys, which are the first line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, lambda file: file.write(text.getvalue().encode()))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error from the values' spread; NaN for a single value."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def tell_apart(differences: Sequence[tuple[float, float, int]], level: float = FALSE_VERDICTS) -> list[bool]:
    """Which of several differences are not 0, by Student's t and Holm's procedure.

    Args:
        differences: each with its standard error and the error's degrees of freedom; one whose error is not known, by NaN
            or by no degree of freedom, is not told from 0.
        level: chance that any difference is told from 0 where none is.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    chances = [_difference_by_chance(*one) for one in differences]
    order = sorted(range(len(chances)), key=chances.__getitem__)
    told = [False] * len(chances)
    for rank, number in enumerate(order):
        if chances[number] > level / (len(chances) - rank):
            break
        told[number] = True
    return told


def _difference_by_chance(difference: float, error: float, freedom: int) -> float:
    """Two-sided p-value."""
    if difference == 0 or math.isnan(error) or freedom < 1:
        return 1.0
    return 2 * student_tail(abs(difference) / error, freedom) if error > 0 else 0.0


def with_error(mean: float, error: float, digits: int = 3, sign: bool = False) -> str:
    """`1.234 ± 0.005`; without an error where it is not known."""
    number = f"{mean:{'+' if sign else ''}.{digits}f}"
    return number if math.isnan(error) else f"{number} ± {error:.{digits}f}"
