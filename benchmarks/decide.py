"""What `decide` saves in multiple choice, and how often it is wrong.

    python scripts/quickstart.py
    python benchmarks/decide.py > docs/results/decide.md                 about 5 minutes on 2 idle cores

Prints Markdown. Questions: the bundled next_line task (lines of about 17 tokens), and the last word of LAMBADA's bundled
passages among four (mostly 1 to 4 tokens). Passes are rows that the model reads for an answer. The second part is the worst
case: questions whose answers are equally likely, where every decision is wrong. They are made of real ones: all masks of
each answer (cut to 8 tokens) are read, and each answer's estimate is divided by its bound.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import print_table
from lit_gpt.cli import parse, run

if TYPE_CHECKING:
    from lit_gpt.checkpoints.loaded import LoadedModel
    from lit_gpt.likelihood.decision import Question, QuestionResult

ROOT = Path(__file__).resolve().parents[1]
CHANCES = (0.1, 0.01, 0.001)
BUDGET, REFERENCE_BUDGET = 128, 1024
MAX_TOKENS = 8192


@dataclass
class Flags:
    """What is measured."""

    ckpt: str = "quickstart/mdm/model/mdm-1.05M-1.55e13-bs-16.safetensors"
    """A trained MDM, with its tokenizer on record."""
    questions: int = 80
    """Questions of each task."""
    ties: int = 30
    """Questions of the worst case."""
    seeds: int = 4
    """Sets of masks with which each of them is decided."""


def main() -> None:
    """Measure and print."""
    flags = parse(Flags, None, __doc__)
    import torch

    from lit_gpt.checkpoints.loaded import load_model

    loaded = load_model(flags.ckpt, kind="mdm", device="cpu")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32, budget {BUDGET}.\n")
    tasks = {"next_line": next_line(flags.questions), "last word of four": last_words(flags.questions)}
    rows = [row for name, documents in tasks.items() for row in savings(loaded, name, documents)]
    heads = ["task", "decide", "passes per answer", "decided early", "acc", "acc_norm", "other choices", "seconds"]
    print_table(heads, rows)
    print("\n## The worst case\n")
    worst_case(loaded, next_line(flags.ties), flags.seeds)


# --- questions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """A multiple-choice question as text."""

    context: str
    choices: list[str]
    delimiter: str
    answer: int


def next_line(count: int) -> list[Document]:
    """The bundled task, evenly spread over its file."""
    lines = (ROOT / "data" / "next_line" / "test.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines[:: max(1, len(lines) // count)][:count]]
    return [Document(one["context"], one["choices"], "\n", one["answer"]) for one in found]


def last_words(count: int) -> list[Document]:
    """LAMBADA's passages, whose last word stands among the last words of three others."""
    lines = (ROOT / "data" / "lambada" / "test.jsonl").read_text().splitlines()[:count]
    texts = [json.loads(line)["text"].rsplit(" ", 1) for line in lines]
    words = sorted({word for _, word in texts})
    draw = random.Random(1)
    documents = []
    for context, word in texts:
        choices = [word, *draw.sample([other for other in words if other != word], 3)]
        draw.shuffle(choices)
        documents.append(Document(context, choices, " ", choices.index(word)))
    return documents


def as_question(loaded: LoadedModel, document: Document, longest: int | None = None, context: int = 80) -> Question:
    """Its requests, and what acc and acc_norm compare."""
    from lit_gpt.likelihood.decision import Question
    from lit_gpt.likelihood.loglikelihood import LikelihoodRequest

    answers = []
    for choice in document.choices:
        prefix, target = loaded.encode_pair(document.context, document.delimiter + choice)
        answers.append(LikelihoodRequest(tuple(prefix[-context:]), tuple(target[:longest])))
    return Question(tuple(answers), ((1.0,) * len(answers), tuple(float(len(choice)) for choice in document.choices)))


# --- what is saved ----------------------------------------------------------------------------------------------------


