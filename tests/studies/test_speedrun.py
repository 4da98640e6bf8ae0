"""The speedrun: budgets become steps honestly, lines and table hold what runs recorded, a small one works as it is started."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.speedrun import Flags
from lit_gpt.cli import parse
from lit_gpt.config import Config
from lit_gpt.pipeline import Pipeline, Stage
from lit_gpt.studies import speedrun
from lit_gpt.studies.mdm_recipes import RECIPES, MdmRecipe, StepBudget
from lit_gpt.studies.text_corpus import packed_text
from lit_gpt.studies.trained_models import ModelShape
from lit_gpt.training.objectives import MaskedDiffusion
from lit_gpt.training.schedule import parse_row_lengths
from tests.support.training_runs import ROOT, one_thread_environment

BUDGET = StepBudget(steps=1200, batch_size=16, block_size=128, learning_rate=2e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_reads_the_same_tokens(name):
    flags = RECIPES[name].flags(BUDGET)
    assert flags["max_steps"] * flags["batch_size"] == 1200 * 16
    assert flags["warmup_steps"] == 100 and flags["min_lr"] == pytest.approx(flags["learning_rate"] / 10)


def test_the_published_recipe_is_the_training_scripts_own_in_all_but_the_quickstarts_rate():
    assert RECIPES["published"].flags(BUDGET) == {
        "batch_size": 16, "learning_rate": 2e-3, "max_steps": 1200, "warmup_steps": 100, "min_lr": 2e-4,
    }  # fmt: skip


def test_rows_that_a_block_or_a_run_is_too_small_for_are_left_out():
    recipe = MdmRecipe("", pieces=((8, 0.25), (4, 0.5), (3, 0.75)))
    assert recipe.flags(BUDGET)["row_lengths"] == "16:300,32:600"
    assert recipe.flags(StepBudget(3, 16, 128, 2e-3))["row_lengths"] == "32:1"
    assert recipe.flags(StepBudget(4, 16, 128, 2e-3))["row_lengths"] == "16:1,32:2"
    assert "row_lengths" not in recipe.flags(StepBudget(1, 16, 128, 2e-3))


def test_an_own_batch_leaves_the_tokens_and_own_steps_are_kept():
    shape = ModelShape(128, 4, 128)
    entry = speedrun.SpeedrunEntry("mine", "pretrain/train_mdm.py", extra=(("batch_size", 4),))
    assert entry.flags(100, shape, 1)["max_steps"] == 400
    entry = speedrun.SpeedrunEntry("mine", "pretrain/train_mdm.py", extra=(("batch_size", 4), ("max_steps", 7)))
    assert entry.flags(100, shape, 1)["max_steps"] == 7


@pytest.mark.parametrize("name", RECIPES)
def test_the_row_lengths_of_few_steps_are_those_that_training_takes(name):
    for steps in range(1, 9):
        words = RECIPES[name].flags(StepBudget(steps, 16, 128, 2e-3)).get("row_lengths")
        parse_row_lengths([words] if words else [])
    assert RECIPES["short_rows"].flags(StepBudget(2, 16, 128, 2e-3))["row_lengths"] == "64:1"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Pipeline, Stage, ModelShape]:
    """The bundled text for rows of 32 tokens, and a shape that trains in seconds."""
    out = tmp_path_factory.mktemp("speedrun")
    pipeline = Pipeline(out, Console(file=io.StringIO()), lambda line: False)
    text = ROOT / "data" / "tinyshakespeare" / "input.txt"
    return pipeline, packed_text(pipeline, text, speedrun.VOCAB_SIZE, 32, 3), ModelShape(32, 1, 32)


def run_small(small: tuple[Pipeline, Stage, ModelShape], entry: speedrun.SpeedrunEntry, seed: int, flops: float = 3e9):
    pipeline, packed, shape = small
    return speedrun.run_entry(pipeline, packed, entry, speedrun.SpeedrunBudget(flops, None), (shape, seed))


def test_steps_of_random_lengths_are_as_many_as_fit_whatever_the_seed():
    shape, entry = ModelShape(128, 4, 128), speedrun.ENTRIES["mdm-random-lengths"]
    config = Config.from_name(6, **shape.flags(), vocab_size=speedrun.VOCAB_SIZE)
    step_tokens = 6 * config.non_embedding_params * 16 * 128
    for seed in range(3407, 3427):
        steps = speedrun._steps_of_flops(1.55e13, config, entry, seed)
        objective = MaskedDiffusion(128, 2048, seed, 16, ssl_ratio=0.01)
        lengths = [objective.group(step, 0, []).length for step in range(steps + 1)]
        spent = [6 * config.non_embedding_params * 16 * sum(lengths[:count]) for count in (steps, steps + 1)]
        assert spent[0] <= 1.55e13 < spent[1] and 1.55e13 - spent[0] < step_tokens


def test_a_run_of_random_lengths_stays_within_its_budget(small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # Steps by the mean length took 3.109e9 with this seed.
    entry = speedrun.SpeedrunEntry("lengths", "pretrain/train_mdm_rl.py", extra=(("ssl_ratio", 0.5),), ssl_ratio=0.5)
    line = run_small(small, entry, seed=7)
    assert 0.95 * 3e9 < line["flops"] <= 3e9


def test_the_flops_are_those_of_the_model_that_was_trained(small, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "deeper.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom lit_gpt.cli import run\n"
        "from pretrain.train_mdm import main\nsys.argv.append('--n_layer=2')\nrun(main)\n"
    )
    with pytest.raises(ValueError, match=r"took 5\.9\d*e\+09 FLOPs of a budget of 3e\+09"):
        run_small(small, speedrun.SpeedrunEntry("deeper", str(script)), seed=1)


@pytest.mark.parametrize(
    "name", ["val_samples", "val_draws", "block_size", "seed", "data_dir", "data_weights", "tokenizer", "init_from"]
)
def test_an_entry_cannot_choose_its_held_out_text(name):
    with pytest.raises(ValueError, match=f"mine: {name} cannot be an entry's own"):
        speedrun.SpeedrunEntry("mine", "pretrain/train_mdm.py", extra=((name, 2),))


@pytest.mark.parametrize(("name", "value"), [("val_draws", 1), ("config", {"block_size": 256})])
def test_a_script_that_validates_in_another_way_is_no_entry(name, value):
    result = {"val_is_bound": True, "val_draws": 4, "config": {"block_size": 128}}
    shape = ModelShape(128, 4, 128)
    speedrun._check_validation("mine", result, shape)
    speedrun._check_validation("arm", {**result, "val_is_bound": False, "val_draws": 1}, shape)
    with pytest.raises(ValueError, match="mine: validated"):
        speedrun._check_validation("mine", {**result, name: value}, shape)


def test_script_flags_change_the_shape():
    words = ["--budget=1", '--script_flags={"n_layer": 6, "learning_rate": 0.004, "loss_weight": "cross_entropy"}']
    flags = parse(Flags, words, "")
    assert flags.script_flags == {"n_layer": 6, "learning_rate": 0.004, "loss_weight": "cross_entropy"}
    entry = speedrun.SpeedrunEntry("mine", "pretrain/train_mdm.py", extra=tuple(flags.script_flags.items()))
    named = {name: entry.flags(1, ModelShape(128, 4, 128), 1)[name] for name in ModelShape(128, 4, 128).flags()}
    assert Config.from_name(6, **named).n_layer == 6


def line(name: str, bits: float, flops: float = 1e15, is_bound: bool = False) -> dict:
    return {
        "name": name, "hash": name, "budget": {"flops": flops}, "machine": "m", "bits_per_byte": bits,
        "bits_per_byte_se": 0.01, "is_bound": is_bound, "nats_per_token": 4.0, "flops": flops, "train_s": 90.0,
        "commit": "0123456789", "settings": {"seed": 3}, "date": "2026-11-25",
    }  # fmt: skip


def test_lines_are_added_and_those_of_the_same_run_replaced(tmp_path):
    path = tmp_path / "lines.jsonl"
    speedrun.add_lines(path, [line("a", 2.0), line("b", 3.0)])
    found = speedrun.add_lines(path, [line("b", 2.5), line("b", 2.5, 1e13)])
    assert [(entry["name"], entry["bits_per_byte"]) for entry in found] == [("a", 2.0), ("b", 2.5), ("b", 2.5)]
    assert [json.loads(text) for text in path.read_text().splitlines()] == found


def test_the_table_has_the_best_entry_of_a_budget_first(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before\n\n<!-- table -->\nold\n<!-- end of table -->\n\nAfter\n")
    speedrun.write_table(page, [line("worse", 3.0, is_bound=True), line("better", 2.0)])
    text = page.read_text()
    assert text.startswith("Before\n") and text.endswith("\n\nAfter\n") and "old" not in text
    assert text.index("`better`") < text.index("`worse`") and "<= 3.000 ± 0.010" in text
    late = {**line("late", 1.0), "budget": {"minutes": 1.4}}
    in_time = {**line("in time", 2.0), "budget": {"minutes": 1.5}}
    longer = {**line("longer rows", 1.0), "settings": {"block_size": 256}}
    table = speedrun.speedrun_table([late, in_time, longer])
    assert "`longer rows`" not in table
    assert "`late`" not in table and "| 1.5 minutes | `in time` |" in table
    speedrun.write_table(page, [])
    assert "<!-- table -->\n\nNot yet measured.\n\n<!-- end of table -->" in page.read_text()
    page.write_text("nothing")
    with pytest.raises(ValueError, match="no place for the table"):
        speedrun.write_table(page, [])


def test_training_time_is_summed_over_the_starts_of_a_run(tmp_path):
    folder = tmp_path / "log" / "x" / "version_1"
    for log in (folder, folder.with_name("version_0")):
        log.mkdir(parents=True)
        with (log / "metrics.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerows([["step", "time/train"], [1, 2.0], [2, 5.0], [2, ""], [3, 1.0], [4, 4.0]])
    # Version 0 is that of a start that was killed before its first checkpoint: the run began anew.
    (tmp_path / "run" / "x").mkdir(parents=True)
    (tmp_path / "run" / "x" / "run.json").write_text(json.dumps({"log_path": str(folder / "metrics.csv")}))
    assert speedrun._train_seconds(tmp_path) == 9.0


def test_a_small_budget_gives_a_line_as_a_user_starts_it(tmp_path):
    command = [
        ROOT / "benchmarks" / "speedrun.py",
        "--budget=3e9",
        "--entries=[mdm-best]",
        "--n_layer=1",
        "--n_embd=32",
    ]
    process = subprocess.run(
        [sys.executable, *map(str, command), "--block_size=32", f"--out={tmp_path}"],
        capture_output=True,
        text=True,
        env=one_thread_environment(),
        timeout=280,
    )
    assert process.returncode == 0, process.stderr
    (printed,) = [json.loads(text) for text in process.stdout.splitlines()]
    assert printed["flops"] == 6 * printed["non_embedding_params"] * printed["tokens"]
    assert 0.9 * 3e9 < printed["flops"] <= 3e9 and printed["is_bound"]
    assert 0 < printed["bits_per_byte_se"] < 0.2 < printed["bits_per_byte"] < 8
    assert math.log(2048) / 2 < printed["nats_per_token"] < 9
    assert printed["settings"]["loss_weight"] == "cross_entropy" and len(printed["hash"]) == 16
    (kept,) = (json.loads(text) for text in (tmp_path / "lines.jsonl").read_text().splitlines())
    assert kept == printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give either --budget"),
        (["--budget=1e9", "--minutes=1"], "not both"),
        (["--budget=-1"], "expected more than 0"),
        (["--budget=1e9", "--name=mine", '--script_flags={"val_samples": 2}'], "val_samples cannot be an entry's own"),
        (["--budget=1e9", '--script_flags={"beta2": 0.9}'], "--script_flags are those of an entry of your own"),
        (["--budget=1e9", "--entries=[gpt]"], "--entries gpt: expected some of arm, mdm"),
    ],
)
def test_mistakes_are_one_line(flags, words, tmp_path):
    script: Path = ROOT / "benchmarks" / "speedrun.py"
    process = subprocess.run([sys.executable, script, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and words in process.stderr and "Traceback" not in process.stderr
