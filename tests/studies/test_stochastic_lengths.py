"""The study of stochastic lengths: what it measures is the bound and the next token, and its page says what was found."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoints.loaded import load_model
from lit_gpt.config import Config
from lit_gpt.likelihood.elbo import elbo
from lit_gpt.studies.context_lengths import block_losses, even_positions, next_token_scores
from lit_gpt.studies.stochastic_lengths import LengthStudy, measure_lengths, verdict, write_length_page
from lit_gpt.studies.trained_models import TrainedModel
from tests.support.small_models import export_arm_and_mdm
from tests.support.small_tokenizers import CORPUS
from tests.support.training_runs import ROOT, one_thread_environment


@pytest.fixture(scope="module")
def mdm(tmp_path_factory) -> Path:
    return export_arm_and_mdm(tmp_path_factory.mktemp("models"), block_size=16, embedding_scale=8)["mdm"]


def test_a_blocks_loss_is_the_bound_of_its_pieces(mdm):
    model = load_model(mdm, device="cpu")
    ids = model.tokenizer.encode_ids(CORPUS.read_text()[:400])
    blocks = [ids[:8], ids[8:16], ids[16:24]]
    mask_id = model.model.config.mask_id
    expected = [
        sum(elbo(model.model, [], torch.tensor(block[at : at + 4]), mask_id=mask_id).nll for at in (0, 4)) / 8
        for block in blocks
    ]
    # 15 masks of four tokens: with 16 passes nothing is random.
    assert block_losses(model, blocks, 4, 16) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="8 tokens do not divide into pieces of 3"):
        block_losses(model, blocks, 3, 16)


def test_the_next_token_is_the_last_of_its_row(mdm):
    model = load_model(mdm, device="cpu")
    ids = model.tokenizer.encode_ids(CORPUS.read_text()[:400])
    positions, mask_id = [15, 20, 33], model.model.config.mask_id
    for length, pad_to in ((4, 0), (4, 16), (16, 0)):
        found = next_token_scores(model, ids, positions, length, pad_to)
        for place, end in enumerate(positions):
            row = [*ids[end - length + 1 : end], mask_id]
            row += [mask_id] * (max(pad_to, length) - length)
            with torch.no_grad():
                log_p = model.model(torch.tensor([row]))[0, length - 1].float().log_softmax(0)
            assert found.nll[place] == pytest.approx(-float(log_p[ids[end]]), abs=1e-4)
            assert found.correct[place] == (int(log_p[:500].argmax()) == ids[end])


def test_positions_are_evenly_spread():
    assert even_positions(3, 11, 4) == [3, 5, 7, 9]
    assert even_positions(127, 60_000, 2048)[-1] < 60_000


def measured(losses: list[list[float]]) -> dict[str, list[list[float]]]:
    return {"loss": losses, "nll": losses, "correct": [[0.5, 0.5, 0.25, 0.5]] * 2}


def test_the_page_says_what_was_found(tmp_path):
    """One kind is better at 8 tokens by 0.1 in both seeds; another differs as much as its seeds contradict each other."""
    plain = [
        measured([[3.0, 3.5, 3.2, 3.1], [2.0, 2.1, 2.2, 2.0]]),
        measured([[3.1, 3.4, 3.3, 3.0], [2.1, 2.0, 2.2, 2.0]]),
    ]
    better = [measured([[value - 0.1 for value in one["loss"][0]], one["loss"][1]]) for one in plain]
    unsure = [
        measured([[value + sign for value in length] for length in one["loss"]])
        for one, sign in zip(plain, (0.1, -0.1), strict=True)
    ]
    shape = Config("tiny", 1, 2, 32, 64, 2)
    run = {"config": shape.to_dict()}
    model = TrainedModel({**run, "step": 300, "total_tokens": 1000}, 1.5, ["pretrain/train_mdm.py"])
    kinds = {"one length": plain, "0.1 random lengths": better, "0.01 random lengths": unsure}
    padded = [{"nll": one["nll"], "correct": one["correct"]} for one in plain]
    study = LengthStudy(
        [8, 16], dict.fromkeys(kinds, [model, model]), {**kinds, "filled up": padded}, "one length", "filled up"
    )
    none = "no difference that can be told from none at any length"
    assert verdict(study, "0.1 random lengths").endswith(
        f"loss: better at 8 tokens; accuracy of the next token: {none}."
    )
    assert verdict(study, "0.01 random lengths").count(none) == 2
    write_length_page(study, tmp_path / "lengths.md", "`command`", ["python pretrain/train_mdm.py"])
    page = (tmp_path / "lengths.md").read_text()
    line = "| 8 | 3.200 | 3.100: -0.100 ± 0.000 (-0.100, -0.100) | 3.200: 0.000 ± 0.000 (+0.100, -0.100) |"
    # The sign of a difference that is 0 but for rounding is either.
    assert line in re.sub("[+-]0.000", "0.000", page)
    rows = list(csv.DictReader((tmp_path / "lengths.csv").open()))
    assert len(rows) == 3 * 2 * 3 * 2 + 2 * 2 * 2
    assert rows[0] == {"kind": "one length", "seed": "1", "quantity": "loss", "tokens": "8", "count": "4",
                       "mean": "3.2", "standard_error": "0.108"}  # fmt: skip
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_measuring_names_a_text_that_is_too_short(mdm):
    text = CORPUS.read_text()[:3000]
    found = measure_lengths(mdm, text, [8, 16], (4, 4, 8), True)
    assert [len(values) for values in found["as it is"]["loss"]] == [4, 4]
    assert found["padded"]["nll"][1] == pytest.approx(found["as it is"]["nll"][1], abs=1e-5)
    assert found["padded"]["nll"][0] != pytest.approx(found["as it is"]["nll"][0], abs=1e-3)
    with pytest.raises(ValueError, match="too few for --blocks 4000"):
        measure_lengths(mdm, text, [8, 16], (4000, 4, 8), False)


@pytest.mark.slow
def test_the_whole_study_small(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/study_stochastic_lengths.py"), "--flops", "1e-9", "--seeds", "1"]
    command += ["--lengths", "[8,32]", "--n_layer", "1", "--n_embd", "32", "--blocks", "4", "--positions", "16"]
    command += ["--budget", "4", "--vocab_size", "400", "--batch_size", "4", "--ssl_ratios", "[0.5]", "--out", "out"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, env=one_thread_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done before") == 7
    page = (tmp_path / "out/stochastic_lengths.md").read_text()
    assert "pretrain/train_mdm_rl.py" in page and "| 32 | " in page
