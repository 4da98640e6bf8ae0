"""The page of the recipe study: bounds over seeds, and cross-entropy against ELBO seed by seed."""

from __future__ import annotations

from lit_gpt.pipeline import Pipeline, Stage
from lit_gpt.studies import mdm_recipe_study
from lit_gpt.studies.mdm_recipe_study import RecipeRun
from lit_gpt.studies.mdm_recipes import RECIPES
from scripts.study_mdm_recipes import Flags


def run(recipe: str, seed: int, bound: float, shape: str = "4x128") -> RecipeRun:
    return RecipeRun(shape, recipe, seed, {"val_loss": bound, "minutes": 1.0}, ["train.py", "--seed=1"])


RUNS = [
    run("published", 1, 5.0),
    run("published", 2, 5.2),
    run("cross_entropy", 1, 4.9),
    run("cross_entropy", 2, 5.0),
    run("short_rows", 1, 4.8),
    run("published", 1, 6.0, "2x64"),
]


def test_bounds_are_means_over_seeds_with_their_errors():
    lines = mdm_recipe_study._recipe_table(RUNS).splitlines()
    assert next(line for line in lines if "`published`" in line).endswith("| 5.100 ± 0.100 (2) | 6.000 (1) |")
    assert next(line for line in lines if "`best`" in line).endswith("|  |  |")


def test_the_referee_compares_the_same_seeds_alone():
    table = mdm_recipe_study._referee_table(RUNS)
    # -0.1 and -0.2; short rows have no run with the cross-entropy.
    assert "| 4x128 | `cross_entropy` - `published` | -0.150 ± 0.050 | -0.100, -0.200 |" in table
    assert len(table.splitlines()) == 3


def test_the_page_says_how_many_runs_are_done():
    text = mdm_recipe_study._page(Flags(), RUNS, 30)
    assert "6 of 30 runs are done" in text and "1200 x 16 x 128 tokens" in text


def test_what_is_not_measured_is_said_and_has_no_empty_table():
    text = mdm_recipe_study._page(Flags(), [run("published", 1, 5.0), run("best", 1, 4.5)], 30)
    assert "| layers x width |" not in text and "2x64: bound" not in text
    assert text.count("Not yet measured") == 2
    every = [run(recipe, 1, 5.0, shape) for recipe in RECIPES for shape in mdm_recipe_study.SHAPES]
    assert "Not yet measured" not in mdm_recipe_study._page(Flags(), every, 30)


def test_a_stage_counts_as_finished_when_it_has_a_result(tmp_path):
    pipeline = Pipeline(tmp_path, None, lambda line: False)  # type: ignore[arg-type]
    assert not pipeline.is_finished("a")
    stage = Stage.open(tmp_path / "a", {"x": 1})
    assert not pipeline.is_finished("a")
    stage.finish({})
    assert pipeline.is_finished("a")
