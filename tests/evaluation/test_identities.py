"""The settings that stand beside users' answers, spelled out: as long as they stay, those answers are continued."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import evaluate_gsm8k
import evaluate_reverse
from eval import gen_model_answer
from lit_gpt import cli
from lit_gpt.checkpoints.weights import load_weights, state_hash
from tests.support.small_models import export_arm_and_mdm

CONFIG = {
    "name": "tiny",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "intermediate_size": 64,
    "n_query_groups": 2,
    "block_size": 256,
    "vocab_size": 500,
    "padding_multiple": 64,
    "rope_theta": 10000.0,
    "rope_table_dtype": "bfloat16",
    "norm_eps": 1e-05,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """An ARM and an MDM with random weights, and their tokenizer."""
    return export_arm_and_mdm(tmp_path_factory.mktemp("models"), block_size=256)


@pytest.fixture
def settings_of(models, tmp_path, monkeypatch):
    """Run a script with 2 steps on a question each, and read the settings beside its answers."""

    def run(module: Any, kind: str, *flags: str) -> tuple[dict[str, Any], dict[str, Any]]:
        path = tmp_path / f"{kind}.jsonl"
        flags = (*flags, "--steps", "2") if kind == "mdm" else flags
        monkeypatch.setattr(sys, "argv", ["script.py", *(word.format(path=path) for word in flags)])
        with pytest.raises(SystemExit) as end:
            cli.run(module.main)
        assert not end.value.code
        weights, _ = load_weights(models[kind])
        tokenizer = (models["tokenizer"] / "tokenizer.model").read_bytes()
        identity = {
            "checkpoint": state_hash(weights),
            "kind": kind,
            "config": CONFIG,
            "tokenizer": hashlib.sha256(tokenizer).hexdigest(),
            "special_tokens": "ids",
            "dtype": "float32",
        }
        return json.loads(path.with_suffix(".settings.json").read_text()), identity

    return run


def write(path: Path, **question: Any) -> str:
    """A file of one question; returns its hash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(question) + "\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_gsm8k(models, settings_of, kind, tmp_path):
    data = write(tmp_path / "test.jsonl", question="1 + 1?", target="2")
    flags = ("--ckpt_path", str(models[kind]), "--data", str(tmp_path / "test.jsonl"), "--output", "{path}")
    found, identity = settings_of(evaluate_gsm8k, kind, *flags, "--length", "20", "--dtype", "float32")
    scale = {"arm": 0.0, "mdm": 0.1}[kind]
    assert found == {
        **identity,
        "data": data,
        "steps": {"arm": 256, "mdm": 2}[kind],
        "length": 20,
        "temperature": 0.1,
        "seed": 1234,
        "algorithm": "greedy",
        "cfg1": scale,
        "cfg2": scale,
    }
    # Answers of a time when special tokens were always spelled out do not say so, and are continued on request.
    found, _ = settings_of(
        evaluate_gsm8k, kind, *flags, "--length", "20", "--special_tokens", "text", "--existing", "overwrite"
    )
    assert "special_tokens" not in found


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_reversal(models, settings_of, kind, tmp_path):
    names = ("d2p_prompts_test.jsonl", "p2d_reverse_prompts_test.jsonl")
    data = [write(tmp_path / "data" / name, prompt=name, completion="x") for name in names]
    flags = ("--ckpt_path", str(models[kind]), "--data_dir", str(tmp_path / "data"), "--output", "{path}")
    found, identity = settings_of(evaluate_reverse, kind, *flags, "--qs_type", "dtn", "--dtype", "float32")
    assert found == {
        **identity,
        "data": data,
        "qs_type": "dtn",
        "steps": {"arm": 32, "mdm": 2}[kind],
        "length": 52,
        "seed": 1234,
        "algorithm": "greedy",
        "cfg": {"arm": 0.0, "mdm": 0.8}[kind],
    }


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_mt_bench(models, settings_of, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "mt_bench" / "question.jsonl", question_id=7, category="c", turns=["Why?", "And?"])
    flags = ("--model-id", "a", "--model-type", kind, "--model-path", str(models[kind]), "--answer-file", "{path}")
    found, identity = settings_of(gen_model_answer, kind, *flags, "--max-new-token", "200", "--dtype", "float32")
    how = {"steps": 2, "cfg_scale": 0.0} if kind == "mdm" else {}
    assert found == {"model_id": "a", **identity, "context_length": 200, "choices": 1, **how}
