"""The study of MDM recipes at a fixed budget: runs by seed, size and recipe, and the page with their bounds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.files import write_file
from lit_gpt.pipeline import Pipeline
from lit_gpt.studies.mdm_recipes import RECIPES, StepBudget
from lit_gpt.studies.study_pages import (
    markdown_table,
    mean_and_error,
    report_folder,
    typed,
    with_error,
    write_csv,
    written_by,
)
from lit_gpt.studies.text_corpus import packed_text
from lit_gpt.studies.trained_models import ModelShape, train_model

SCRIPT = "scripts/study_mdm_recipes.py"
RECIPE_PAGE = "mdm_recipes.md"
# The quickstart's setting, and a shape with an eighth of its parameters, at the same learning rate.
_VOCAB_SIZE, _BATCH_SIZE, _BLOCK_SIZE, _RATE, _DRAWS = 2048, 16, 128, 2e-3, 4
SHAPES = {"4x128": ModelShape(_BLOCK_SIZE, 4, 128), "2x64": ModelShape(_BLOCK_SIZE, 2, 64)}
"""By layers x width."""
_PAIRS = (("cross_entropy", "published"), ("short_cross_entropy", "short_rows"))
"""Mean cross-entropy and bound as training loss, all else equal."""


@dataclass(frozen=True)
class RecipeRun:
    """One finished run."""

    shape: str
    recipe: str
    seed: int
    result: dict[str, Any]
    """Of its record."""
    command: list[str]

    @property
    def bound(self) -> float:
        """Nats per token."""
        return float(self.result["val_loss"])


def run_study(flags: Any) -> None:
    """Do all runs, seed by seed, and write the page after each.

    Args:
        flags: of scripts/study_mdm_recipes.py.
    """
    from rich.console import Console

    folder = report_folder(flags, RECIPE_PAGE)
    pipeline = Pipeline(Path(flags.out), Console(highlight=False))
    packed = packed_text(pipeline, Path(flags.text), _VOCAB_SIZE, _BLOCK_SIZE, 3)
    budget = StepBudget(flags.steps, _BATCH_SIZE, _BLOCK_SIZE, _RATE)
    planned = [
        (f"{recipe}-{shape}-{seed}", seed, shape, recipe)
        for seed, shape, recipe in itertools.product(flags.seeds, flags.shapes or SHAPES, flags.recipes or RECIPES)
    ]
    # What is done comes first, so that the page has all of it from the start.
    planned.sort(key=lambda run: not pipeline.is_finished(run[0]))
    runs: list[RecipeRun] = []
    for number, (name, seed, shape, recipe) in enumerate(planned, 1):
        values = {**SHAPES[shape].flags(), "seed": seed, "val_draws": _DRAWS, **RECIPES[recipe].flags(budget)}
        title = f"run {number} of {len(planned)}: {recipe}, {shape}, seed {seed}"
        trained = train_model(pipeline, name, title, packed, ("pretrain/train_mdm.py", values))
        runs.append(RecipeRun(shape, recipe, seed, trained.result, trained.command))
        write_csv(folder / "mdm_recipes.csv", [_csv_row(run) for run in runs])
        text = _page(flags, runs, len(planned))
        write_file(folder / RECIPE_PAGE, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
    pipeline.console.print(f"{folder / RECIPE_PAGE}")


def _csv_row(run: RecipeRun) -> dict[str, Any]:
    """A run in the CSV."""
    names = ("val_loss", "val_loss_se", "val_loss_draws_se", "val_bits_per_byte", "total_tokens", "step")
    return {
        "shape": run.shape,
        "recipe": run.recipe,
        "seed": run.seed,
        **{name: run.result.get(name) for name in names},
    }


def _page(flags: Any, runs: Sequence[RecipeRun], planned: int) -> str:
    """The page, of the runs that are done."""
    done = f"{len(runs)} of {planned} runs are done." if len(runs) < planned else f"All {planned} runs are done."
    parts = [
        "# Recipes of training an MDM at a fixed budget",
        f"Written by {written_by(SCRIPT, flags)}. {done}",
        f"Every run reads {flags.steps} x {_BATCH_SIZE} x {_BLOCK_SIZE} tokens of the text with the same model, so all of a "
        "size cost the same FLOPs (6 N D; attention, which short rows make cheaper, not counted). The number is the bound in "
        f"nats per token on the held-out tenth, whole rows of {_BLOCK_SIZE} tokens, {_DRAWS} draws of fixed noise, whatever "
        "the training loss is; ± is the standard error over seeds.",
        "## The bound by recipe",
        _recipe_table(runs),
        *_not_measured(runs),
        "## ELBO or cross-entropy as training loss",
        "The difference of the bounds, cross-entropy minus ELBO, seed by seed (the seed gives both the same weights, data and "
        "masks); below 0 the mean cross-entropy of masked tokens is the better training loss.",
        _referee_table(runs) or "Not yet measured.",
        _example(runs),
    ]
    return "\n\n".join(parts) + "\n"


def _recipe_table(runs: Sequence[RecipeRun]) -> str:
    """Mean bound over seeds, by recipe and the sizes that have runs."""
    shapes = [shape for shape in SHAPES if any(run.shape == shape for run in runs)]
    rows = []
    for name, recipe in RECIPES.items():
        cells = []
        for shape in shapes:
            bounds = [run.bound for run in runs if (run.shape, run.recipe) == (shape, name)]
            cells.append(f"{with_error(*mean_and_error(bounds))} ({len(bounds)})" if bounds else "")
        rows.append([f"`{name}`", recipe.what, *cells])
    return markdown_table(["recipe", "what it is", *(f"{shape}: bound (seeds)" for shape in shapes)], rows)


def _not_measured(runs: Sequence[RecipeRun]) -> list[str]:
    """A paragraph with the recipes of each size that have no run; none where all have."""
    missing = []
    for shape in SHAPES:
        done = {run.recipe for run in runs if run.shape == shape}
        names = ", ".join(f"`{name}`" for name in RECIPES if name not in done)
        if names:
            missing.append(f"at {shape} {names if done else 'every recipe'}")
    return [f"Not yet measured: {'; '.join(missing)}."] if missing else []


def _referee_table(runs: Sequence[RecipeRun]) -> str:
    """Paired differences of cross-entropy and ELBO, by size, with whole rows and with short rows first; '' without a pair."""
    bounds = {(run.shape, run.recipe, run.seed): run.bound for run in runs}
    rows = []
    for shape, (one, other) in itertools.product(SHAPES, _PAIRS):
        found = [
            bounds[shape, one, seed] - bounds[shape, other, seed]
            for seed in sorted({run.seed for run in runs})
            if (shape, one, seed) in bounds and (shape, other, seed) in bounds
        ]
        if found:
            each = ", ".join(f"{difference:+.3f}" for difference in found)
            rows.append([shape, f"`{one}` - `{other}`", with_error(*mean_and_error(found), sign=True), each])
    return markdown_table(["layers x width", "pair", "difference", "each seed"], rows) if rows else ""


def _example(runs: Sequence[RecipeRun]) -> str:
    """The newest run's command."""
    return f"One of the commands, as the study ran it:\n\n```\n{typed(runs[-1].command)}\n```"
