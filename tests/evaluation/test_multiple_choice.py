"""Multiple choice with `decide`: what is a question, the same choice for fewer passes, and what is kept of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_gpt.evaluation import lm_harness
from lit_gpt.evaluation.lm_adapter import Adapter
from lit_gpt.evaluation.multiple_choice import find_questions
from lit_gpt.evaluation.settings import read_model_args
from lit_gpt.likelihood.loglikelihood import LikelihoodRequest
from tests.support.small_models import export_arm_and_mdm

ROOT = Path(__file__).resolve().parents[2]
DECIDE = {"nll_type": "exact", "decide": 0.05, "budget": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """An ARM and an MDM with random weights, their tokenizer beside them."""
    return export_arm_and_mdm(tmp_path_factory.mktemp("models"), embedding_scale=8)


@pytest.fixture(scope="module")
def asked() -> list[SimpleNamespace]:
    """The requests of some bundled questions, as the harness passes them."""
    questions = [json.loads(line) for line in (ROOT / "data" / "next_line" / "test.jsonl").read_text().splitlines()]
    return [
        instance(question["context"], "\n" + choice, document)
        for document, question in enumerate(questions[:10])
        for choice in question["choices"]
    ]


def instance(context: str, continuation: str, document: int, task: str = "t") -> SimpleNamespace:
    return SimpleNamespace(args=(context, continuation), task_name=task, doc_id=document)


def adapter(models, cache: Path | None = None, **settings) -> Adapter:
    return Adapter("mdm", read_model_args("mdm", {"ckpt_path": str(models["mdm"]), **settings}), cache, ["evaluate"])


def choices(asked, results, rule) -> list[int]:
    """The answer with the largest log-likelihood over a length, of each question of four."""
    values = [nats / rule(own.args[1][1:]) for own, (nats, _) in zip(asked, results, strict=True)]
    return [max(range(4), key=lambda n: values[start + n]) for start in range(0, len(values), 4)]


RULES = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}


def test_fewer_passes_and_the_same_choice(models, asked):
    whole = adapter(models, nll_type="exact", budget=128).loglikelihood(asked)
    model = adapter(models, **DECIDE)
    results = model.loglikelihood(asked)
    for rule in RULES.values():
        assert choices(asked, results, rule) == choices(asked, whole, rule)
    spent = model._questions.summary()
    assert spent["questions"] == 10 and spent["answers"] == 40 and spent["passes_of_the_budget"] == 40 * 64
    assert spent["decided"] > 5 and spent["passes"] < 0.8 * spent["passes_of_the_budget"]


def test_results_do_not_depend_on_batch_processes_or_company(models, asked):
    together = adapter(models, **DECIDE).loglikelihood(asked)
    one_by_one = adapter(models, batch_size=1, **DECIDE).loglikelihood(asked)
    shares = [adapter(models, **DECIDE).loglikelihood(asked[start : start + 20]) for start in (0, 20)]
    for found in (one_by_one, shares[0] + shares[1]):
        for (nats, greedy), (expected, expected_greedy) in zip(found, together, strict=True):
            assert nats == pytest.approx(expected, abs=1e-3) and greedy == expected_greedy


def test_questions_are_kept_for_the_same_chance_only(models, asked, tmp_path, monkeypatch):
    first = adapter(models, tmp_path, **DECIDE)
    results = first.loglikelihood(asked)
    first.close()
    again = adapter(models, tmp_path, **DECIDE)
    with monkeypatch.context() as without_model:
        without_model.setattr(again.loaded.model, "forward", None)
        without_model.setattr(again.loaded.model, "hidden_states", None)
        assert again.loglikelihood(asked) == results
    assert again._questions.summary() == first._questions.summary()
    # Half a question is none: with another answer it is decided anew.
    other = [*asked[:3], instance(asked[3].args[0], "\nAway!", 0)]
    assert again.loglikelihood(other)[3] not in results
    header = json.loads(next(tmp_path.glob("*.jsonl")).read_text().splitlines()[0])
    assert header["decide"] == 0.05 and header["computed_by"]["decision"] == 1
    for changed in ({"decide": 0.02}, {"decide": 0.0}):
        before = len(list(tmp_path.glob("*.jsonl")))
        adapter(models, tmp_path, **{**DECIDE, **changed}).loglikelihood(asked[:4])
        assert len(list(tmp_path.glob("*.jsonl"))) == before + 1


def test_a_damaged_result_is_computed_again(models, asked, tmp_path):
    first = adapter(models, tmp_path, **DECIDE)
    results = first.loglikelihood(asked[:8])
    first.close()
    (path,) = tmp_path.glob("*.jsonl")
    path.write_text(path.read_text().replace('"passes": [', '"passes": ["x", ').replace('"is_decided": true', "0: 0"))
    again = adapter(models, tmp_path, **DECIDE).loglikelihood(asked[:8])
    assert [nats for nats, _ in again] == pytest.approx([nats for nats, _ in results], abs=1e-3)


def request(*target: int) -> LikelihoodRequest:
    return LikelihoodRequest((1,), target)


def test_what_is_a_question():
    """Requests of one task and document with at least two answers; not those that have no decision."""
    asked = [
        instance("A", " yes", 0), instance("A", " no", 0), instance("A", " no", 0),  # the last one is a repetition
        instance("A", " yes", 0, "other"), instance("A", " last", 1),  # alone
        instance("A", " yes", 2), instance("A", " no", 2), instance("", " yes", 2), instance("", " no", 2),
        instance("A one", " end", 3), instance("A two", " end", 3),  # contexts that are compared
        instance("A", " yes", 4), instance("A", "", 4),  # an empty answer
    ]  # fmt: skip
    targets = [2, 3, 3, 2, 4, 2, 3, 2, 3, 5, 6, 2]
    found = find_questions([*(request(target) for target in targets), request()], asked)
    assert [one.numbers for one in found] == [((0,), (1, 2)), ((9,), (10,))]
    assert [one.question.rules for one in found] == [((1.0, 1.0), (3.0, 2.0)), ((1.0, 1.0),)]


@pytest.mark.parametrize(
    ("texts", "rules"),
    [
        ((" ab", " abcd"), ((1.0, 1.0), (2.0, 4.0))),
        ((" éb", "\nabcd"), ((1.0, 1.0), (2.0, 4.0), (3.0, 4.0))),
        ((" é", "\nb"), ((1.0, 1.0), (2.0, 1.0))),
        ((" ab", " \n"), ((1.0, 1.0),)),
    ],
)
def test_rules_are_those_of_the_three_accuracies(texts, rules):
    """Each once: proportional lengths decide alike; an answer without a character has no length to divide by."""
    (found,) = find_questions([request(1), request(2)], [instance("A", text, 0) for text in texts])
    assert found.question.rules == rules


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decide": 0.01}, r"decide=0.01 needs nll_type=exact, not mc"),
        ({"decide": 2, "nll_type": "exact"}, "decide is 2: it is the chance"),
        ({"decide": -0.1, "nll_type": "exact"}, "decide is -0.1"),
        ({"decide": float("nan"), "nll_type": "exact"}, "decide is nan"),
        ({"decide": 0.01, "nll_type": "exact", "budget": 20}, "needs a budget of 29 or more, not 20"),
        ({"decide": "yes"}, "decide=yes: expected int or float"),
    ],
)
def test_mistakes_are_one_line(models, settings, message):
    with pytest.raises(ValueError, match=message):
        adapter(models, **settings)


def test_an_arm_has_nothing_to_decide():
    with pytest.raises(ValueError, match="decide is unknown"):
        read_model_args("arm", {"ckpt_path": "x", "decide": 0.01})


def test_the_command_says_what_was_spent(models, tmp_path, monkeypatch, capsys):
    """A multiple-choice task beside one that is not: its single requests get the whole budget."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["evaluate_diff.py"])
    words = ["--tasks", "next_line,lambada_local", "--include_path", "tasks", "--limit", "4", "--use_cache", "off"]
    arguments = f"ckpt_path={models['mdm']},nll_type='exact',decide=0.01,budget=32"
    lm_harness.evaluate("mdlm", [*words, "--model_args", arguments, "--output_path", str(tmp_path)])
    out = capsys.readouterr().out
    assert "over 20 requests" in out
    assert "decide 0.01: " in out and " of 4 questions were decided before the budget was spent; " in out
    (path,) = tmp_path.rglob("results_*.json")
    record = json.loads(path.read_text())["config"]
    assert record["decide"] == 0.01 and record["decisions"]["answers"] == 16
