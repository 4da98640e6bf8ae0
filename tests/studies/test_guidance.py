"""The study of guidance: questions from a text, answers under the guided bound, and what the page says of them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
import torch

from lit_gpt.checkpoints.loaded import load_model
from lit_gpt.studies.guidance import (
    CHOICES,
    answer_questions,
    continuation_questions,
    guidance_verdict,
    read_harness_samples,
    write_guidance_page,
)
from tests.support.small_models import export_arm_and_mdm
from tests.support.small_tokenizers import CORPUS
from tests.support.training_runs import ROOT, one_thread_environment


def test_wrong_continuations_are_from_elsewhere():
    ids = list(range(100))
    questions = continuation_questions(ids, 60, 8, 4)
    assert len(questions) == 60
    for question in questions:
        true = question[0]
        assert len(question) == CHOICES and len({request.prefix for request in question}) == 1
        assert true.prefix + true.target == tuple(range(true.prefix[0], true.prefix[0] + 12))
        for request in question:
            assert request.target == tuple(range(request.target[0], request.target[0] + 4))
        assert not any(set(request.target) & set(true.target) for request in question[1:])
    with pytest.raises(ValueError, match="100 tokens, too few for --questions 90"):
        continuation_questions(ids, 90, 8, 4)


def test_answers_are_those_of_the_guided_distribution(tmp_path):
    """Of one token the bound is the likelihood itself: un + (w + 1) (cond - un), normalised."""
    model = load_model(export_arm_and_mdm(tmp_path, embedding_scale=8)["mdm"], device="cpu")
    ids = model.tokenizer.encode_ids(CORPUS.read_text()[:600])
    questions, mask_id = continuation_questions(ids, 6, 10, 1), model.model.config.mask_id
    for scale in (0.0, 2.0):
        losses, correct = [], []
        for question in questions:
            condition = list(question[0].prefix)
            with torch.no_grad():
                rows = torch.tensor([[*condition, mask_id], [mask_id] * 11])
                cond, un = model.model(rows)[:, 10].float()
            log_p = (un + (scale + 1) * (cond - un)).log_softmax(0)
            nll = [-float(log_p[request.target[0]]) for request in question]
            losses.append(nll[0])
            correct.append(float(nll[0] < min(nll[1:])))
        found = answer_questions(model, questions, scale, 16)
        assert found["loss"] == pytest.approx(losses, abs=1e-4) and found["correct"] == correct


def test_the_harness_samples_come_in_the_order_of_the_questions(tmp_path):
    samples = [{"doc_id": number, "acc": value} for number, value in ((2, 1.0), (0, 0.0), (1, 1.0))]
    path = tmp_path / "model" / "samples_next_line_2026.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(one) + "\n" for one in samples))
    assert read_harness_samples(tmp_path, "next_line", "acc") == [0.0, 1.0, 1.0]


def test_the_page_says_what_was_found(tmp_path):
    """At w = 1 every second answer more is right and all losses are higher by a nat; LAMBADA is as it was."""
    wrong, words = [0.0] * 12, [20.0 + number for number in range(12)]
    plain = {"lines": wrong, "correct": wrong, "loss": [3.0, 3.5] * 6, "words": words}
    guided = {**plain, "correct": [0.0, 1.0] * 6, "loss": [4.0, 4.6] * 6}
    found = {0.0: plain, 1.0: guided}
    assert guidance_verdict(found).splitlines() == [
        "- next_line, right: no effect that can be told from none.",
        "- continuations, right: better at w = 1.",
        "- continuations, nats per token: worse at w = 1.",
        "- LAMBADA, nats per word: no effect that can be told from none.",
    ]
    facts = {
        "written": "`command`",
        "tokens": 9,
        "val_loss": 3.0,
        "parameters": "1",
        "prefix": 8,
        "target": 4,
        "passages": 12,
    }
    write_guidance_page(found, tmp_path / "guidance.md", facts, ["python pretrain/train_mdm.py"])
    page = (tmp_path / "guidance.md").read_text()
    assert "| 1 | +0.000 ± 0.000 | +0.500 ± 0.151 | +1.050 ± 0.015 | +0.000 ± 0.000 |" in page
    rows = list(csv.DictReader((tmp_path / "guidance.csv").open()))
    assert len(rows) == 2 * 4 * 2 and rows[0]["quantity"] == "next_line, right"
    assert (tmp_path / "guidance.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_whole_study_small(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/study_guidance.py"), "--steps", "10", "--questions", "8"]
    command += ["--passages", "4", "--budget", "2", "--n_layer", "1", "--n_embd", "32", "--batch_size", "4"]
    for _ in range(2):
        done = subprocess.run(
            [*command, "--scales", "[0,1]", "--out", str(tmp_path / "out")],
            cwd=ROOT,
            env=one_thread_environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done before") == 6 and "| 1 | " in (tmp_path / "out/guidance.md").read_text()
