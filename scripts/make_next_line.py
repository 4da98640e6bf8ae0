"""Make the bundled multiple-choice task: which line comes next in a play?

    python scripts/make_next_line.py

Reads data/tinyshakespeare/input.txt and writes data/next_line/test.jsonl: 180 questions from its last tenth, which the
quickstart's models are not trained on. A question is three lines of one speech; its four answers are the line that follows
and three that follow nothing of the kind, each from another speech and as near in length as there is. Same text, same file.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run

ROOT = Path(__file__).resolve().parents[1]
_CONTEXT_LINES = 3
_CHOICES = 4
# Nearest in length among so many lines drawn at random.
_CANDIDATES = 40


@dataclass
class Flags:
    """Flags of the task maker."""

    text: str = str(ROOT / "data" / "tinyshakespeare" / "input.txt")
    """The plays: speeches parted by empty lines, each headed by its speaker."""
    out: str = str(ROOT / "data" / "next_line" / "test.jsonl")
    """The file to write."""
    questions: int = 180
    """How many."""
    seed: int = 1234
    """Decides which speeches, answers and order."""


def main() -> None:
    """Write the questions."""
    flags = parse(Flags, None, __doc__)
    if flags.questions < 1:
        raise ValueError(f"--questions {flags.questions}: expected at least 1")
    from lit_gpt.files import make_folder, open_regular, write_file

    with open_regular(flags.text) as file:
        text = file.read().decode()
    questions = make_questions(text[len(text) * 9 // 10 :], flags.questions, flags.seed)
    lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
    make_folder(Path(flags.out).parent)
    write_file(Path(flags.out), lambda file: file.write(lines.encode()))
    print(f"{flags.out}: {len(questions)} questions")


def make_questions(text: str, count: int, seed: int) -> list[dict[str, object]]:
    """Questions as the task file has them: context, choices, answer (a number of `choices`).

    Raises:
        ValueError: the text has too few long speeches.
    """
    import random

    # The first speech may be cut.
    speeches = [speech.strip().split("\n") for speech in text.split("\n\n")[1:]]
    long_ones = [lines for lines in speeches if len(lines) > _CONTEXT_LINES + 1 and all(lines)]
    if len(long_ones) < count:
        raise ValueError(f"--questions {count}: the text has {len(long_ones)} speeches of enough lines")
    generator = random.Random(seed)
    questions: list[dict[str, object]] = []
    for lines in generator.sample(long_ones, count):
        start = generator.randrange(len(lines) - _CONTEXT_LINES)
        speaker, answer = lines[0], lines[start + _CONTEXT_LINES]
        others = [other for other in generator.sample(long_ones, _CANDIDATES) if other is not lines]
        wrong = sorted((generator.choice(other[1:]) for other in others), key=lambda line: abs(len(line) - len(answer)))
        choices = [answer, *[line for line in dict.fromkeys(wrong) if line != answer][: _CHOICES - 1]]
        generator.shuffle(choices)
        context = "\n".join(lines[start : start + _CONTEXT_LINES])
        context = context if start == 0 else f"{speaker}\n{context}"
        questions.append({"context": context, "choices": choices, "answer": choices.index(answer)})
    return questions


if __name__ == "__main__":
    run(main)
