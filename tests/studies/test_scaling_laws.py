"""Scaling laws: the fits find a known law within their own intervals, the plan keeps its budgets, and the page is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from scipy import optimize

from lit_gpt.cli import parse
from lit_gpt.config import Config
from lit_gpt.model.causal import GPT
from lit_gpt.studies import scaling_fits, scaling_pages, scaling_plan, scaling_summary, scaling_sweep
from lit_gpt.studies.scaling_fits import SweptRuns
from lit_gpt.studies.scaling_settings import ScalingFlags
from lit_gpt.training.suggested_run import SuggestedRun

ROOT = Path(__file__).resolve().parents[2]
# The law that Besiroglu et al. 2024 (arXiv 2404.10102) found for the runs of Hoffmann et al. 2022: E, A, B, a, b.
LAW = (1.8172, 482.01, 2085.43, 0.3478, 0.3658)


def law_loss(sizes, tokens, law=LAW):
    floor, first, second, a, b = law
    return floor + first / sizes**a + second / tokens**b


def swept(random, noise, budgets=5, sizes=7, reach=8.0):
    """Runs about the best sizes of LAW; each loss is known with the standard error that its noise has."""
    _, first, second, a, b = LAW
    compute = np.repeat(np.geomspace(1e18, 1e21, budgets), sizes)
    best = (a * first / (b * second)) ** (1 / (a + b)) * (compute / 6) ** (b / (a + b))
    params = best * np.tile(np.geomspace(1 / reach, reach, sizes), budgets)
    tokens = compute / 6 / params
    exact = law_loss(params, tokens)
    losses = exact * np.exp(noise * random.standard_normal(len(exact)))
    return SweptRuns(compute, params, params, tokens, losses, noise * exact)


def covered(draws, simulations, noise=0.005):
    """How many of the draws have the true exponents a and b in their intervals."""
    random = np.random.default_rng(5)
    hits = np.zeros(2, dtype=int)
    for _ in range(draws):
        runs = swept(random, noise)
        fit = scaling_fits.fit_one_law(runs, None)
        laws = scaling_fits.natural_law(runs, scaling_fits.bootstrapped_law(runs, fit, simulations, random))
        low, high = np.percentile(laws[:, 3:], (2.5, 97.5), axis=0)
        hits += (low <= LAW[3:]) & (high >= LAW[3:])
    return hits


def test_without_noise_the_law_itself_is_found():
    runs = swept(np.random.default_rng(0), 0.0)
    parameters, predicted, _ = scaling_fits.fit_one_law(runs, None)
    assert scaling_fits.natural_law(runs, parameters[None])[0] == pytest.approx(LAW, rel=1e-3)
    assert predicted == pytest.approx(runs.losses, rel=1e-6)


def test_the_fit_is_the_minimum_that_scipy_finds():
    """The same Huber loss by another library's method, from many starts."""
    runs = swept(np.random.default_rng(1), 0.01, budgets=3, sizes=4)
    x, y = (np.log(v) - np.log(v).mean() for v in (runs.measures, runs.tokens))

    def residuals(p):
        return np.log(np.exp(p[0]) + np.exp(p[1] - p[3] * x) + np.exp(p[2] - p[4] * y)) - np.log(runs.losses)

    threshold = 0.003
    best = min(
        optimize.least_squares(residuals, start, loss="huber", f_scale=threshold).cost
        for start in scaling_fits.law_starts(runs)[::5]
    )
    _, predicted, _ = scaling_fits.fit_one_law(runs, threshold)
    errors = np.abs(np.log(predicted / runs.losses))
    ours = np.where(errors <= threshold, errors**2 / 2, threshold * (errors - threshold / 2)).sum()
    assert ours <= best * 1.001


def test_one_bad_run_moves_a_huber_fit_less_than_least_squares():
    runs = swept(np.random.default_rng(2), 0.002)
    bad = runs.losses.copy()
    bad[3] *= 1.3
    spoilt = SweptRuns(runs.budgets, runs.sizes, runs.measures, runs.tokens, bad, runs.errors)
    found = [
        scaling_fits.natural_law(spoilt, scaling_fits.fit_one_law(spoilt, huber)[0][None])[0, 3] for huber in (None, 10)
    ]
    assert abs(found[0] - LAW[3]) < 0.2 * abs(found[1] - LAW[3])


