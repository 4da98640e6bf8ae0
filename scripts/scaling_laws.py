r"""Scaling laws of ARM and MDM: plan, train, fit and draw an IsoFLOP sweep (docs/scaling_laws.md).

    python scripts/scaling_laws.py plan                       every run with its shape, tokens, steps, rate, time and cost
    python scripts/scaling_laws.py sweep                      train what is not done; sweep --slurm writes a job array instead
    python scripts/scaling_laws.py fit                        parabolas, exponents, laws, compute gap, with intervals
    python scripts/scaling_laws.py plot                       the figures and the page
    python scripts/scaling_laws.py all                        the miniature on two cores: sweep, fit, plot
    python scripts/scaling_laws.py all --budgets [3e10,2e11,1e12] --text data/tinyshakespeare/input.txt --out quick

What is finished is not done again; after Ctrl-C the same command goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run
from lit_gpt.studies.scaling_settings import ACTIONS, ScalingFlags


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, and do what is asked."""
    words = list(sys.argv[1:] if argv is None else argv)
    action = words.pop(0) if words and not words[0].startswith("-") else ""
    flags = parse(ScalingFlags, words, __doc__)
    problems = flags.problems()
    if action not in ACTIONS:
        problems.insert(0, f"{action or 'no action'}: say first what to do, one of {', '.join(ACTIONS)}")
    if problems:
        raise ValueError("; ".join(problems))

    from rich.console import Console

    from lit_gpt.studies import scaling_pages, scaling_sweep
    from lit_gpt.studies.scaling_plan import planned_runs
    from lit_gpt.studies.study_pages import report_folder

    runs, console = planned_runs(flags), Console(highlight=False, soft_wrap=True)
    if action == "plan":
        for line in scaling_sweep.plan_lines(flags, runs):
            print(line)
    if action in ("plot", "all"):
        report_folder(flags, scaling_pages.PAGE_NAME)
    if action in ("sweep", "all"):
        scaling_sweep.sweep(flags, runs, console)
    if action in ("fit", "plot", "all") and not flags.slurm:
        summary = scaling_pages.write_fit(flags, runs)
        for line in scaling_pages.summary_lines(summary):
            console.print(line, markup=False)
        if action != "fit":
            console.print(f"{scaling_pages.write_pages(flags, runs, summary)}")


if __name__ == "__main__":
    run(main)
