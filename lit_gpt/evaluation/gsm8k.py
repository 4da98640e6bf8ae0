"""GSM8K: questions in two rounds, answers found in what a model wrote and compared with the right one.

Decisions: an answer is what stands behind `#### ` to the end of its line, the last one of the text; two answers are equal
if their normalised texts are, or if both are arithmetic and come to the same number (math-verify; decimals to six
places). Only arithmetic of a limited size is worked out: a model may write 9^9^9^9, which no computer finishes, and a
time limit would let the machine's speed decide what is right. Whatever else stands there is compared as text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_gpt.checkpoints.loaded import LoadedModel
from lit_gpt.evaluation.generated_answers import AnswerTask, JsonQuestion, checkpoint_name, read_json_questions
from lit_gpt.files import file_sha256
from lit_gpt.sampling.settings import Sampling

# Numbers, + - * / ^ ( ), and the LaTeX that stands for them.
_ARITHMETIC = re.compile(r"(?:[0-9.+\-*/^(){} ]|\\[dt]?frac|\\sqrt|\\times|\\cdot|\\div)+")
_TWO_NUMBERS = re.compile(r"[0-9.] [0-9.]")
# One power of at most two digits, or one root: what is left is worked out in milliseconds.
_POWER = re.compile(r"\^|\\sqrt")
_SMALL_POWER = re.compile(r"\^ ?(?:-?[0-9]{1,2}(?![0-9.])|\{ ?-?[0-9]{1,2} ?\})|\\sqrt")
_LONGEST = 60
_DEEPEST = 4


def extract_answer(text: str) -> str | None:
    """The last match of `#### (.*)$`, or None where there is none.

    `$` is the end of any line: an answer after which the model went on writing counts, too. Where the answer ends the
    text, this is what a search without MULTILINE finds.
    """
    found = re.findall(r"#### (.*)$", text, re.MULTILINE)
    return found[-1] if found else None


def normalised(answer: str) -> str:
    """An answer without what does not change its value: `$`, `%`, commas in 1,000, a period at the end, white space."""
    text = re.sub(r"\\?[$%]", "", answer.replace("**", "^"))
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    return " ".join(text.split()).removesuffix(".").rstrip()


def same_answer(answer: str, target: str) -> bool:
    """Whether two answers are the same text once normalised, or the same number."""
    left, right = normalised(answer), normalised(target)
    if left == right:
        return True
    if not (is_small_arithmetic(left) and is_small_arithmetic(right)):
        return False
    from math_verify import verify

    given, wanted = _parsed(left), _parsed(right)
    return bool(given and wanted and verify(wanted, given, timeout_seconds=None))


def is_small_arithmetic(text: str) -> bool:
    """Whether a normalised answer looks like arithmetic that is worked out at once, whatever it is."""
    depth = deepest = 0
    for sign in text:
        depth += (sign in "({") - (sign in ")}")
        deepest = max(deepest, depth)
    return (
        len(text) <= _LONGEST
        and deepest <= _DEEPEST
        and _ARITHMETIC.fullmatch(text) is not None
        and _TWO_NUMBERS.search(text) is None
        and len(_POWER.findall(text)) == len(_SMALL_POWER.findall(text)) <= 1
    )


def _parsed(text: str) -> list[Any]:
    """The expression that a whole text is, in a list; empty if it is none."""
    # It warns that nothing limits its time: `is_small_arithmetic` does.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    from math_verify import LatexExtractionConfig, parse

    # Between dollars all of it is read; without them the last number of any text would do.
    return list(parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None))


# --- asking -----------------------------------------------------------------------------------------------------------


def gsm8k_task(flags: Any) -> AnswerTask:
    """The evaluation that flags of evaluate_gsm8k.py describe.

    Raises:
        FileNotFoundError, ValueError: there are no questions, or they cannot be read.
    """
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
        temperature=flags.temperature,
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
        {**one, "text": text, "answer": given, "correct": given is not None and same_answer(given, one["target"])}
        for one, text, given in zip(questions, texts, found, strict=True)
    ]