def test_intervals_hold_the_true_exponents():
    assert covered(8, 60).min() >= 6


@pytest.mark.slow
def test_intervals_hold_the_true_exponents_in_90_of_100_draws():
    hits = covered(100, 200)
    print(f"a in {hits[0]} of 100 intervals, b in {hits[1]}")
    assert hits.min() >= 90


def test_parabolas_find_the_best_size_and_say_when_it_is_outside():
    runs = swept(np.random.default_rng(3), 0.0, reach=2.0)
    optima = scaling_fits.parabola_optima(runs, runs.losses[None])
    _, first, second, a, b = LAW
    budgets = np.unique(runs.budgets)
    best = (a * first / (b * second)) ** (1 / (a + b)) * (budgets / 6) ** (b / (a + b))
    assert optima.log_sizes[0] == pytest.approx(np.log(best), abs=0.05) and not optima.at_edge.any()
    slope, _ = scaling_fits.power_law(np.log(budgets), optima.log_sizes)
    assert slope[0] == pytest.approx(b / (a + b), abs=0.01)
    falling = SweptRuns(runs.budgets, runs.sizes, runs.sizes, runs.tokens, 5 - np.log(runs.sizes) / 10, runs.errors)
    edges = scaling_fits.parabola_optima(falling, falling.losses[None])
    assert edges.at_edge.all()
    assert np.exp(edges.log_sizes[0]) == pytest.approx([runs.sizes[group].max() for group in runs.groups()])


def test_intervals_carry_the_standard_errors_of_the_losses():
    """Exact points on parabolas: intervals have no width until the runs have errors."""
    runs = swept(np.random.default_rng(4), 0.0, budgets=3, sizes=4)
    flat = scaling_fits.parabola_optima(runs, runs.losses[None]).fitted[0]
    widths = []
    for error in (0.0, 0.02):
        sure = SweptRuns(runs.budgets, runs.sizes, runs.sizes, runs.tokens, flat, np.full(len(flat), error))
        summary = scaling_summary.summarised({"arm": sure}, 200, None, 1)
        value, low, high = summary["kinds"]["arm"]["loss_exponent"]
        assert low <= value <= high
        widths.append(high - low)
    assert widths[0] < 1e-6 and widths[1] > 1e-3


def test_the_gap_carries_an_error_that_all_runs_of_a_kind_share():
    """Studies whose bounds are all off by one number, as told: told intervals of the gap are as wide as gaps scatter."""
    random = np.random.default_rng(6)
    budgets, sizes = np.repeat([3.3e11, 1.8e12, 1e13], 4), np.tile([1.1e5, 3e5, 6e5, 1.6e6], 3)
    tokens, told = budgets / 6 / sizes, 0.02
    true = 3.5 + 50 / (6 * sizes) ** 0.3 + 60 / tokens**0.33

    def runs(losses, error):
        return SweptRuns(budgets, sizes, 6 * sizes, tokens, losses, np.full(12, error))

    gaps, widths = [], []
    for study in range(12):
        arm = runs(0.93 * true + 0.002 * random.standard_normal(12), 0.0)
        mdm = runs(true + told * random.standard_normal() + 0.002 * random.standard_normal(12), told)
        found = scaling_summary.summarised({"arm": arm, "mdm": mdm}, 100, None, study)
        value, low, high = np.log(found["compute_gaps"]["mdm"]["factor"])
        gaps.append(value)
        widths.append(high - low)
    assert np.median(widths) == pytest.approx(3.92 * np.std(gaps, ddof=1), rel=0.5)
    assert found["kinds"]["mdm"]["size_exponent"][2] - found["kinds"]["mdm"]["size_exponent"][1] < 0.2


