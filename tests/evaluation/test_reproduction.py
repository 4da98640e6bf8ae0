"""scripts/reproduce.py: the published commands, ours beside the published numbers, on stand-in checkpoints."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.data.packed_format import PackedDatasetBuilder
from lit_gpt.evaluation.claims import CLAIMS, Measured, compute_gap, find_released
from lit_gpt.evaluation.progress import read_told
from lit_gpt.evaluation.reproduction import PUBLISHED, compare
from lit_gpt.evaluation.settings import ReproduceFlags
from lit_gpt.evaluation.work import Work
from scripts import reproduce
from tests.support.small_models import export_arm_and_mdm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    """An ARM and an MDM with random weights that read as much as GSM8K's questions and answers."""
    return export_arm_and_mdm(tmp_path_factory.mktemp("models"), block_size=256)


def test_gsm8k_on_a_stand_in(paths, tmp_path, capsys):
    words = [
        "gsm8k",
        "--checkpoint",
        str(paths["mdm"]),
        "--limit",
        "2",
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    reproduce.main([*words, "--dry_run"])
    out = capsys.readouterr().out
    assert "answers: 2 requests, 0 of them found, 2 to compute" in out and not (tmp_path / "out").exists()
    reproduce.main(words)
    out = capsys.readouterr().out
    assert re.search(r"accuracy\s+0\s+0.585\s+0.68\d+\s+agrees within sampling error", out)
    record = json.loads((tmp_path / "out" / "gsm8k.json").read_text())
    assert record["results"][0]["published"] == 0.585 and record["results"][0]["ours"] == 0.0 and record["limit"] == 2
    assert record["checkpoints"][0]["path"] == str(paths["mdm"]) and len(record["checkpoints"][0]["sha256"]) == 64
    assert record["cost"]["requests"] == 2 and record["cost"]["flops"] > 1e6 and record["cost"]["seconds"] > 0
    assert record["versions"]["torch"] and record["commands"][0].startswith("python evaluate_gsm8k.py --ckpt_path")
    (row,) = (tmp_path / "out" / "gsm8k.md").read_text().splitlines()
    assert row.startswith("| gsm8k | accuracy 0 (published 0.585) | first 2 | ")


def test_fineweb_of_both_kinds_on_stand_ins(paths, tmp_path, capsys):
    builder = PackedDatasetBuilder(tmp_path / "crawl", "validation", 65 * 8, 1, "uint16", 500)
    builder.add_array(np.random.default_rng(0).integers(3, 500, 65 * 8).astype(np.uint16))
    builder.write_reminder()
    words = ["--checkpoint", str(paths["arm"]), str(paths["mdm"]), "--data", str(tmp_path / "crawl"), "--limit", "1"]
    reproduce.main(["fineweb", *words, "--out", str(tmp_path / "out"), "--device", "cpu"])
    record = json.loads((tmp_path / "out" / "fineweb.json").read_text())
    ours = {one["name"]: one for one in record["results"]}
    # Random weights: about as likely as one of 500 tokens each.
    assert all(100 < ours[f"{kind} crawl perplexity"]["ours"] < 5000 for kind in ("arm", "mdm"))
    assert ours["arm CC-MAIN-2024-10 perplexity"]["verdict"] == "not measured here"
    assert record["cost"]["passes"] > 100 and "not known here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (Measured("share", 0.585, 1319), "agrees within sampling error"),
        (Measured("share", 0.55, 1319), "differs by more than sampling error"),
        (Measured("share", 0.55, 100), "agrees within sampling error"),
        (Measured("share", 0.55), "no sampling error is known"),
        (Measured("share"), "not measured here"),
        (Measured("other", 3.0), "the published number is not known here"),
        (Measured("unheard of", 3.0), "the published number is not known here"),
        (Measured("share", 0.6, standard_error=0.01), "agrees within sampling error"),
    ],
)
def test_verdicts(measured, verdict):
    published = {"share": {"value": 0.585, "source": "there"}, "other": {"value": None, "source": None}}
    assert compare(measured, published).verdict == verdict


def test_a_tolerance_is_the_interval_of_a_share():
    """Of 1319 questions at 58.5 %: 1.96 sqrt(0.585 * 0.415 / 1319)."""
    found = compare(Measured("share", 0.5, 1319), {"share": {"value": 0.585, "source": None}})
    assert found.tolerance == pytest.approx(0.02659, abs=1e-4)


@pytest.mark.parametrize(
    ("published", "measured", "tolerance", "agrees"),
    [
        # A loss that is exact: half a unit of the published last digit is left.
        (18.3, Measured("x", 18.3004, standard_error=0.0), 0.05, True),
        (18.3, Measured("x", 18.36, standard_error=0.0), 0.05, False),
        (16, Measured("x", 16.4, standard_error=0.0), 0.5, True),
        # Wilson's interval of all right, of 200: from 200 / (200 + 1.96^2); a share is known to half a percent at least.
        (1.0, Measured("x", 0.99, 200), math.hypot(3.8415 / 203.8415, 0.005), True),
        (0.0, Measured("x", 0.01, 200), math.hypot(3.8415 / 203.8415, 0.005), True),
        (1.0, Measured("x", 0.9, 200), math.hypot(3.8415 / 203.8415, 0.005), False),
    ],
)
def test_a_tolerance_is_never_nothing(published, measured, tolerance, agrees):
    found = compare(measured, {"x": {"value": published, "source": None}})
    assert found.tolerance == pytest.approx(tolerance, rel=1e-4)
    assert found.verdict == ("agrees within sampling error" if agrees else "differs by more than sampling error")


