"""MT-bench's files, in FastChat's formats: questions, answers, references, and where they lie.

Decisions: a model's name is its answer file's; of an answer file the first choice is judged and a question's last line
counts, as after a killed run; what a line lacks is said with file and line.
"""

from __future__ import annotations

import reprlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lit_gpt.files import open_regular, parse_json

MODES = ("single", "pairwise-baseline", "pairwise-all")
"""Rate each answer by itself, compare each model's with a baseline's, or compare all models with each other."""

JsonLine = dict[str, Any]
"""A line of a JSON lines file."""
Turns = tuple[str, ...]
LineT = TypeVar("LineT")


@dataclass(frozen=True)
class MtBenchQuestion:
    """What a user asks, and then asks further."""

    question_id: int
    category: str
    turns: Turns


@dataclass(frozen=True)
class BenchmarkFiles:
    """Where the files of a benchmark lie."""

    name: str
    """`mt_bench`, or a folder of one's own beside it."""
    root: Path = Path("data")

    @property
    def folder(self) -> Path:
        """The benchmark's folder."""
        return self.root / self.name

    @property
    def questions(self) -> Path:
        """The questions."""
        return self.folder / "question.jsonl"

    def answers(self, model: str) -> Path:
        """A model's answers."""
        return self.folder / "model_answer" / f"{model}.jsonl"

    def references(self, judge: str) -> Path:
        """The answers that a judge holds for right."""
        return self.folder / "reference_answer" / f"{_file_name(judge)}.jsonl"

    def judgments(self, judge: str, mode: str) -> Path:
        """What a judge said; both pairwise modes share a file."""
        kind = "single" if mode == "single" else "pair"
        return self.folder / "model_judgment" / f"{_file_name(judge)}_{kind}.jsonl"

    def models(self, wanted: Sequence[str] | None = None) -> list[str]:
        """Names of the models with answers, or those that the user wants.

        Raises:
            FileNotFoundError: no model has answers, or a wanted one has none.
        """
        folder = self.folder / "model_answer"
        there = sorted(path.stem for path in folder.glob("*.jsonl"))
        if not there:
            raise FileNotFoundError(f"no answers in {folder}: make them with eval/gen_model_answer.py")
        if unknown := [name for name in wanted or () if name not in there]:
            raise FileNotFoundError(f"no answers of {', '.join(unknown)} in {folder}: it has {', '.join(there)}")
        return list(dict.fromkeys(wanted)) if wanted else there


def _file_name(judge: str) -> str:
    """A judge's name within a file's: `meta/llama` is one name, not a folder."""
    return judge.replace("/", "_")


def read_json_lines(
    path: Path, what: str, build: Callable[[JsonLine], LineT], may_be_torn: bool = False
) -> list[LineT]:
    """Read a file of JSON lines.

    Args:
        path: the file.
        what: what a line is, for errors.
        build: makes a value of a line; what it raises is reported with file and line.
        may_be_torn: pass over a last line that a kill left half-written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no such thing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (expected one {what} in each line)")
    values = []
    with open_regular(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values.append(build(parse_json(line)))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                if may_be_torn and not line.endswith(b"\n"):
                    break
                reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                raise ValueError(f"{path}:{number} is no {what} ({reason}): mend or remove that line") from error
    return values


def read_mt_bench_questions(path: Path, begin: int | None = None, end: int | None = None) -> list[MtBenchQuestion]:
    """Read questions.

    Args:
        path: the file.
        begin: number of the first one, counted from 0.
        end: number behind the last one.

    Raises:
        FileNotFoundError, ValueError: as `read_json_lines`; a number comes twice, or the range is not within the file.
    """
    questions = read_json_lines(path, "question", _question)
    ids = [question.question_id for question in questions]
    if twice := {number for number in ids if ids.count(number) > 1}:
        raise ValueError(f"{path} has the question_id {min(twice)} twice: give each question its own")
    first, last = begin or 0, len(questions) if end is None else end
    if not 0 <= first < last <= len(questions):
        raise ValueError(
            f"--question-begin {first} --question-end {last}: {path} has {len(questions)} questions, expected "
            f"0 <= begin < end <= {len(questions)}"
        )
    return questions[first:last]


def _question(line: JsonLine) -> MtBenchQuestion:
    """A line of a question file."""
    return MtBenchQuestion(_number(line["question_id"]), str(line["category"]), _turns(line["turns"]))


def read_answers(path: Path) -> dict[int, Turns]:
    """Read a model's or a judge's answers: the turns of each question's first choice, by question_id.

    Raises:
        FileNotFoundError, ValueError: as `read_json_lines`.
    """
    return dict(
        read_json_lines(
            path, "answer", lambda line: (_number(line["question_id"]), _turns(line["choices"][0]["turns"]))
        )
    )


def _number(value: Any) -> int:
    """A question's number."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"question_id {reprlib.repr(value)}, expected a whole number")
    return value


def _turns(value: Any) -> Turns:
    """A list of texts, not empty."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, str) for turn in value):
        raise ValueError(f"turns {reprlib.repr(value)}, expected a list of texts")
    "".join(value).encode()  # half of a character, which nobody could be asked, is an error here
    return tuple(value)


def answer_line(question: MtBenchQuestion, model_id: str, texts: Sequence[str]) -> JsonLine:
    """A line of an answer file: only first turns were answered, the others stay empty.

    Args:
        question: what was asked.
        model_id: of the model.
        texts: the answers to the first turn, one for each choice.
    """
    rest = [""] * (len(question.turns) - 1)
    return {
        "question_id": question.question_id,
        "answer_id": uuid.uuid4().hex,
        "model_id": model_id,
        "choices": [{"index": index, "turns": [text, *rest]} for index, text in enumerate(texts)],
        "tstamp": time.time(),
    }


def first_few(values: Sequence[object], count: int = 5) -> str:
    """The first few values, for a message."""
    return ", ".join(map(str, values[:count])) + (", ..." if len(values) > count else "")