def test_the_gap_is_the_factor_between_two_shifted_curves():
    """The second kind's losses are the first's at a fourteenth of the compute, of a law that is a power of compute."""
    budgets = np.repeat(np.geomspace(1e12, 1e14, 3), 4)
    factors = np.tile((0.25, 0.5, 1, 2), 3)
    sizes = 1e5 * (budgets / 1e12) ** 0.5 * factors

    def runs(compute):
        losses = 3000 * compute**-0.25 * np.exp(0.01 * np.log(factors / 0.7) ** 2)
        return SweptRuns(budgets, sizes, sizes, budgets / 6 / sizes, losses, np.full(12, 1e-3))

    summary = scaling_summary.summarised({"arm": runs(budgets), "mdm": runs(budgets / 14)}, 200, None, 1)
    gap = summary["compute_gaps"]["mdm"]
    assert gap["factor"][0] == pytest.approx(14, rel=0.02) and gap["factor"][1] <= 14 <= gap["factor"][2]
    assert gap["factor_at_largest_budget"][0] == pytest.approx(14, rel=0.02)
    assert gap["shared_loss_exponent"][0] == pytest.approx(0.25, rel=0.01)
    assert summary["kinds"]["mdm"]["size_exponent"][0] == pytest.approx(0.5, abs=0.01)


def test_a_plan_spends_its_budgets_on_shapes_of_the_family():
    flags = ScalingFlags()
    runs = scaling_plan.planned_runs(flags)
    assert len(runs) == 4 * 3 * 3 + 2 * 3
    for run in runs:
        assert 0.97 * run.budget < run.flops <= run.budget
        assert run.config.intermediate_size == 4 * run.config.n_embd and run.config.head_size in (16, 32, 64)
        assert run.flops_per_token > 6 * (run.config.non_embedding_params - run.config.n_embd * 100)
    sizes = [scaling_plan.family_config(size, 128, 1024).size_in_millions for size in (0.03, 0.6, 3, 6, 170)]
    assert sizes == pytest.approx([0.0329, 0.591, 2.95, 6.29, 170], rel=0.02)
    assert scaling_plan.ruled_rate(Config.from_name(1028).non_embedding_params) == pytest.approx(2e-4, rel=0.02)
    assert scaling_plan.ruled_batch(2.46e6, 128) == 16 and scaling_plan.ruled_batch(1e10, 2048) == 256
    with pytest.raises(ValueError, match="--sizes 0.001: there are"):
        scaling_plan.family_config(0.001, 128, 1024)


def test_one_rule_for_the_learning_rate():
    """What a preparation suggests is what a study plans; the default study's rates are those of its runs."""
    for size in (0.03, 0.6, 3, 6, 19, 85, 170, 472, 1028):
        config = scaling_plan.family_config(size, 128, 1024)
        rate = scaling_plan.ruled_rate(config.non_embedding_params)
        assert SuggestedRun(config, 16, 1000, 1.0, 1.0).learning_rate == rate
        assert size < 170 or rate == 2e-4
    below, above = (scaling_plan.ruled_rate(number) for number in (5_999_999, 6_000_001))
    assert below == above == 1.12e-3
    planned = [run for run in scaling_plan.planned_runs(ScalingFlags()) if run.rate_factor == 1]
    rates = {run.config.non_embedding_params: run.learning_rate for run in planned}
    assert rates == {110928: 0.00423, 307760: 0.00301, 590688: 0.00242, 1639840: 0.00172}


def test_flags_reach_the_kind_they_name():
    flags = ScalingFlags(kind_flags=["mdm:loss_weight=cross_entropy", "compile=off"])
    by_kind = {run.kind: run.script_flags(flags) for run in scaling_plan.planned_runs(flags)}
    assert by_kind["mdm"]["loss_weight"] == "cross_entropy" and "loss_weight" not in by_kind["arm"]
    best, plain = by_kind["mdm_best"], by_kind["mdm"]
    assert best["loss_weight"] == "cross_entropy" and best["row_lengths"].startswith("16:")
    assert best["max_steps"] * best["batch_size"] == plain["max_steps"] * plain["batch_size"]
    assert by_kind["arm"]["compile"] == by_kind["mdm"]["compile"] == "off"


