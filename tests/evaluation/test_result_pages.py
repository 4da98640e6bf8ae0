"""Pages of results: the command that gives them, and who may replace those of the repository."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks import input_pipeline
from lit_gpt.evaluation.result_pages import RESULTS, changed_flags, check_page, command_line


@dataclass
class Flags:
    """Some flags."""

    rows: int = 4
    quick: bool = False
    names: list[str] = field(default_factory=list)
    output: str | None = None


def test_a_command_has_the_flags_that_are_not_the_defaults():
    assert command_line("scripts/a.py", Flags()) == "python scripts/a.py"
    flags = Flags(rows=5, quick=True, output="a b")
    assert command_line("scripts/a.py", flags) == "python scripts/a.py --rows 5 --quick true --output 'a b'"
    assert command_line("scripts/a.py", flags, but=("output", "rows")) == "python scripts/a.py --quick true"
    assert changed_flags(flags, but=("output",)) == {"rows": 5, "quick": True}


def test_only_a_full_run_writes_a_page_of_the_repository(tmp_path: Path):
    check_page("output", RESULTS / "a.md", full=True)
    check_page("output", tmp_path / "a.md", full=False)
    with pytest.raises(ValueError, match=r"--output \S+a.md: only a full run may write this page; name another one"):
        check_page("output", RESULTS / ".." / "results" / "a.md", full=False)


def test_a_benchmark_refuses_before_it_measures():
    page = RESULTS / "input_pipeline.md"
    with pytest.raises(ValueError, match="only a run of full size may write this page"):
        input_pipeline.main(["--ranks", "2", "--files", "20", "--output", str(page)])
