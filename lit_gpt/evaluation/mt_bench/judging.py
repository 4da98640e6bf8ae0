"""What a judge is asked and what it said: matches, prompts, ratings, verdicts, in FastChat's formats.

Decisions: a pair is judged in both orders, and its two models are one match whichever is named first; a second turn is
judged where the models answered second turns at all; a judgment counts as long as it is of the prompt that would be sent
now, so that changed answers are judged anew. Nothing is sent from here.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from lit_gpt.evaluation.mt_bench.benchmark_files import JsonLine, MtBenchQuestion, Turns, first_few, read_json_lines

WITH_REFERENCE = ("math", "reasoning", "coding")
"""Categories that are judged beside a reference answer (FastChat's)."""
TURNS = ("auto", "first", "both")
NO_RATING = -1
"""The score of a judgment without a rating (FastChat's)."""
CHARACTERS_PER_TOKEN = 4
"""For an estimate: usual for English text in OpenAI's tokenizers."""

# FastChat's system prompt of templates that have none of their own.
_PLAIN_SYSTEM = "You are a helpful assistant."
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
_VERDICTS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}


@dataclass(frozen=True)
class JudgePrompt:
    """One of the judge's prompts."""

    name: str
    system: str
    template: str
    """With fields such as `{question}` and `{answer_a}`."""


@dataclass(frozen=True)
class Match:
    """What is judged at once: one answer, or one pair of answers in both orders."""

    question_id: int
    models: tuple[str, ...]
    turn: int
    """1 or 2."""
    prompt: JudgePrompt
    user_prompts: tuple[str, ...]
    """One for each order of the models."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What the judgment is of."""
        return (self.question_id, *sorted(self.models), self.turn)

    def __str__(self) -> str:
        return f"question {self.question_id}, {' against '.join(self.models)}, turn {self.turn}"


@dataclass(frozen=True)
class JudgingInputs:
    """All that judging reads, and what of it is judged."""

    questions: Sequence[MtBenchQuestion]
    answers: Mapping[str, Mapping[int, Turns]]
    """By model and question_id."""
    prompts: Mapping[str, JudgePrompt]
    references: Mapping[int, Turns]
    turns: str = "auto"
    """`first` or `both` turns of a question; `auto` takes the second where all of a match's models answered any."""

    def has_second_turns(self, model: str) -> bool:
        """Whether a model answered any question's second turn."""
        return any(len(turns) > 1 and turns[1].strip() for turns in self.answers[model].values())


def model_groups(mode: str, models: Sequence[str], baseline: str) -> list[tuple[str, ...]]:
    """The models of each match.

    Raises:
        ValueError: a pairwise mode has too few models.
    """
    if mode == "single":
        return [(model,) for model in models]
    found: list[tuple[str, ...]]
    if mode == "pairwise-baseline":
        found = [(model, baseline) for model in models if model != baseline]
    else:
        found = [*combinations(models, 2)]
    if not found:
        raise ValueError(
            f"--mode {mode} needs two models, found {first_few(models)}: answer the questions with another one"
        )
    return found


def make_matches(inputs: JudgingInputs, grouped: Iterable[tuple[str, ...]]) -> list[Match]:
    """Every match of some groups of models, by group, question and turn.

    Raises:
        ValueError: the judge's prompts or references lack what a match needs.
    """
    found = []
    for models in grouped:
        second = inputs.turns == "both" or (
            inputs.turns == "auto" and all(inputs.has_second_turns(model) for model in models)
        )
        for question in inputs.questions:
            found.append(_match(inputs, question, models, 1))
            if second and len(question.turns) > 1:
                found.append(_match(inputs, question, models, 2))
    return found


def _match(inputs: JudgingInputs, question: MtBenchQuestion, models: tuple[str, ...], turn: int) -> Match:
    """One match, its prompts filled in."""
    with_reference = question.category in WITH_REFERENCE
    kind = ("single" if len(models) == 1 else "pair") + ("-math" if with_reference else "")
    name = f"{kind}-v2" if kind == "pair" else f"{kind}-v1"
    name += "-multi-turn" if turn == 2 else ""
    if name not in inputs.prompts:
        raise ValueError(f"the judge's prompts lack {name}, they are {', '.join(inputs.prompts)}: see --judge-file")
    prompt = inputs.prompts[name]
    fields = {"question": question.turns[0]} | _numbered("question", question.turns)
    if with_reference:
        if question.question_id not in inputs.references:
            raise ValueError(f"no reference answer to question {question.question_id} ({question.category})")
        fields |= _numbered("ref_answer", inputs.references[question.question_id])
    orders = [models] if len(models) == 1 else [models, models[::-1]]
    texts = []
    for order in orders:
        own = dict(fields)
        for model, name in zip(order, ("answer",) if len(models) == 1 else ("answer_a", "answer_b"), strict=True):
            turns = inputs.answers[model][question.question_id]
            own |= {name: turns[0]} | _numbered(name, (*turns, "")[:2])
        try:
            texts.append(prompt.template.format(**own))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"the judge's prompt {prompt.name} cannot be filled for question {question.question_id} ({error!r}); it "
                f"may use {', '.join(own)}"
            ) from error
    return Match(question.question_id, models, turn, prompt, tuple(texts))


def claude_match(match: Match) -> Match:
    """The match as FastChat asks Anthropic's models: of a pair, the instruction stands within the user's message.

    Its plain system prompt is then not sent at all; single answers are asked as of any judge.
    """
    if len(match.models) == 1:
        return match
    system = match.prompt.system
    before = "" if system == _PLAIN_SYSTEM else f"[Instruction]\n{system}\n\n"
    texts = tuple(f"{before}{text}" for text in match.user_prompts)
    return replace(match, prompt=replace(match.prompt, system=""), user_prompts=texts)