def test_values_of_kind_flags_hold_colons_and_commas(tmp_path):
    given = ["mdm:row_lengths=16:300,32:600", "compile=off"]
    flags = ScalingFlags(kind_flags=given, budgets=[3.3e11, 1234567.8e6])
    assert flags.problems() == []
    by_kind = {run.kind: run.script_flags(flags) for run in scaling_plan.planned_runs(flags)}
    assert by_kind["mdm"]["row_lengths"] == "16:300,32:600" and "row_lengths" not in by_kind["arm"]
    assert parse(ScalingFlags, shlex.split(scaling_sweep.typed_command(flags, "fit"))[3:], "") == flags


@pytest.mark.parametrize(
    "text,said",
    [
        ("mdmm:loss_weight=cross_entropy", "mdmm is none of --kinds arm, mdm, mdm_best"),
        ("mdm_rl:ssl_ratio=1", "mdm_rl is none of --kinds arm, mdm, mdm_best"),
        ("mdm:batch_size=2", "batch_size is decided by the plan"),
        ("max_steps=2", "max_steps is decided by the plan"),
        ("n_layer=2", "n_layer is decided by the plan"),
        ("ssl_ratio=half", "expected a number between 0 and 1"),
        ("val_draws=2", "val_draws is decided by the plan"),
    ],
)
def test_kind_flags_of_no_kind_and_those_of_the_plan_are_refused(text, said):
    assert ScalingFlags(kind_flags=[text]).problems() == [f"--kind_flags {text}: {said}"]


def test_random_lengths_get_the_steps_that_their_mean_pays_for(tmp_path):
    flags = ScalingFlags(kinds=["mdm", "mdm_rl"], kind_flags=["mdm_rl:ssl_ratio=1"])
    runs = scaling_plan.planned_runs(flags)
    for whole, cut in zip(runs[::2], runs[1::2], strict=True):
        assert (whole.kind, cut.kind) == ("mdm", "mdm_rl")
        assert cut.steps == pytest.approx(whole.steps * 128 / 64.5, abs=2)
        assert 0.97 * cut.budget < cut.flops <= cut.budget


def test_rows_say_the_tokens_that_were_read(tmp_path):
    flags = small_flags(tmp_path)
    runs = finish_all(flags)
    path = tmp_path / "runs" / runs[1].name / "stage.json"
    stage = json.loads(path.read_text())
    stage["result"]["total_tokens"] -= 1000
    path.write_text(json.dumps(stage))
    row = scaling_sweep.collect_rows(flags, runs)[1]
    assert row["tokens"] == runs[1].tokens - 1000
    assert row["flops"] == 6 * row["size"] * row["tokens"]


def small_flags(out, **others):
    return ScalingFlags(
        text=str(ROOT / "data" / "tinyshakespeare" / "input.txt"), out=str(out), sizes=[0.03, 0.11, 0.2],
        kinds=["arm", "mdm"], budgets=[2e9, 2e10], check_factors=[2.0], bootstrap_draws=40, vocab_size=512,
        block_size=64, **others,
    )  # fmt: skip


def write_stage(folder, settings, result):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stage.json").write_text(json.dumps({"settings": settings, "result": result}))


def finish_all(flags):
    """The packed text and every run as their stages leave them, the losses from a law."""
    runs, out = scaling_plan.planned_runs(flags), Path(flags.out)
    digest = hashlib.sha256(Path(flags.text).read_bytes()).hexdigest()
    write_stage(out / "pieces", {"text": digest, "piece": 20_000}, {})
    (out / "pieces" / "text.txt").write_text("dealt out")
    packed = {"text": hashlib.sha256(b"dealt out").hexdigest()}
    write_stage(out / "text", packed, {})
    packed["vocab_size"] = flags.vocab_size
    write_stage(out / "tokenizer", packed, {})
    packed["block_size"] = flags.block_size
    write_stage(out / "packed", packed, {})
    for run in runs:
        scale = {"arm": 1.0, "mdm": 1.2}[run.kind]
        loss = scale * law_loss(run.config.non_embedding_params, run.tokens, (1.5, 20, 30, 0.3, 0.3))
        result = {"val_loss": loss, "val_loss_se": 0.03, "val_loss_draws_se": 0.01 if run.kind == "mdm" else 0.0}
        result |= {"total_tokens": run.tokens, "minutes": 0.1 + run.computed_flops / 6e11}
        script = {"arm": "pretrain/train_ar.py", "mdm": "pretrain/train_mdm.py"}[run.kind]
        write_stage(out / "runs" / run.name, {**packed, "script": script, **run.script_flags(flags)}, result)
    return runs