def test_few_questions_tell_little():
    published = {"x": {"value": 0.5, "source": None}}
    assert compare(Measured("x", 0.0, 2), published).verdict.endswith("; too few questions to tell")
    assert compare(Measured("x", 0.45, 97), published).verdict == "agrees within sampling error"
    assert compare(Measured("x", 0.0, 96), published).verdict == "differs by more than sampling error"


def test_a_perplexitys_error_is_that_of_its_rows():
    """Not the estimator's, which an ARM has not; of less than 30 rows none is known."""
    (evaluation, *_) = CLAIMS["fineweb"](ReproduceFlags(checkpoint=["ar-1.safetensors"], data="x")).evaluations

    def error(rows: int) -> float | None:
        lines = [
            f"exact: loss 2.90690 nats per token, the estimator's standard error 0.00000, {rows} rows",
            "the rows' standard deviation 0.50000 nats per token",
            "x, y, ppl=18.3",
        ]
        return evaluation.read(lines, 0.0)[0].standard_error

    assert error(100) == pytest.approx(18.3 * 0.05) and error(29) is None


def test_every_published_number_has_a_source_and_every_claim_its_numbers():
    claims = json.loads(PUBLISHED.read_text())["claims"]
    assert set(claims) == set(CLAIMS)
    for claim in claims.values():
        assert claim["statement"] and claim["source"]
        assert all((one["value"] is None) == (one["source"] is None) for one in claim["results"].values())


def test_zero_shot_has_the_published_settings(paths, tmp_path):
    flags = ReproduceFlags(checkpoint=[str(paths["mdm"])], out=str(tmp_path), limit=3)
    commands = [" ".join(one.command) for one in CLAIMS["zero_shot"](flags).evaluations]
    assert len(commands) == 8 and all("--limit 3" in command for command in commands)
    (boolq,) = (command for command in commands if "--tasks boolq " in command)
    assert boolq.endswith(f"--model_args ckpt_path='{paths['mdm']}',nll_type='chain_rule',cfg=1.6")
    mine = ReproduceFlags(checkpoint=["x"], tasks=["lambada_local=lambada_standard"])
    (command,) = (one.command for one in CLAIMS["zero_shot"](mine).evaluations)
    assert "lambada_local" in command and command[-1].endswith("nll_type='chain_rule',greddy=True,cfg=1.1")
    with pytest.raises(ValueError, match="--tasks nothing: choose from lambada_standard"):
        CLAIMS["zero_shot"](ReproduceFlags(checkpoint=["x"], tasks=["nothing"]))


def test_the_compute_gap_of_two_power_laws():
    """L = 6 C^-0.05 and L = 6 (C / 16)^-0.05."""
    arm = [(compute, 6 * compute**-0.05) for compute in (6.0, 30.0, 100.0)]
    mdm = [(compute, 6 * (compute / 16) ** -0.05) for compute in (60.0, 300.0, 1600.0)]
    assert compute_gap(arm, mdm) == pytest.approx(16)
    assert compute_gap(arm[:1], mdm) is None and compute_gap(arm, [(c, math.log(c)) for c, _ in mdm]) is None


def test_no_compute_gap_of_losses_that_rise_or_are_none():
    falling, rising = [(1.0, 3.0), (2.0, 2.0)], [(1.0, 3.0), (2.0, 3.5)]
    assert compute_gap(rising, falling) is None and compute_gap(falling, rising) is None
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^scaling: a loss of {wrong:g} nats: expected a finite number above 0"):
            compute_gap([(1.0, wrong), (2.0, 1.0)], falling)


def test_a_local_checkpoint_takes_precedence_and_a_missing_one_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "mdm-1028M-3300e18-rsl-gsm8k.safetensors").write_bytes(b"")
    assert find_released("mdm-1028M-3300e18-rsl-gsm8k", tmp_path) == str(
        tmp_path / "mdm-1028M-3300e18-rsl-gsm8k.safetensors"
    )
    with pytest.raises(
        FileNotFoundError, match="nieshen/SMDM.*put it there, or name another checkpoint by --checkpoint"
    ):
        find_released("mdm-1028M-1600e18-reverse", tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "'nothing' is no claim: choose from zero_shot, gsm8k"),
        ([], "'' is no claim"),
        (["gsm8k", "--limit", "0"], "--limit 0: expected at least 1"),
        (["gsm8k", "--checkpoint", "a", "b"], "--checkpoint: 2 were given, this claim is about 1"),
        (["speed", "--checkpoint", "a.safetensors"], "does not say whether it is an ARM or an MDM"),
        (["scaling", "--checkpoint", "mine.safetensors"], "expected names such as mdm-170M-10e18"),
        (["scaling", "--checkpoint", "mdm-170M-10e18.safetensors"], "--data is missing"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        reproduce.main(words)


def test_what_was_told_is_read_again():
    line = "rows: 12 requests, 4 of them found, 8 to compute: at most 1,024 passes over 2,097,152 tokens, 3.5e+12 FLOPs"
    assert read_told(line) == (Work(8, 1024, 2097152, 3500000000000), 4)
    assert read_told("rows: 4 requests, 4 of them found, 0 to compute") == (Work(0), 4)
    assert read_told("rows: done") is None
