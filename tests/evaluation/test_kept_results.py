"""Results that a file or a cache holds are believed only where they can be results."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_gpt.evaluation.generated_answers import AnswerFile
from lit_gpt.evaluation.lm_adapter import Adapter
from lit_gpt.evaluation.result_cache import EvalCache, is_estimate
from lit_gpt.evaluation.settings import read_model_args
from lit_gpt.evaluation.standard_errors import StandardErrors
from lit_gpt.evaluation.versions import commit
from tests.support.small_models import export_arm_and_mdm

QUESTIONS = [{"index": number, "question": f"{number} + 1?", "target": str(number + 1)} for number in range(3)]


def collected(path: Path, verdict: tuple[str, ...] = ("correct",)) -> list[dict[str, Any]]:
    file = AnswerFile(path, {"steps": 4}, ("index",), "continue", 2, verdict)
    return file.collect(QUESTIONS, lambda batch: [{**one, "correct": True, "bleu": 0.5} for one in batch])


def test_whole_answers_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    lines = [
        {**QUESTIONS[1], "correct": False, "bleu": 0.25},
        {"index": 7, "question": "old", "correct": True, "bleu": 0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = collected(path, ("correct", "bleu"))
    assert [one["correct"] for one in found] == [True, False, True]
    assert len(path.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": 1.5}, "correct is 1.5, expected true or false"),
        ({"correct": 1}, "correct is 1, expected true or false"),
        ({"correct": [True]}, "correct is .True., expected true or false"),
        ({"correct": None}, "correct is None"),
        ({"correct": float("nan")}, "NaN, which is not finite"),
        ({"bleu": 1.5}, "bleu is 1.5, expected a share from 0 to 1"),
        ({"bleu": -0.1}, "bleu is -0.1"),
        ({"bleu": "0.5"}, "bleu is 0.5"),
        ({"bleu": float("inf")}, "not finite"),
        ({"question": "another?"}, "its question is not that of the question"),
        ({"target": "9"}, "its target is not that of the question"),
        ({"index": True}, "expected numbers or texts"),
        ({"index": [1]}, "index .*expected numbers or texts"),
        ({"index": 1.0}, "expected numbers or texts"),
    ],
    ids=str,
)
def test_what_is_no_answer_is_refused_with_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "answers.jsonl"
    whole = {**QUESTIONS[0], "correct": True, "bleu": 0.5}
    path.write_text("".join(json.dumps(line) + "\n" for line in (whole, {**QUESTIONS[1], **whole_fields(), **change})))
    with pytest.raises(ValueError, match=rf"answers.jsonl:2 is no result .*{message}") as raised:
        collected(path, ("correct", "bleu"))
    assert "\n" not in str(raised.value)


def whole_fields() -> dict[str, Any]:
    return {"correct": True, "bleu": 0.5}


@pytest.mark.parametrize(
    "line", ["[1]", "3", "null", '"text"', "[" * 3000 + "]" * 3000, "{"], ids=lambda line: line[:5]
)
def test_lines_that_are_no_objects(tmp_path: Path, line: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match="answers.jsonl:1 is no result") as raised:
        collected(path)
    assert "\n" not in str(raised.value)


def test_a_cache_serves_results_only(tmp_path: Path) -> None:
    """What a cache holds besides is computed again: NaN was once served as a likelihood."""
    cache = EvalCache(tmp_path, {"a": 1})
    cache.add([("good", [1.5, 0.0]), ("no error", [2.5, math.nan])])
    cache.close()
    assert cache.path is not None
    bad = {
        "nan": "[NaN, 0.0]",
        "inf": "[1e999, 0]",
        "huge": "[1, Infinity]",
        "text": '["1", 0]',
        "short": "[1]",
        "number": "3",
        "less": "[1, -1]",
    }
    with cache.path.open("a") as file:
        file.writelines(f'["{key}", {value}]\n' for key, value in bad.items())
        file.write('[["a"], 3]\n[{}, 1]\n' + "[" * 3000 + "\n")
    again = EvalCache(tmp_path, {"a": 1})
    assert again.get("good", is_estimate) == [1.5, 0.0]
    # Estimators that cannot tell their error say NaN.
    assert again.get("no error", is_estimate)[0] == 2.5 and math.isnan(again.get("no error", is_estimate)[1])
    assert [again.get(key, is_estimate) for key in bad] == [None] * len(bad)
    again.close()
    os.mkfifo(cache.path.with_suffix(".9.jsonl").with_name(cache.path.name.replace(".0.", ".9.")))
    with pytest.raises(ValueError, match="is no regular file but a pipe"):
        EvalCache(tmp_path, {"a": 1})


@pytest.mark.parametrize(("kind", "settings"), [("arm", {}), ("mdm", {"nll_type": "chain_rule"})], ids=["arm", "mdm"])
def test_a_diverged_checkpoint_ends_the_run_and_leaves_nothing(tmp_path: Path, kind: str, settings: dict) -> None:
    """States that overflow vanish in the last norm: every token was as likely as any other, like a guess."""
    path = export_arm_and_mdm(tmp_path)[kind]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    state["transformer.wte.weight"] *= 1e30
    save_file(state, path, metadata)
    arguments = read_model_args(kind, {"ckpt_path": str(path), **settings})
    adapter = Adapter(kind, arguments, tmp_path / "cache", ["evaluate"])
    texts = [("My lord,", " what news?"), ("", "none"), ("To be", "")]
    asked = [Instance("loglikelihood", {}, pair, 0, ("next_line", number + 7, 1)) for number, pair in enumerate(texts)]
    with pytest.raises(
        ValueError,
        match=r"^task next_line, document 7 \('My lord,' -> ' what news\?'\): .* give dtype float32 or another",
    ):
        adapter.loglikelihood(asked)
    adapter.close()
    (kept,) = (tmp_path / "cache").glob("*.jsonl")
    assert len(kept.read_text().splitlines()) == 1  # its settings


def test_a_result_is_kept_before_the_next_is_begun(tmp_path: Path) -> None:
    """64 were written together: an expensive evaluation that was killed after minutes had kept none."""
    cache = EvalCache(tmp_path, {"a": 1})
    assert cache.path is not None
    for number, _ in enumerate(cache.keep(((str(n), n) for n in range(3)), lambda n: [n, 0.0], 64), start=1):
        # Behind the settings and the commit.
        assert len(cache.path.read_text().splitlines()) == 2 + number
        other = EvalCache(tmp_path, {"a": 1}, rank=1)
        assert other.get(str(number - 1)) == [number - 1, 0.0]
        other.close()
    cache.close()


def test_results_keep_the_commit_that_made_them(tmp_path: Path) -> None:
    """Of a cache that was filled before and after a change, each result says by which code; old ones do not know."""
    settings = {"a": 1}
    cache = EvalCache(tmp_path, settings)
    cache.close()
    assert cache.path is not None
    with cache.path.open("a") as file:
        file.write('["old", 0]\n{"commit": "abc"}\n["one", 1]\n["two", 2]\n{"a": 1}\n["older", 3]\n')
    again = EvalCache(tmp_path, settings, rank=1)
    again.add([("new", 3)])
    assert [again.get(key) for key in ("old", "one", "older")] == [0, 1, 3]
    made_by = {"old": "unknown", "one": "abc", "older": "unknown", "new": commit() or "unknown"}
    assert again.makers() == made_by
    again.close()
    last = EvalCache(tmp_path, settings, rank=2)
    assert last.get("new") == 3 and last.makers() == {"new": made_by["new"]}
    last.close()
    nowhere = EvalCache(None, settings)
    nowhere.add([("new", 3)])
    assert nowhere.makers() == {"new": made_by["new"]} and nowhere.get("new") is None


def test_an_error_that_nothing_was_estimated_for_is_not_reported() -> None:
    """It was 0.0000 nats for an ARM, and for one draw, which cannot tell its error."""
    exact, one_draw, estimated = StandardErrors(), StandardErrors(), StandardErrors()
    exact.update({"a": 0.0, "b": 0.0})
    one_draw.update({"a": math.nan})
    estimated.update({"a": 0.5, "b": 0.0, "c": math.nan})
    assert exact.summary() == {"mean": None, "largest": None, "requests": 2} and exact.line() == "2 requests"
    assert one_draw.line() == "one draw cannot tell the estimator's standard error, 1 requests"
    assert estimated.summary() == {"mean": 0.25, "largest": 0.5, "requests": 3}
