"""The page, CSV, JSON and the two figures of a scaling study, from the rows and their summary."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_gpt.evaluation.versions import commit
from lit_gpt.files import write_file, write_json
from lit_gpt.studies.scaling_plan import SCALING_KINDS, PlannedRun, kind_label
from lit_gpt.studies.scaling_settings import ScalingFlags
from lit_gpt.studies.scaling_summary import summarised, swept_runs
from lit_gpt.studies.scaling_sweep import ROWS_NAME, collect_rows, typed_command
from lit_gpt.studies.study_pages import markdown_table, processor_name, report_folder, with_error, write_csv
from lit_gpt.ui.scaling_figures import IsoflopKind, draw_isoflops, draw_scaling

PAGE_NAME = "scaling_laws.md"
_JSON_NAME = "scaling_laws.json"
_FIGURES = ("scaling_laws_loss.png", "scaling_laws_size.png", "scaling_laws_isoflops.png")
_ROUNDING = 1e-9
# Factors of compute outside of this range say that curves do not meet.
_FACTORS = (1e-3, 1e6)
_PAGE = """# Scaling laws in miniature

Written by `{command}` on {day}, commit {commit}. Training took {minutes:.0f} minutes on {machine}; {done}.

Kinds: {kinds}.

{sizes} sizes by {budgets} budgets from {least:.3g} to {most:.3g} FLOPs (6 N D: N parameters without embeddings,
D tokens), on {text}, in sequences of {block} tokens of {vocabulary} pieces; the smallest model reads {epochs:.2g} epochs of it
at the largest budget.
Losses are nats per token of the same {samples} held-out sequences; an MDM's loss is an upper bound by {draws} draws a sequence.
Intervals are 95 % of {simulated} simulated sweeps, which have the standard error of each run's loss and what the
fits' residuals show beyond it.

![Loss against compute](scaling_laws_loss.png)

![Parameters against compute](scaling_laws_size.png)

![Loss against parameters by budget](scaling_laws_isoflops.png)

## Best size and loss by budget

{optima}

An optimum at an edge is that of the smallest or largest size: the best one may lie beyond, and exponents that rest on it are
bounds at most.

## Exponents

{exponents}

N and D are those of the lowest points of the parabolas; the loss is their power law a C^-b.

## The compute gap

{gaps}

## The parametric law

L = E + A / M^a + B / D^b, M being {measure}. Huber loss of log residuals, from 48 starts.

{laws}

Threshold and residuals: {thresholds}.

## The rule for the learning rate

Peak 2e-3 at 1.05M parameters, times (N / 1.05M)^(-1/3) up to 6M, and from there a power law to the published 2e-4 at 170M
and above; batches of 2048 tokens at 2.46M tokens, growing as D^(2/3). The same runs at other factors of that rate:

{check}

## What a miniature can and cannot show

It can show that the method runs end to end, how losses, optima and intervals come out, and how both kinds compare on this
text at these budgets. It cannot show the exponents of large models: models this small learn the frequencies of words and of
pairs of words, an MDM of the smallest budgets little more than the former; warm-up and the start of training are a large
share of each run. There is one seed a point, so that the spread over seeds is seen only through the residuals, of which a
parabola leaves few for each budget. All runs of a kind are validated with the same draws, so the error of the draws moves a
kind's whole curve: it is in the interval of the gap, and hardly in those of exponents.

## All runs

{runs}

