"""MT-bench's judgments as the text that is shown: which of them count, and the tables.

Decisions, FastChat's: its three tables of ratings come first, in its words, which scripts read; of pairs those count
whose first model is listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_gpt.cli import warn
from lit_gpt.evaluation.mt_bench.benchmark_files import MODES, BenchmarkFiles, JsonLine, read_mt_bench_questions
from lit_gpt.evaluation.mt_bench.judging import is_unrated, read_judgments
from lit_gpt.evaluation.mt_bench.settings import MtBenchResultFlags
from lit_gpt.evaluation.mt_bench.tables import (
    ModelRatings,
    aligned_table,
    by_category,
    model_ratings,
    pairwise_records,
    published_rating_table,
)

# The benchmark of which FastChat shows second turns.
_WITH_SECOND_TURNS = "mt_bench"


@dataclass(frozen=True)
class CategoryMeans:
    """Mean ratings by category."""

    categories: list[str]
    """In the questions' order."""
    by_model: dict[str, list[float | None]]
    """The best model first; None where nothing was rated."""


def read_shown_judgments(flags: MtBenchResultFlags) -> tuple[Path, list[JsonLine]]:
    """The file of judgments, and those of the models that the user wants to see.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a flag is wrong, a line is no judgment, or there is none of a model.
    """
    if flags.mode not in MODES:
        raise ValueError(f"--mode {flags.mode}: choose from {', '.join(MODES)}")
    if flags.radar not in (None, "off") and Path(flags.radar).suffix != ".png":
        raise ValueError(f"--radar {flags.radar}: expected FILE.png or off")
    bench = BenchmarkFiles(flags.bench_name)
    path = Path(flags.input_file) if flags.input_file else bench.judgments(flags.judge_model, flags.mode)
    if not path.is_file():
        there = ", ".join(other.name for other in sorted(path.parent.glob("*.jsonl"))) or "none"
        raise FileNotFoundError(f"no judgments {path} (there are {there}): make them with eval/gen_judgment.py")
    return path, _of_models(path, read_judgments(path, flags.mode), flags)


def _of_models(path: Path, lines: list[JsonLine], flags: MtBenchResultFlags) -> list[JsonLine]:
    """The judgments of the wanted models."""
    names = ("model",) if flags.mode == "single" else ("model_1", "model_2")
    if not lines:
        raise ValueError(f"{path} holds no judgment: make them with eval/gen_judgment.py")
    there = {line[name] for line in lines for name in names}
    wanted = set(flags.model_list or there)
    if unknown := sorted(wanted - there):
        raise ValueError(f"{path} has no judgments of {', '.join(unknown)}: it has {', '.join(sorted(there))}")
    if flags.mode != "pairwise-baseline":
        return [line for line in lines if line[names[0]] in wanted]
    if flags.baseline_model not in there:
        raise ValueError(f"--baseline-model {flags.baseline_model}: {path} has {', '.join(sorted(there))}")
    # Whichever of the two is named first.
    pairs = [(line, {line[name] for name in names}) for line in lines]
    return [line for line, models in pairs if flags.baseline_model in models and models & wanted]


def category_means(bench: BenchmarkFiles, lines: Sequence[JsonLine]) -> CategoryMeans | None:
    """Mean ratings by category; None, with a warning, where the questions are not there."""
    if not bench.questions.is_file():
        warn(f"no {bench.questions}: no table by category and no picture")
        return None
    categories = {question.question_id: question.category for question in read_mt_bench_questions(bench.questions)}
    split = by_category(lines, categories)
    means = CategoryMeans(list(split), {one.model: [] for one in model_ratings(lines)})
    for own in split.values():
        found = {one.model: one.mean() for one in model_ratings(own)}
        for name, values in means.by_model.items():
            values.append(found.get(name))
    return means


def rating_tables(lines: Sequence[JsonLine], means: CategoryMeans | None, bench_name: str) -> str:
    """The published tables of ratings, then ours: by model with what was left out, and by category."""
    ratings = model_ratings(lines)
    titles = {"First turn": 1, "Second turn": 2, "Average": None}
    shown = titles if bench_name == _WITH_SECOND_TURNS else {"First turn": 1}
    parts = [f"########## {title} ##########\n{published_rating_table(ratings, turn)}" for title, turn in shown.items()]
    parts.append(_by_model(ratings))
    if means:
        names = list(means.by_model)
        rows = [
            [category, *(means.by_model[name][number] for name in names)]
            for number, category in enumerate(means.categories)
        ]
        parts.append(aligned_table(("category", *names), rows))
    return "\n\n".join(parts)


def _by_model(ratings: Sequence[ModelRatings]) -> str:
    header = ("model", "first turn", "second turn", "average", "rated", "without rating")
    rows = [(one.model, one.mean(1), one.mean(2), one.mean(), one.rated, one.unrated) for one in ratings]
    return aligned_table(header, rows)


def pair_table(lines: Sequence[JsonLine], flags: MtBenchResultFlags) -> str:
    """The table of wins, and how many matches are left out."""
    found = pairwise_records(lines, flags.baseline_model if flags.mode == "pairwise-baseline" else None)
    header = ("model", "win", "loss", "tie", "win_rate", "loss_rate", "win_rate_adjusted")
    table = aligned_table(header, [(one.model, one.win, one.loss, one.tie, *one.rates) for one in found])
    unrated = sum(map(is_unrated, lines))
    return f"{table}\n\n{unrated} of {len(lines)} matches are left out: a verdict is missing" if unrated else table