def savings(loaded: LoadedModel, name: str, documents: Sequence[Document]) -> list[list[str]]:
    """A row for the whole budget, and one for each chance."""
    questions = [as_question(loaded, document) for document in documents]
    started = time.perf_counter()
    whole = whole_budget(loaded, questions, BUDGET, 1234)
    rows = [row(name, "", questions, documents, whole, ("", time.perf_counter() - started))]
    for chance in CHANCES:
        started = time.perf_counter()
        results = decided(loaded, questions, chance, 1234)
        seconds = time.perf_counter() - started
        other = [n for n, one in enumerate(results) if choices(questions[n], one) != choices(questions[n], whole[n])]
        early = [n for n in other if results[n].is_decided]
        judged = whole_budget(loaded, [questions[n] for n in early], REFERENCE_BUDGET, 4321)
        wrong = sum(
            choices(questions[n], results[n]) != choices(questions[n], one)
            for n, one in zip(early, judged, strict=True)
        )
        words = f"{len(other)}, {len(early)} of them decided early"
        words += f", where {REFERENCE_BUDGET} passes contradict {wrong}" if early else ""
        rows.append(row(name, f"{chance:g}", questions, documents, results, (words, seconds)))
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def row(
    name: str,
    chance: str,
    questions: Sequence[Question],
    documents: Sequence[Document],
    results: Sequence[QuestionResult],
    timing: tuple[str, float],
) -> list[str]:
    """One line of the table."""
    other, seconds = timing
    passes = statistics.fmean(count for one in results for count in one.passes)
    right = [
        sum(
            choices(question, one)[rule] == document.answer
            for question, document, one in zip(questions, documents, results, strict=True)
        )
        for rule in (0, 1)
    ]
    shares = [f"{100 * count / len(documents):.1f} %" for count in right]
    early = f"{100 * sum(one.is_decided for one in results) / len(results):.1f} %" if chance else ""
    return [name, chance, f"{passes:.1f}", early, *shares, other, f"{seconds:.0f}"]


def choices(question: Question, result: QuestionResult) -> list[int]:
    """What each rule chooses."""
    nll = [one.nll for one in result.likelihoods]
    return [min(range(len(nll)), key=lambda n: nll[n] / scales[n]) for scales in question.rules]


def whole_budget(loaded: LoadedModel, questions: Sequence[Question], budget: int, seed: int) -> list[QuestionResult]:
    """All answers with the same budget."""
    from lit_gpt.likelihood.decision import QuestionResult
    from lit_gpt.likelihood.exact import ExactBound
    from lit_gpt.likelihood.loglikelihood import LikelihoodSettings, mdm_likelihoods
    from lit_gpt.likelihood.scoring import ScoringModel

    estimator = ExactBound(budget)
    requests = [request for question in questions for request in question.answers]
    model = ScoringModel.of(loaded.model, MAX_TOKENS)
    found = dict(mdm_likelihoods(model, requests, LikelihoodSettings(estimator, seed=seed)))
    numbers = iter(range(len(requests)))
    results = []
    for question in questions:
        likelihoods = tuple(found[next(numbers)] for _ in question.answers)
        passes = tuple(estimator.passes(len(request.target)) for request in question.answers)
        results.append(QuestionResult(likelihoods, passes, False))
    return results


def decided(loaded: LoadedModel, questions: Sequence[Question], chance: float, seed: int) -> list[QuestionResult]:
    """Each question with as many passes as it needs."""
    from lit_gpt.likelihood.decision import question_likelihoods
    from lit_gpt.likelihood.exact import ExactBound
    from lit_gpt.likelihood.loglikelihood import LikelihoodSettings
    from lit_gpt.likelihood.scoring import ScoringModel

    model = ScoringModel.of(loaded.model, MAX_TOKENS)
    found = dict(question_likelihoods(model, questions, LikelihoodSettings(ExactBound(BUDGET), seed=seed), chance))
    return [found[number] for number in range(len(questions))]


# --- the worst case ---------------------------------------------------------------------------------------------------


def worst_case(loaded: LoadedModel, documents: Sequence[Document], seeds: int) -> None:
    """How often questions without a best answer are decided."""
    from lit_gpt.likelihood.decision import Question

    cut = [as_question(loaded, document, longest=8, context=16) for document in documents]
    # An answer that can be read under all masks within the budget has no noise.
    long = [question for question in cut if min(len(one.target) for one in question.answers) == 8]
    bounds = whole_budget(loaded, long, 2**8, 1234)
    ties = [
        Question(question.answers, (tuple(one.nll for one in bound.likelihoods),))
        for question, bound in zip(long, bounds, strict=True)
    ]
    rows = []
    for chance in CHANCES[:2]:
        early = [one.is_decided for seed in range(seeds) for one in decided(loaded, ties, chance, seed)]
        rows.append([f"{chance:g}", str(len(early)), str(sum(early)), f"{sum(early) / len(early):.4f}"])
    print_table(["decide", "questions times seeds", "decided early", "share"], rows)


if __name__ == "__main__":
    run(main)
