"""Quality against speed at equal loss: the search for the ARM, what is measured of texts, and what the page says."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lit_gpt.checkpoints.loaded import load_model
from lit_gpt.config import Config
from lit_gpt.studies.equal_loss import match_loss
from lit_gpt.studies.sampler_quality import (
    PROMPT,
    SamplerPoint,
    cache_divergence,
    judge_texts,
    measure_family,
    sampler_settings,
    texts_of,
)
from lit_gpt.studies.sampling_quality_page import (
    QualityStudy,
    as_good,
    fastest_as_good,
    speed_verdict,
    write_quality_page,
)
from lit_gpt.studies.trained_models import TrainedModel
from tests.support.small_models import export_arm_and_mdm
from tests.support.small_tokenizers import CORPUS
from tests.support.training_runs import ROOT, one_thread_environment


@pytest.mark.parametrize("start", [1, 30, 700, 20_000])
def test_the_steps_of_a_loss_are_found(start):
    """A curve that bends: the loss after n steps is 2 + 9 n^-0.3, and 3.1 after 1105."""
    runs = []

    def loss_after(steps: int) -> float:
        runs.append(steps)
        return 2 + 9 * steps**-0.3

    found = match_loss(loss_after, 3.1, start, 0.02, 30)
    nearest, loss = next(iter(found.items()))
    assert abs(loss - 3.1) <= 0.02 and 1000 < nearest < 1200
    assert runs == list(dict.fromkeys(runs)) and len(runs) <= 16


def test_a_search_without_a_match_ends():
    assert match_loss(lambda steps: 5.0, 3.0, 10, 0.02, 4) == {10: 5.0, 20: 5.0, 40: 5.0, 80: 5.0}
    assert match_loss(lambda steps: 2.0, 3.0, 4, 0.02, 9) == {4: 2.0, 2: 2.0, 1: 2.0}
    # The loss jumps over the target between 7 and 8 steps: nothing lies between.
    found = match_loss(lambda steps: 4.0 if steps < 8 else 2.0, 3.0, 4, 0.02, 9)
    assert set(found) == {4, 7, 8} or found.keys() >= {7, 8}


def test_the_judge_reads_what_stands_behind_the_prompts(tmp_path):
    model = load_model(export_arm_and_mdm(tmp_path, embedding_scale=8)["arm"], device="cpu")
    ids = model.tokenizer.encode_ids(CORPUS.read_text()[:3000])
    texts = texts_of(ids, 3, 20)
    found = judge_texts(model.model, texts)
    with torch.no_grad():
        log_p = model.model(torch.tensor(texts)[:, :-1]).float().log_softmax(2)
    nll = -log_p.gather(2, torch.tensor(texts)[:, 1:, None])[:, PROMPT - 1 :, 0].mean(1)
    assert found["loss"] == pytest.approx(float(nll.mean()), abs=1e-4)
    assert found["error"] == pytest.approx(float(nll.std() / 3**0.5), abs=1e-4)
    repeated = judge_texts(model.model, [[*range(3, 3 + PROMPT), *[7] * 12]] * 3)
    assert repeated["entropy"] == 0 and repeated["pairs"] == pytest.approx(1 / 33)
    varied = judge_texts(model.model, [[*range(3, 3 + PROMPT), *range(20, 32)]])
    assert varied["entropy"] == pytest.approx(math.log(12)) and varied["pairs"] == 1 and math.isnan(varied["error"])
    with pytest.raises(ValueError, match="too few for --rows 5000"):
        texts_of(ids, 5000, 20)


def test_every_family_writes(tmp_path):
    paths = export_arm_and_mdm(tmp_path, block_size=24, embedding_scale=4)
    text = CORPUS.read_text()[:2000]
    for family in ("real text", "ARM", "blocks of 16, dual cache", "entropy"):
        points = measure_family(family, paths["arm" if family == "ARM" else "mdm"], paths["arm"], text, (2, 24))
        names = [point["setting"] for point in points]
        assert names == (["validation"] if family == "real text" else list(sampler_settings()[family]))
        assert all(SamplerPoint(**point).loss > 0 for point in points)
    caches = cache_divergence(paths["mdm"], paths["arm"], text, (2, 24))
    # Read anew at every step, a cache changes nothing.
    assert [one["same"] for one in caches if one["cache"] == "none" or one["refresh"] == 1] == [1.0, 1.0, 1.0]


ARM = SamplerPoint("ARM", "temperature 1.0", 1000, 300, 3.0, 0.03, 5.0, 0.6)
REAL = SamplerPoint("real text", "validation", 0, 0, 2.9, 0.03, 5.0, 0.6)


def test_as_good_is_within_the_error_and_not_by_repetition():
    assert as_good(replace(ARM, loss=3.04), ARM) and not as_good(replace(ARM, loss=3.05), ARM)
    assert as_good(replace(ARM, pairs=0.55), ARM) and not as_good(replace(ARM, loss=1.0, pairs=0.5), ARM)
    assert as_good(replace(ARM, entropy=4.6), ARM) and not as_good(replace(ARM, loss=1.0, entropy=4.4), ARM)


def test_the_page_names_the_fastest_setting_that_is_as_good(tmp_path):
    few = SamplerPoint("origin", "8 steps", 4000, 900, 4.0, 0.03, 5.0, 0.6)
    some = SamplerPoint("origin", "32 steps", 1500, 200, 3.03, 0.03, 5.0, 0.6)
    many = SamplerPoint("origin", "128 steps", 400, 60, 3.0, 0.03, 5.0, 0.6)
    repeats = SamplerPoint("greedy", "8 steps", 4000, 900, 1.0, 0.03, 2.0, 0.1)
    points = [REAL, ARM, few, some, many, repeats]
    assert fastest_as_good(points, ARM) == [some]
    assert speed_verdict([REAL, ARM, few, repeats], ARM).startswith("No sampler of the MDM writes as well")
    said = speed_verdict(points, ARM)
    assert "(origin, 32 steps) has 1.50 times its speed, where the paper claims 1.4" in said
    assert "(origin, 32 steps) has 0.67 times its speed, where" in said
    run = {
        "config": Config("tiny", 1, 2, 32, 64, 2).to_dict(),
        "total_tokens": 1000,
        "val_is_bound": False,
        "val_loss_se": 0.01,
    }
    arm = TrainedModel({**run, "step": 30, "val_loss": 3.3}, 1.0, ["pretrain/train_ar.py"])
    mdm = TrainedModel({**run, "step": 480, "val_loss": 3.31, "total_tokens": 16_000}, 9.0, ["pretrain/train_mdm.py"])
    judge = TrainedModel({**run, "step": 90, "val_loss": 2.9}, 2.0, ["pretrain/train_ar.py"])
    caches = [
        {"cache": "none", "refresh": 0, "same": 1.0, "loss": 3.0},
        {"cache": "dual", "refresh": 4, "same": 0.5, "loss": 3.1},
    ]
    study = QualityStudy({"ARM": arm, "MDM": mdm, "judge": judge}, {30: 3.3, 60: 3.0}, 0.02, points, caches, (64, 128))
    page = tmp_path / "sampling_quality.md"
    table = write_quality_page(study, page, "`command`", "some machine", ["python pretrain/train_mdm.py"])
    assert "| - origin, 32 steps | 1,500 (1.50) | 200 (0.67) | 3.030 ± 0.030 | 0.60 |" in table
    text = page.read_text()
    assert "The MDM took 16.0 times the ARM's compute" in text and "says nothing" not in text
    assert "3.000 (60 steps)" in text.replace("3.300 (30 steps), ", "")
    far = replace(study, models={**study.models, "ARM": replace(arm, result={**arm.result, "val_loss": 2.8})})
    write_quality_page(far, page, "`command`", "some machine", [])
    text = page.read_text()
    assert "No ARM came within 0.02 nats: the MDM's bound differs by +0.510" in text
    assert "The judge is no better than the ARM." in text and "says nothing about the paper's claim" in text
    rows = list(csv.DictReader(page.with_suffix(".csv").open()))
    assert [row["family"] for row in rows] == [point.family for point in points]
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_whole_benchmark_small(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/sampling_quality.py"), "--steps", "40", "--judge_steps", "5"]
    command += ["--most_arms", "2", "--rows", "4", "--n_layer", "1", "--n_embd", "32", "--block_size", "32"]
    for _ in range(2):
        done = subprocess.run(
            [*command, "--batch_size", "4", "--out", "out"], cwd=tmp_path, env=one_thread_environment(),
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done before") == 3 + 1 + 2 + 1 + len(sampler_settings()) + 2
    assert "## At equal quality" in (tmp_path / "out/sampling_quality.md").read_text()
