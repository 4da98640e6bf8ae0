"""Every evaluation that writes texts takes every setting of sampling, and its results say which."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest

import evaluate_gsm8k
import evaluate_reverse
from lit_gpt.cli import parse
from lit_gpt.evaluation.lm_adapter import Adapter
from lit_gpt.evaluation.settings import ModelArgs, MtBenchAnswerFlags, read_model_args
from lit_gpt.sampling.settings import Sampling, changed_settings, sampling_values
from tests.support.small_models import export_arm_and_mdm

# Another value of each, and what it needs.
VALUES: dict[str, dict[str, Any]] = {
    "algorithm": {"algorithm": "entropy"},
    "steps": {"steps": 7},
    "temperature": {"temperature": 0.75},
    "cfg_scale": {"cfg_scale": 0.5},
    "seed": {"seed": 5},
    "use_cache": {"use_cache": False},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.5},
    "min_new_tokens": {"min_new_tokens": 4},
    "threshold": {"threshold": 0.5, "algorithm": "threshold"},
    "entropy_bound": {"entropy_bound": 0.5, "algorithm": "entropy"},
    "block_length": {"block_length": 8},
    "cache": {"cache": "dual", "block_length": 8},
    "refresh": {"refresh": 2, "cache": "prefix", "block_length": 8},
    "remask": {"remask": 0.25, "algorithm": "origin"},
    "early_stop": {"early_stop": True},
    "steps_per_token": {"steps_per_token": 0.5},
}
FIELDS = dataclasses.fields(Sampling)


def test_all_of_them_are_here():
    assert set(VALUES) == {one.name for one in FIELDS}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return export_arm_and_mdm(tmp_path_factory.mktemp("models"), embedding_scale=8)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_the_harness_takes_them(models, field):
    values = VALUES[field.name]
    kind = field.metadata["kind"] or "mdm"
    plain, changed = (
        Adapter(kind, read_model_args(kind, {"ckpt_path": str(models[kind]), **given}), None, [])
        for given in ({}, values)
    )
    how = changed.arguments.sampling()
    assert {name: getattr(how, name) for name in values} == values
    assert changed._identity() != plain._identity()
    assert changed._writer.request("ROMEO:", {}, 0).identity() != plain._writer.request("ROMEO:", {}, 0).identity()
    if field.metadata["kind"]:
        other = {"arm": "mdm", "mdm": "arm"}[kind]
        with pytest.raises(
            ValueError, match=f"{field.name if field.name not in ('algorithm', 'cfg_scale') else ''}.* is"
        ):
            read_model_args(other, {"ckpt_path": "x", **values})


def test_a_wrong_setting_of_the_harness_is_one_line(models):
    arguments = {"ckpt_path": str(models["mdm"]), "cache": "dual"}
    with pytest.raises(ValueError, match="^sampling: cache dual needs a block_length$"):
        Adapter("mdm", read_model_args("mdm", arguments), None, [])
    with pytest.raises(ValueError, match="top_p=half: expected int or float"):
        read_model_args("mdm", {**arguments, "top_p": "half"})


OWN_GUIDANCE = {"cfg_scale"}
SCRIPTS = {
    "gsm8k": (evaluate_gsm8k.Flags, OWN_GUIDANCE),
    "reversal": (evaluate_reverse.Flags, OWN_GUIDANCE),
    "mt_bench": (MtBenchAnswerFlags, set()),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_take_them_as_flags(script, monkeypatch, capsys):
    flags, left_out = SCRIPTS[script]
    monkeypatch.setattr(sys, "argv", ["script.py"])
    for name, values in VALUES.items():
        if name in left_out:
            continue
        words = [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        given = parse(flags, words, "")
        assert {key: sampling_values(given)[key] for key in values} == values
        # What stands beside the answers.
        changed = {key: value for key, value in values.items() if value != getattr(flags, key)}
        assert changed and changed_settings(given) == changed
        Sampling(**sampling_values(given))
    assert changed_settings(flags()) == {}
    with pytest.raises(SystemExit):
        parse(flags, ["--help"], "")
    shown = " ".join(capsys.readouterr().out.split())
    for field in FIELDS:
        assert field.name in left_out or field.metadata["help"] in shown


def test_the_harness_says_what_it_takes():
    from lit_gpt.evaluation.settings import usage

    known = {"algorithm": "alg", "cfg_scale": "cfg"}
    assert all(f"{known.get(field.name, field.name)}=" in usage() for field in FIELDS)
    assert ModelArgs().sampling() == Sampling("greedy", 1, 0.0, steps_per_token=1.0)


def test_steps_per_token_are_steps(models):
    """Rows of different lengths have a step for each of their tokens, together as alone."""
    from lit_gpt.checkpoints.loaded import load_model
    from lit_gpt.sampling.sample import sample

    mdm = load_model(models["mdm"]).model
    prompts, lengths = [[1, 5, 9], [1, 7], [1]], [12, 10, 9]
    together = sample(mdm, prompts, Sampling("origin", steps_per_token=0.5), lengths)
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        steps = -(-(length - len(prompt)) // 2)
        (alone,) = sample(mdm, [prompt], Sampling("origin", steps), length, rows=[number])
        assert alone.tolist() == together[number].tolist()