def _numbered(name: str, turns: Turns) -> dict[str, str]:
    """`question_1`, `question_2`, ... of a template."""
    return {f"{name}_{number}": text for number, text in enumerate(turns, start=1)}


def read_judge_prompts(path: Path) -> dict[str, JudgePrompt]:
    """Read the judge's prompts, by name.

    Raises:
        FileNotFoundError, ValueError: as `read_json_lines`.
    """
    names = ("name", "system_prompt", "prompt_template")
    lines = read_json_lines(path, "judge prompt", lambda line: JudgePrompt(*(_text(line[name]) for name in names)))
    return {prompt.name: prompt for prompt in lines}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r}, expected text")
    return value


def system_prompts_hash(prompts: Mapping[str, JudgePrompt]) -> str:
    """A short hash of what a judgment's line does not show: the system prompts."""
    text = "\n".join(f"{name} {prompts[name].system}" for name in sorted(prompts))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- what the judge said ------------------------------------------------------------------------------------------


def read_rating(judgment: str) -> float:
    """The first `[[number]]`, else the first `[number]`, else `NO_RATING`."""
    for pattern in _RATINGS:
        if found := pattern.search(judgment):
            return float(found[1]) if "." in found[1] else int(found[1])
    return NO_RATING


def read_verdict(judgment: str) -> str:
    """`A`, `B`, `tie`, or `error` where none is said; of several, A goes before B before a tie."""
    return next((said for mark, said in _VERDICTS.items() if mark in judgment), "error")


def judgment_line(match: Match, judge: str, replies: Sequence[str]) -> JsonLine:
    """A line of a judgment file.

    Args:
        match: what was judged.
        judge: name of the judge.
        replies: what it said, one for each of the match's prompts.
    """
    by = [judge, match.prompt.name]
    if len(match.models) == 1:
        return {
            "question_id": match.question_id,
            "model": match.models[0],
            "judge": by,
            "user_prompt": match.user_prompts[0],
            "judgment": replies[0],
            "score": read_rating(replies[0]),
            "turn": match.turn,
            "tstamp": time.time(),
        }
    first, second = ({"A": a, "B": b} for a, b in (("model_1", "model_2"), ("model_2", "model_1")))
    said = [read_verdict(reply) for reply in replies]
    return {
        "question_id": match.question_id,
        "model_1": match.models[0],
        "model_2": match.models[1],
        "g1_winner": first.get(said[0], said[0]),
        "g2_winner": second.get(said[1], said[1]),
        "judge": by,
        "g1_user_prompt": match.user_prompts[0],
        "g1_judgment": replies[0],
        "g2_user_prompt": match.user_prompts[1],
        "g2_judgment": replies[1],
        "turn": match.turn,
        "tstamp": time.time(),
    }


def line_key(line: JsonLine) -> tuple[Any, ...]:
    """`Match.key` of a line of either kind of judgment file."""
    models = [line["model"]] if "model" in line else sorted((line["model_1"], line["model_2"]))
    return (line["question_id"], *models, line["turn"])


def is_unrated(line: JsonLine) -> bool:
    """Whether a judge gave no rating, or no verdict in one of the orders."""
    return line["score"] == NO_RATING if "score" in line else "error" in (line["g1_winner"], line["g2_winner"])


def unjudged_matches(matches: Sequence[Match], lines: Iterable[JsonLine]) -> list[Match]:
    """The matches that no line judges with the prompts that would be sent now."""
    sent = {line_key(line): {line.get(name) for name in _prompt_names(line)} for line in lines}
    return [match for match in matches if sent.get(match.key) != set(match.user_prompts)]


def _prompt_names(line: JsonLine) -> tuple[str, ...]:
    return ("user_prompt",) if "model" in line else ("g1_user_prompt", "g2_user_prompt")


def estimate_cost(matches: Sequence[Match], max_tokens: int) -> tuple[int, int, int]:
    """Requests, input tokens (an estimate by characters), and output tokens at most."""
    requests = sum(len(match.user_prompts) for match in matches)
    characters = sum(len(match.prompt.system) + len(text) for match in matches for text in match.user_prompts)
    return requests, characters // CHARACTERS_PER_TOKEN, requests * max_tokens


def read_judgments(path: Path, mode: str) -> list[JsonLine]:
    """Read a judgment file, one line for each match (the last one).

    Raises:
        FileNotFoundError, ValueError: as `read_json_lines`.
    """
    by_key: dict[tuple[Any, ...], JsonLine] = {}
    for line in read_json_lines(path, f"judgment ({mode})", lambda line: _checked(line, mode), may_be_torn=True):
        by_key[line_key(line)] = line
    return list(by_key.values())


def _checked(line: JsonLine, mode: str) -> JsonLine:
    """A line of the mode's kind, or an error that says what it lacks."""
    number, *models, turn = line_key(line)
    if type(number) is not int or type(turn) is not int or not all(isinstance(model, str) for model in models):
        raise ValueError(f"question {number!r}, models {models!r}, turn {turn!r}: expected a number, names, a number")
    if not all(isinstance(line.get(name), str | None) for name in _prompt_names(line)):
        raise ValueError(f"{', '.join(_prompt_names(line))}: expected texts")
    if mode == "single":
        if type(line["score"]) not in (int, float):
            raise ValueError(f"score {line['score']!r}, expected a number")
        line["model"]
    elif not {line["g1_winner"], line["g2_winner"]} <= {"model_1", "model_2", "tie", "error"}:
        raise ValueError(
            f"winners {line['g1_winner']!r} and {line['g2_winner']!r}: expected model_1, model_2, tie, error"
        )
    return line