def test_finished_runs_become_rows_fits_figures_and_a_page(tmp_path):
    flags = small_flags(tmp_path)
    runs = finish_all(flags)
    summary = scaling_pages.write_fit(flags, runs)
    page = scaling_pages.write_pages(flags, runs, summary).read_text()
    assert (
        page.count("| ARM |") >= 4 and "times the compute of ARM" in page and "nan" not in page.split("## All runs")[1]
    )
    assert json.loads((tmp_path / "scaling_laws.json").read_text())["kinds"]["mdm"]["budgets"][0]["flops"] == 2e9
    assert len((tmp_path / "scaling_laws.csv").read_text().splitlines()) == 1 + len(runs)
    for name in ("loss", "size", "isoflops"):
        assert min(Image.open(tmp_path / f"scaling_laws_{name}.png").size) > 400
    lines = scaling_sweep.plan_lines(flags, runs)
    assert f"{len(runs)} runs, {len(runs)} of them done" in lines[-3] and "finished runs" in lines[-1]
    assert "speed: 1e+10 FLOPs/s" in lines[-1] and "and 6 s a run" in lines[-1]
    table = [line.split() for line in lines[: 1 + len(runs)]]
    assert {len(row) for row in table} == {len(table[0])} and [row[0] for row in table] == ["no.", *map(str, range(14))]
    assert len({len(line) for line in lines[: 1 + len(runs)]}) == 1
    assert {line.index(row[1]) for line, row in zip(lines, table, strict=False)} == {lines[0].index("run")}
    # Other flags are other runs.
    other = small_flags(tmp_path, seed=4)
    assert all(scaling_sweep.finished_record(other, run) is None for run in scaling_plan.planned_runs(other))


@pytest.mark.parametrize(
    "trained,asked",
    [
        ({"kind_flags": ["mdm:loss_weight=cross_entropy"]}, {"kind_flags": []}),
        ({}, {"kind_flags": ["mdm:loss_weight=cross_entropy"]}),
        ({}, {"vocab_size": 1024}),
        ({}, {"text": str(ROOT / "README.md")}),
    ],
)
def test_runs_of_other_flags_or_of_another_text_are_not_of_this_study(tmp_path, trained, asked):
    flags = small_flags(tmp_path, **trained)
    finish_all(flags)
    other = dataclasses.replace(flags, **asked)
    runs = [run for run in scaling_plan.planned_runs(other) if run.kind == "mdm"]
    assert all(scaling_sweep.finished_record(flags, run) is not None for run in runs)
    assert all(scaling_sweep.finished_record(other, run) is None for run in runs)
    assert not any(row["kind"] == "mdm" for row in scaling_sweep.collect_rows(other, runs))


def test_a_plan_measures_small_steps_whatever_the_batch(tmp_path, monkeypatch):
    flags = dataclasses.replace(small_flags(tmp_path), kinds=["arm"], sizes=[0.03], budgets=[2e13], check_factors=[])
    runs = scaling_plan.planned_runs(flags)
    assert runs[0].batch_size * runs[0].config.block_size == 16384
    seen, real = [], GPT.weighted_nll

    def counted(self, terms):
        seen.append(terms.targets.numel())
        return real(self, terms)

    monkeypatch.setattr(GPT, "weighted_nll", counted)
    speed, _, source = scaling_sweep.machine_speed(flags, runs)
    assert speed > 0 and runs[0].name in source and seen and max(seen) <= 8192
    assert torch.cuda.is_available() or max(seen) <= 1024


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU measures larger models")
@pytest.mark.parametrize("sizes,timed", [([0.03, 6, 170], 6.29), ([170, 1028], 170)])
def test_a_plan_measures_no_model_that_takes_minutes(sizes, timed):
    runs = scaling_plan.planned_runs(ScalingFlags(sizes=sizes, budgets=[1e20], block_size=2048, kinds=["mdm"]))
    assert scaling_sweep.timed_run(runs).config.size_in_millions == pytest.approx(timed, rel=0.01)


