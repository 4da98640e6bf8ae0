"""The study of the reversal curse, at a small size."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_gpt.studies.study_pages import report_folder
from scripts.study_reverse_curse import PAGE, Flags, read_accuracies
from tests.support.training_runs import ROOT, one_thread_environment


def test_shares_are_read_from_the_evaluations_last_line():
    assert read_accuracies(["x", "qs_type: dtn, accs: 1.0, accs_reverse: 6.9e-05"]) == {"same": 1.0, "reverse": 6.9e-05}


def test_a_short_look_does_not_replace_the_repositorys_report():
    assert report_folder(Flags(), PAGE) == report_folder(Flags(out="elsewhere"), PAGE) == Path("docs/results")
    assert report_folder(Flags(people=20, out="quick"), PAGE) == Path("quick")
    assert report_folder(Flags(people=20, docs="own"), PAGE) == Path("own")
    with pytest.raises(ValueError, match=r"--docs \S+reverse_curse.md: only the study as it is"):
        report_folder(Flags(people=20, docs=str(ROOT / "docs/results")), PAGE)


def test_the_whole_study_small(tmp_path):
    """Nobody read of one half "description is name"; the report has a row for each question and the commands."""
    command = [sys.executable, str(ROOT / "scripts/study_reverse_curse.py"), "--people", "24", "--batch_size", "16"]
    command += ["--arm_steps", "6", "--mdm_steps", "6", "--checkpoints", "1", "--out", "out", "--docs", "docs"]

    def run():
        return subprocess.run(
            command, cwd=tmp_path, env=one_thread_environment(), check=True, capture_output=True, text=True
        ).stdout

    run()
    texts = [json.loads(line) for line in (tmp_path / "out/facts/all_prompts_train.jsonl").read_text().splitlines()]
    assert len(texts) == 24 * 3 + 12 * 3
    asked = [
        json.loads(line) for line in (tmp_path / "out/facts/p2d_reverse_prompts_test.jsonl").read_text().splitlines()
    ]
    assert len(asked) == 12 and not any(question in texts for question in asked)
    known = [json.loads(line) for line in (tmp_path / "out/facts/d2p_prompts_test.jsonl").read_text().splitlines()]
    assert len(known) == 12 and all(question in texts for question in known)
    report = (tmp_path / "docs/reverse_curse.md").read_text()
    assert len(re.findall(r"^\| \W*(?:one order|both orders)", report, re.M)) == 4
    own = "--people 24 --arm_steps 6 --mdm_steps 6 --batch_size 16 --checkpoints 1 --out out --docs docs"
    assert f"Written by `python scripts/study_reverse_curse.py {own}` on " in report
    assert report.count("python sft/finetune_mdm_reverse.py") == 2 and report.count("python evaluate_reverse.py") == 4
    assert (tmp_path / "docs/reverse_curse.png").read_bytes().startswith(b"\x89PNG")
    # Done once: a second call trains and asks nothing.
    again = run()
    assert again.count("done before") == 4 and "iter" not in again