Standard errors: of the draws (the text is the same for all).
"""


def write_fit(flags: ScalingFlags, runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """Fit the finished runs, and write the JSON.

    Raises:
        ValueError: too few runs are finished.
    """
    rows = collect_rows(flags, runs)
    swept = {kind: swept_runs(rows, kind, flags.size_measure) for kind in flags.kinds}
    summary = summarised(swept, flags.bootstrap_draws, flags.huber, flags.seed)
    finished = len({(row["kind"], row["size"], row["budget"], row["rate_factor"]) for row in rows})
    summary |= {"size_measure": flags.size_measure, "runs": finished, "planned_runs": len(runs)}
    write_json(Path(flags.out) / _JSON_NAME, summary)
    return summary


def write_pages(flags: ScalingFlags, runs: Sequence[PlannedRun], summary: dict[str, Any]) -> Path:
    """Draw the figures and write the page beside CSV and JSON; returns the page's path."""
    folder = report_folder(flags, PAGE_NAME)
    rows = collect_rows(flags, runs)
    curves = []
    for kind, found in summary["kinds"].items():
        own = [row for row in rows if row["kind"] == kind and row["rate_factor"] == 1]
        points = [(row["budget"], row["size"], row["val_loss"]) for row in own]
        curves.append(IsoflopKind(kind_label(kind), points, found))
    draw_scaling(curves, folder / _FIGURES[0], folder / _FIGURES[1])
    draw_isoflops(curves, folder / _FIGURES[2])
    write_csv(folder / ROWS_NAME, rows)
    write_json(folder / _JSON_NAME, summary)
    content = _PAGE.format(**_page_parts(flags, runs, rows, summary))
    write_file(folder / PAGE_NAME, lambda file: file.write(content.encode()))
    return folder / PAGE_NAME


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The fits for a console."""
    tables = [optima_table(summary), exponents_table(summary)]
    laws = {kind: found["law"] for kind, found in summary["kinds"].items() if "law" in found}
    return [*"\n\n".join([*tables, laws_table(laws)]).splitlines(), "", *gap_lines(summary)]


def _page_parts(
    flags: ScalingFlags, runs: Sequence[PlannedRun], rows: list[dict[str, Any]], summary: dict[str, Any]
) -> dict[str, Any]:
    budgets = sorted(flags.budgets)
    laws = {kind: found["law"] for kind, found in summary["kinds"].items() if "law" in found}
    return {
        "command": typed_command(flags, "all"),
        "day": time.strftime("%Y-%m-%d"),
        "commit": (commit() or "unknown")[:8],
        "minutes": sum(float(row["minutes"]) for row in rows),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {processor_name()}",
        "done": f"{summary['runs']} of {len(runs)} runs are done",
        "kinds": "; ".join(f"{kind_label(kind)} ({SCALING_KINDS[kind].what})" for kind in flags.kinds),
        "sizes": len(flags.sizes),
        "budgets": len(budgets),
        "least": budgets[0],
        "most": budgets[-1],
        "text": f"`{Path(flags.text).name}`",
        "block": flags.block_size,
        "vocabulary": flags.vocab_size,
        "epochs": max(run.tokens for run in runs) / training_tokens(flags),
        "samples": flags.val_samples,
        "draws": flags.val_draws,
        "simulated": summary["bootstrap_draws"],
        "optima": optima_table(summary),
        "exponents": exponents_table(summary),
        "gaps": "\n".join(gap_lines(summary)) or "Of one kind, or one budget, there is none.",
        "measure": "the FLOPs of training per token, attention included" if flags.size_measure == "M" else "N",
        "laws": laws_table(laws),
        "thresholds": "; ".join(
            f"{kind_label(kind)} {law['huber_threshold']:.2g}, {law['share_beyond_threshold']:.0%} of the runs beyond it, "
            f"root mean square {law['root_mean_square_log_residual']:.2g}"
            for kind, law in laws.items()
        ),
        "check": check_table(rows),
        "runs": runs_table(rows),
    }


def training_tokens(flags: ScalingFlags) -> float:
    """Tokens of the packed training text; NaN before it is packed."""
    files = list((Path(flags.out) / "packed").glob("train_slim*.bin"))
    # Two bytes a token: the vocabularies of a study are small.
    return sum(path.stat().st_size for path in files) / 2 if files else math.nan


def _interval(numbers: Sequence[float], digits: int = 3) -> str:
    value, low, high = (f"{number if abs(number) > _ROUNDING else 0:.{digits}g}" for number in numbers)
    if max(numbers) - min(numbers) <= _ROUNDING * abs(numbers[0]):
        # Three sizes leave no residuals; or all simulated sweeps end at the same edge.
        return f"{value} (no interval)"
    return f"{value} ({low} to {high})"


def optima_table(summary: dict[str, Any]) -> str:
    """By kind and budget."""
    rows = []
    for kind, found in summary["kinds"].items():
        for budget in found["budgets"]:
            millions = [number / 1e6 for number in budget["size"]]
            edge = f"{budget['share_of_draws_at_edge']:.0%}" + (" (and the fit itself)" if budget["at_edge"] else "")
            best = f"{budget['best_run']['loss']:.3f} at {budget['best_run']['size'] / 1e6:.3g}M"
            rows.append(
                [kind_label(kind), f"{budget['flops']:.3g}", f"{_interval(millions)} M", _interval(budget["loss"], 4)]
            )
            rows[-1] += [edge, best]
    return markdown_table(["kind", "FLOPs", "best N", "its loss", "simulated sweeps at an edge", "best run"], rows)


def exponents_table(summary: dict[str, Any]) -> str:
    """By kind: of N, D and the loss."""
    names = {"size_exponent": "N ~ C^", "tokens_exponent": "D ~ C^", "loss_exponent": "loss ~ C^-"}
    rows = [
        [kind_label(kind), *(_interval(found[name]) for name in names)]
        for kind, found in summary["kinds"].items()
        if "loss_exponent" in found
    ]
    return markdown_table(["kind", *names.values()], rows)


def gap_lines(summary: dict[str, Any]) -> list[str]:
    """A sentence for each kind."""

    def factor(numbers: Sequence[float]) -> str:
        low, high = _FACTORS
        return _interval(numbers) if low < min(numbers) and max(numbers) < high else "an undetermined number of"

    first = kind_label(summary["compute_gap_to"])
    return [
        f"- {kind_label(kind)} needs {factor(gap['factor'])} times the compute of {first} for the same "
        f"loss, if both curves have one exponent ({_interval(gap['shared_loss_exponent'])}); with an exponent each, "
        f"{factor(gap['factor_at_largest_budget'])} times for the loss of the largest budget."
        for kind, gap in summary["compute_gaps"].items()
    ]


def laws_table(laws: dict[str, Any]) -> str:
    """By kind: the five parameters, and the exponent of the best N that they imply."""
    names = ("E", "A", "B", "a", "b", "size_exponent")
    rows = [[kind_label(kind), *(_interval(law[name]) for name in names)] for kind, law in laws.items()]
    return markdown_table(["kind", *names[:5], "best size ~ C^"], rows)


def check_table(rows: Sequence[dict[str, Any]]) -> str:
    """Losses by factor of the learning rate, of the runs that have others."""
    checked = {(row["kind"], row["size"], row["budget"]) for row in rows if row["rate_factor"] != 1}
    factors = sorted({row["rate_factor"] for row in rows})
    losses = {(row["kind"], row["size"], row["budget"], row["rate_factor"]): row["val_loss"] for row in rows}
    lines = []
    for kind, size, budget in sorted(checked):
        found = [losses.get((kind, size, budget, factor)) for factor in factors]
        cells = ["" if loss is None else f"{loss:.3f}" for loss in found]
        lines.append([f"{kind_label(kind)} {size / 1e6:.3g}M, {budget:.3g} FLOPs", *cells])
    if not lines:
        return "not checked (--check_factors)"
    return markdown_table(["run", *(f"times {factor:g}" for factor in factors)], lines)


def runs_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a run."""
    heads = ["kind", "N", "layers x width", "FLOPs", "tokens", "steps x batch", "learning rate", "loss", "minutes"]
    lines = [
        [
            kind_label(row["kind"]),
            f"{row['size'] / 1e6:.3g}M",
            f"{row['layers']} x {row['width']}",
            f"{row['flops']:.3g}",
            f"{row['tokens'] / 1e6:.3g}M",
            f"{row['steps']} x {row['batch_size']}",
            f"{row['learning_rate']:.3g}",
            with_error(row["val_loss"], row["val_loss_draws_se"] or math.nan),
            f"{row['minutes']:.1f}",
        ]
        for row in rows
    ]
    return markdown_table(heads, lines)