def test_text_is_dealt_out_whole():
    text = "\n\n".join(f"paragraph {number} " + "word " * 300 for number in range(100))
    pieces = scaling_sweep.text_pieces(text)
    assert "\n\n".join(pieces) == text and len(pieces) > 5
    assert all(len(piece) < 25_000 for piece in pieces)


def run_script(*words):
    command = [sys.executable, str(ROOT / "scripts" / "scaling_laws.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "words,said",
    [
        (["--sizes", "[1]"], "no action: say first what to do, one of plan, sweep, fit, plot, all"),
        (["plan", "--size_measure", "X", "--budgets", "[0]"], "--budgets 0: more than 0; --size_measure X"),
        (["plan", "--kinds", "[arm,none]"], "--kinds none: choose from arm, mdm"),
        (["sweep", "--text", "absent.txt"], "--text absent.txt: no such file; name a text file"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, said):
    done = run_script(*words, "--out", tmp_path / "out")
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_array_script_runs_each_run_of_the_plan(tmp_path):
    flags = small_flags(tmp_path)
    runs = scaling_plan.planned_runs(flags)
    command = scaling_sweep.typed_command(flags, "sweep")
    assert parse(ScalingFlags, shlex.split(command)[3:], "") == flags
    script = scaling_sweep.slurm_script(flags, runs, command)
    assert f"--array=0-{len(runs) - 1}" in script and "--only $SLURM_ARRAY_TASK_ID" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0


def test_an_array_trains_in_the_folder_that_it_was_written_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text")
    flags = dataclasses.replace(small_flags("mine", slurm=True), text="text.txt", budgets=[2e9, 12345678901.0])
    runs = finish_all(flags)
    scaling_sweep.sweep(flags, runs, Console(quiet=True))
    *_, line = (tmp_path / "mine" / "sweep.sbatch").read_text().splitlines()
    words = shlex.split(line.removesuffix(" --only $SLURM_ARRAY_TASK_ID"))
    told = parse(ScalingFlags, words[4:], "")
    assert words[:4] == ["exec", sys.executable, "scripts/scaling_laws.py", "sweep"]
    assert (told.text, told.out) == (str(tmp_path / "text.txt"), str(tmp_path / "mine"))
    assert dataclasses.replace(told, text="text.txt", out="mine", slurm=True) == flags


@pytest.mark.slow
def test_a_sweep_trains_skips_what_is_done_and_writes_its_page(tmp_path):
    words = ["all", "--text", ROOT / "data" / "tinyshakespeare" / "input.txt", "--sizes", "[0.03,0.11,0.2]"]
    words += ["--kinds", "[arm,mdm]"]
    words += [
        "--budgets",
        "[2e9,6e9]",
        "--check_factors",
        "[2]",
        "--val_samples",
        "8",
        "--val_draws",
        "2",
        "--vocab_size",
        "512",
    ]
    words += ["--block_size", "64", "--kind_flags", "compile=off", "--bootstrap_draws", "40", "--out", tmp_path]
    done = run_script(*words)
    assert done.returncode == 0, done.stderr
    assert "run 14 of 14" in done.stdout and "of the sweep's FLOPs done" in done.stdout
    page = (tmp_path / "scaling_laws.md").read_text()
    assert math.isfinite(json.loads((tmp_path / "scaling_laws.json").read_text())["compute_gaps"]["mdm"]["factor"][0])
    assert "times 2" in page
    again = run_script(*words)
    assert again.returncode == 0 and again.stdout.count("done before") == 4 + 14
