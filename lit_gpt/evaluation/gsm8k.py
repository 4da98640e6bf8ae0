"""GSM8K: questions asked in two rounds, and judged by the rules of `gsm8k_grading`.

Decisions: an answer's line keeps the verdicts of both rules; the last lines are counted from the answers themselves, so
that a file which an older version wrote is judged by the rules of this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_gpt.checkpoints.loaded import LoadedModel
from lit_gpt.evaluation.generated_answers import (
    AnswerTask,
    JsonQuestion,
    accuracy,
    accuracy_line,
    checkpoint_name,
    read_json_questions,
)
from lit_gpt.evaluation.gsm8k_grading import GRADERS, extract_answer
from lit_gpt.files import file_sha256
from lit_gpt.sampling.settings import Sampling


def gsm8k_task(flags: Any) -> AnswerTask:
    """The evaluation that flags of evaluate_gsm8k.py describe.

    Raises:
        FileNotFoundError, ValueError: there are no questions, or they cannot be read; the grader is unknown.
    """
    if flags.grader not in GRADERS:
        raise ValueError(f"--grader {flags.grader}: choose from {', '.join(GRADERS)}")
    path = Path(flags.data)
    if not path.is_file():
        raise FileNotFoundError(
            f"no questions {path}: GSM8K's are data/gsm8k/test.jsonl in this project (start from its folder, or restore "
            "the file with git); others are named by --data"
        )
    return AnswerTask(
        questions=read_json_questions(path, ("question", "target"))[: flags.limit],
        output=f"out/gsm8k/{checkpoint_name(flags.ckpt_path)}.jsonl",
        settings={"data": file_sha256(path), "temperature": flags.temperature},
        guidance={"cfg1": 0.1, "cfg2": 0.1},
        prompt=word_problem_prompt,
        answer=answer_word_problems,
    )


def word_problem_prompt(question: JsonQuestion) -> str:
    """A question as in fine-tuning."""
    return f"Question: {question['question']}"


def answer_word_problems(
    model: LoadedModel, samplings: Sequence[Sampling], length: int, questions: Sequence[JsonQuestion]
) -> list[JsonQuestion]:
    """Ask questions in two rounds, and judge what was written.

    A question that leaves no room has the empty text. A first text that, tokenized again, leaves none stands as it is.
    """
    decode = model.tokenizer.decode
    # Each round has a random stream of its own.
    first_rows = [2 * question["index"] for question in questions]
    first = model.complete(
        [model.prompt_ids(word_problem_prompt(one)) for one in questions], first_rows, samplings[0], length
    )
    texts = [decode(ids or []) for ids in first]
    asked = [
        number
        for number, ids in enumerate(first)
        if ids is not None and (model.kind == "mdm" or extract_answer(texts[number]) is None)
    ]
    prompts = [model.prompt_ids(texts[number]) for number in asked]
    second = model.complete(prompts, [first_rows[number] + 1 for number in asked], samplings[1], length)
    for number, ids in zip(asked, second, strict=True):
        texts[number] = texts[number] if ids is None else decode(ids)
    found = [extract_answer(text) for text in texts]
    return [
        {
            **one,
            "text": text,
            "answer": given,
            "correct": _is_right("default", given, one["target"]),
            "correct_published": _is_right("published", given, one["target"]),
        }
        for one, text, given in zip(questions, texts, found, strict=True)
    ]


def graded_lines(grader: str, answers: Sequence[JsonQuestion]) -> list[str]:
    """How many answers are right by each rule, with confidence intervals, then the last line, which scripts read.

    Args:
        grader: whose share the last line has; one of `GRADERS`.
        answers: with `answer` and `target`.
    """
    judged = {
        name: [{"correct": _is_right(name, one.get("answer"), one["target"])} for one in answers] for name in GRADERS
    }
    lines = [f"grader {name}: {accuracy_line(verdicts)}" for name, verdicts in judged.items()]
    return [*lines, f"Acc: {accuracy(judged[grader])}"]


def _is_right(grader: str, answer: str | None, target: str) -> bool:
    return isinstance(answer, str) and GRADERS[grader](answer, target)
