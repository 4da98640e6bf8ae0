"""What a judge is asked and what it said: prompts, ratings and verdicts, which matches there are and which are done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lit_gpt.evaluation.mt_bench.benchmark_files import MtBenchQuestion
from lit_gpt.evaluation.mt_bench.judging import (
    JudgingInputs,
    estimate_cost,
    is_unrated,
    judgment_line,
    line_key,
    make_matches,
    model_groups,
    read_judge_prompts,
    read_judgments,
    read_rating,
    read_verdict,
    system_prompts_hash,
    unjudged_matches,
)

PROMPTS = read_judge_prompts(Path(__file__).resolve().parents[3] / "data" / "judge_prompts.jsonl")
QUESTIONS = [MtBenchQuestion(1, "writing", ("Q1?", "Q1 further?")), MtBenchQuestion(2, "math", ("Q2?", "Q2 further?"))]
ANSWERS = {
    "arm": {1: ("arm {1}", ""), 2: ("arm 2", "")},
    "gpt": {1: ("gpt 1", "gpt 1 further"), 2: ("gpt 2", "")},
    "two": {1: ("two 1", "two 1 further"), 2: ("two 2", "two 2 further")},
}
INPUTS = JudgingInputs(QUESTIONS, ANSWERS, PROMPTS, {2: ("R2", "R2 further")})


# What FastChat's parser makes of these, worked out by hand.
@pytest.mark.parametrize(
    "text, score",
    [
        ("Rating: [[5]]", 5),
        ("Rating: [[7.5]]", 7.5),
        ("[[10]] and not [[3]]", 10),
        ("[3] but Rating: [[8]]", 8),
        ("Rating: [6]", 6),
        ("Rating: [6.25]", 6.25),
        ("[[7.]]", 7.0),
        ("[[08]]", 8),
        ("[[rating]] 5", -1),
        ("[[5/10]]", -1),
        ("[[ 5 ]]", -1),
        ("[[-2]]", -1),
        ("Rating: 5", -1),
        ("", -1),
    ],
)
def test_ratings(text, score):
    assert read_rating(text) == score and type(read_rating(text)) is type(score)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[[A]]", "A"),
        ("so [[B]].", "B"),
        ("[[C]]", "tie"),
        ("[[B]] rather than [[A]]", "A"),
        ("[[C]] or [[B]]", "B"),
        ("[A]", "error"),
        ("[[a]]", "error"),
        ("", "error"),
    ],
)
def test_verdicts(text, said):
    assert read_verdict(text) == said


def test_the_models_of_matches():
    models = ["a", "b", "base"]
    assert model_groups("single", models, "base") == [("a",), ("b",), ("base",)]
    assert model_groups("pairwise-baseline", models, "base") == [("a", "base"), ("b", "base")]
    assert model_groups("pairwise-all", models, "base") == [("a", "b"), ("a", "base"), ("b", "base")]
    for mode in ("pairwise-baseline", "pairwise-all"):
        with pytest.raises(ValueError, match=f"--mode {mode} needs two models, found base"):
            model_groups(mode, ["base"], "base")


def prompts_of(models: tuple[str, ...], turns: str = "auto") -> list[tuple[int, int, str]]:
    return [
        (match.question_id, match.turn, match.prompt.name)
        for match in make_matches(replace(INPUTS, turns=turns), [models])
    ]


def test_which_prompt_for_which_match():
    first = [(1, 1, "single-v1"), (2, 1, "single-math-v1")]
    both = [
        (1, 1, "single-v1"),
        (1, 2, "single-v1-multi-turn"),
        (2, 1, "single-math-v1"),
        (2, 2, "single-math-v1-multi-turn"),
    ]
    assert prompts_of(("arm",)) == first, "no second turn is answered"
    assert prompts_of(("gpt",)) == both, "one is: an empty other one counts as it is"
    assert prompts_of(("gpt",), "first") == first and prompts_of(("arm",), "both") == both
    pairs = [(1, 1, "pair-v2"), (2, 1, "pair-math-v1")]
    assert prompts_of(("arm", "gpt")) == pairs
    assert [name for _, turn, name in prompts_of(("gpt", "two")) if turn == 2] == [
        "pair-v2-multi-turn",
        "pair-math-v1-multi-turn",
    ]


def test_a_question_of_one_turn_has_no_second():
    alone = replace(INPUTS, questions=[MtBenchQuestion(1, "writing", ("Q1?",))], turns="both")
    assert [match.turn for match in make_matches(alone, [("two",)])] == [1]


def test_what_is_in_the_prompts():
    single, math = make_matches(INPUTS, [("arm",)])
    (text,) = single.user_prompts
    assert text.endswith(
        "[Question]\nQ1?\n\n[The Start of Assistant's Answer]\narm {1}\n[The End of Assistant's Answer]"
    )
    assert single.prompt.system == "You are a helpful assistant."
    assert "[The Start of Reference Answer]\nR2\n[The End of Reference Answer]" in math.user_prompts[0]
    second = make_matches(INPUTS, [("two",)])[3].user_prompts[0]
    order = ["Q2?", "R2", "Q2 further?", "R2 further", "Q2?", "two 2", "Q2 further?", "two 2 further"]
    place = 0
    for words in order:
        place = second.index(f"\n{words}\n", place) + 1


def test_a_pair_is_asked_in_both_orders():
    pair = make_matches(INPUTS, [("arm", "gpt")])[0]
    start = "[User Question]\nQ1?\n\n[The Start of Assistant A's Answer]\n{}\n[The End of Assistant A's Answer]\n\n"
    end = "[The Start of Assistant B's Answer]\n{}\n[The End of Assistant B's Answer]"
    assert pair.user_prompts == (
        start.format("arm {1}") + end.format("gpt 1"),
        start.format("gpt 1") + end.format("arm {1}"),
    )
    long = make_matches(INPUTS, [("gpt", "two")])[1].user_prompts
    assert long[0].index("gpt 1 further") < long[0].index("two 1 further")
    assert long[1].index("two 1 further") < long[1].index("gpt 1 further")


def test_lines_have_fastchats_form():
    single = make_matches(INPUTS, [("arm",)])[1]
    line = judgment_line(single, "gpt-4", ["Bad. [[2]]"])
    assert list(line) == ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
    assert line["judge"] == ["gpt-4", "single-math-v1"] and (line["score"], line["turn"], line["question_id"]) == (
        2,
        1,
        2,
    )
    assert line["user_prompt"] == single.user_prompts[0] and line["judgment"] == "Bad. [[2]]"
    pair = make_matches(INPUTS, [("arm", "gpt")])[0]
    line = judgment_line(pair, "gpt-4", ["[[A]]", "well, [[B]]"])
    assert " ".join(line) == (
        "question_id model_1 model_2 g1_winner g2_winner judge g1_user_prompt g1_judgment g2_user_prompt g2_judgment turn "
        "tstamp"
    )
    assert (line["model_1"], line["model_2"]) == ("arm", "gpt")
    assert (line["g1_user_prompt"], line["g2_user_prompt"]) == pair.user_prompts
    assert (line["g1_judgment"], line["g2_judgment"]) == ("[[A]]", "well, [[B]]")


@pytest.mark.parametrize(
    "replies, winners",
    [
        (("[[A]]", "[[B]]"), ("model_1", "model_1")),
        (("[[B]]", "[[A]]"), ("model_2", "model_2")),
        (("[[A]]", "[[A]]"), ("model_1", "model_2")),
        (("[[C]]", "[[A]]"), ("tie", "model_2")),
        (("hm", "[[C]]"), ("error", "tie")),
    ],
)
def test_winners(replies, winners):
    line = judgment_line(make_matches(INPUTS, [("arm", "gpt")])[0], "j", replies)
    assert (line["g1_winner"], line["g2_winner"]) == winners
    assert is_unrated(line) == ("error" in winners)


def test_what_is_judged_is_not_judged_again():
    matches = make_matches(INPUTS, [("arm",), ("two",)])
    lines = [judgment_line(match, "j", ["[[5]]"]) for match in matches]
    assert unjudged_matches(matches, []) == matches and unjudged_matches(matches, lines) == []
    assert unjudged_matches(matches, lines[:2]) == matches[2:]
    assert len({line_key(line) for line in lines}) == 6 and [match.key for match in matches] == list(
        map(line_key, lines)
    )
    changed = {**ANSWERS, "two": {**ANSWERS["two"], 2: ("new", "two 2 further")}}
    now = make_matches(replace(INPUTS, answers=changed), [("arm",), ("two",)])
    again = unjudged_matches(now, lines)
    assert [(match.question_id, match.models, match.turn) for match in again] == [(2, ("two",), 1), (2, ("two",), 2)]
    assert unjudged_matches(now, [*lines, *(judgment_line(match, "j", ["[[6]]"]) for match in again)]) == []


def test_a_pair_is_one_match_whoever_is_named_first():
    one, other = (make_matches(INPUTS, [models]) for models in (("arm", "gpt"), ("gpt", "arm")))
    lines = [judgment_line(match, "j", ["[[A]]", "[[A]]"]) for match in one]
    assert unjudged_matches(other, lines) == [] and [match.key for match in one] == [match.key for match in other]
    swapped = [{**line, "g2_user_prompt": line["g1_user_prompt"]} for line in lines]
    assert unjudged_matches(other, swapped) == other, "both orders must have been asked"


def test_the_cost_by_hand():
    (match,) = make_matches(replace(INPUTS, questions=QUESTIONS[:1]), [("arm", "gpt")])
    characters = 2 * len(match.prompt.system) + len(match.user_prompts[0]) + len(match.user_prompts[1])
    assert estimate_cost([match], 100) == (2, characters // 4, 200) and estimate_cost([], 100) == (0, 0, 0)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="the judge's prompts lack single-v1, they are pair-v2: see --judge-file"):
        make_matches(replace(INPUTS, prompts={"pair-v2": PROMPTS["pair-v2"]}), [("arm",)])
    with pytest.raises(ValueError, match=r"no reference answer to question 2 \(math\)"):
        make_matches(replace(INPUTS, references={}), [("arm",)])
    odd = {**PROMPTS, "single-v1": replace(PROMPTS["single-v1"], template="{question} {reply}")}
    with pytest.raises(
        ValueError, match="prompt single-v1 cannot be filled for question 1 .*reply.*it may use question, "
    ):
        make_matches(replace(INPUTS, prompts=odd), [("arm",)])
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"name": "a", "system_prompt": "b"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:1 is no judge prompt \('prompt_template' is missing\)"):
        read_judge_prompts(path)
    path.write_text('{"name": "a", "system_prompt": "b", "prompt_template": 3}\n')
    with pytest.raises(ValueError, match="prompts.jsonl:1 is no judge prompt .3, expected text"):
        read_judge_prompts(path)


def test_system_prompts_have_a_hash():
    other = {**PROMPTS, "pair-v2": replace(PROMPTS["pair-v2"], system="Be kind.")}
    assert system_prompts_hash(PROMPTS) == system_prompts_hash(dict(reversed(PROMPTS.items())))
    assert system_prompts_hash(PROMPTS) != system_prompts_hash(other)


def test_judgment_files_are_read_and_checked(tmp_path):
    path = tmp_path / "j_single.jsonl"
    lines = [{"question_id": 1, "model": "m", "turn": 1, "score": score} for score in (3, 4.5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"question_id": 2, "mo')
    assert read_judgments(path, "single") == lines[1:], "the last of a match; a torn end is passed over"
    path.write_text(json.dumps({**lines[0], "score": "3"}) + "\n")
    with pytest.raises(ValueError, match=r"j_single.jsonl:1 is no judgment \(single\) \(score '3', expected a number"):
        read_judgments(path, "single")
    path.write_text(json.dumps(judgment_line(make_matches(INPUTS, [("arm", "gpt")])[0], "j", ["", ""])) + "\n")
    assert len(read_judgments(path, "pairwise-all")) == 1
    with pytest.raises(ValueError, match="'score' is missing"):
        read_judgments(path, "single")
    path.write_text(path.read_text().replace('"g1_winner": "error"', '"g1_winner": "A"'))
    with pytest.raises(ValueError, match="winners 'A' and 'error': expected model_1"):
        read_judgments(path, "pairwise-all")
