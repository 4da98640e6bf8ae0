"""Show what a judge made of MT-bench answers, as tables and a picture; gen_judgment.py comes before.

    python eval/show_result.py --judge-model gpt-4o-2024-05-13
    python eval/show_result.py --judge-model gpt-4o-2024-05-13 --mode pairwise-all --model-list arm mdm

Ratings: the mean of first turns, of second turns and of both, by model and by category, and data/mt_bench/radar.png.
Comparisons: wins, losses and ties, where a pair is a tie if its two orders disagree, and half a win in the adjusted rate.
Judgments without a rating or verdict are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run, warn

if TYPE_CHECKING:
    from lit_gpt.evaluation.mt_bench.benchmark_files import BenchmarkFiles, JsonLine


@dataclass
class Flags:
    """Flags of the result."""

    bench_name: str = "mt_bench"
    """The benchmark's folder in data/."""
    judge_model: str = "gpt-4"
    """Who judged."""
    input_file: str | None = None
    """The judgments; by default data/BENCH/model_judgment/JUDGE_single.jsonl, or _pair.jsonl."""
    mode: str = "single"
    """single, pairwise-baseline or pairwise-all."""
    baseline_model: str = "gpt-3.5-turbo"
    """Whom pairwise-baseline compares with."""
    model_list: list[str] | None = None
    """Show only these models."""
    radar: str | None = None
    """Where the picture of ratings by category goes, FILE.png; by default data/BENCH/radar.png; off draws none."""


def main() -> None:
    """Read, count, print, draw."""
    flags = parse(Flags, None, __doc__)

    from lit_gpt.evaluation.mt_bench.benchmark_files import MODES, BenchmarkFiles
    from lit_gpt.evaluation.mt_bench.judging import read_judgments

    if flags.mode not in MODES:
        raise ValueError(f"--mode {flags.mode}: choose from {', '.join(MODES)}")
    if flags.radar not in (None, "off") and Path(flags.radar).suffix != ".png":
        raise ValueError(f"--radar {flags.radar}: expected FILE.png or off")
    bench = BenchmarkFiles(flags.bench_name)
    path = Path(flags.input_file) if flags.input_file else bench.judgments(flags.judge_model, flags.mode)
    if not path.is_file():
        there = ", ".join(other.name for other in sorted(path.parent.glob("*.jsonl"))) or "none"
        raise FileNotFoundError(f"no judgments {path} (there are {there}): make them with eval/gen_judgment.py")
    lines = _of_models(path, read_judgments(path, flags.mode), flags)
    print(f"{path}, {flags.mode}\n")
    if flags.mode == "single":
        _show_ratings(bench, lines, flags)
    else:
        _show_pairs(lines, flags)


def _of_models(path: Path, lines: list[JsonLine], flags: Flags) -> list[JsonLine]:
    """The judgments of the models that the user wants to see."""

    def models(line: JsonLine) -> set[str]:
        return {line["model"]} if flags.mode == "single" else {line["model_1"], line["model_2"]}

    if not lines:
        raise ValueError(f"{path} holds no judgment: make them with eval/gen_judgment.py")
    there = {name for line in lines for name in models(line)}
    wanted = set(flags.model_list or there)
    if unknown := sorted(wanted - there):
        raise ValueError(f"{path} has no judgments of {', '.join(unknown)}: it has {', '.join(sorted(there))}")
    if flags.mode == "pairwise-baseline":
        if flags.baseline_model not in there:
            raise ValueError(f"--baseline-model {flags.baseline_model}: {path} has {', '.join(sorted(there))}")
        wanted.add(flags.baseline_model)
    return [line for line in lines if models(line) <= wanted]


def _show_ratings(bench: BenchmarkFiles, lines: Sequence[JsonLine], flags: Flags) -> None:
    """Tables by turn and by category, and the picture."""
    from lit_gpt.evaluation.mt_bench.benchmark_files import read_mt_bench_questions
    from lit_gpt.evaluation.mt_bench.tables import aligned_table, by_category, model_ratings

    scores = model_ratings(lines)
    header = ("model", "first turn", "second turn", "average", "rated", "without rating")
    rows = [(one.model, one.mean(1), one.mean(2), one.mean(), one.rated, one.unrated) for one in scores]
    print(aligned_table(header, rows))
    if not bench.questions.is_file():
        warn(f"no {bench.questions}: no table by category and no picture")
        return
    categories = {question.question_id: question.category for question in read_mt_bench_questions(bench.questions)}
    names = [one.model for one in scores]
    means: dict[str, list[float | None]] = {name: [] for name in names}
    split = by_category(lines, categories)
    for own in split.values():
        found = {one.model: one.mean() for one in model_ratings(own)}
        for name in names:
            means[name].append(found.get(name))
    table = [[category, *(means[name][number] for name in names)] for number, category in enumerate(split)]
    print("\n" + aligned_table(("category", *names), table))
    if flags.radar == "off":
        return

    from lit_gpt.files import make_folder
    from lit_gpt.ui.plots import plot_radar

    picture = Path(flags.radar) if flags.radar else bench.folder / "radar.png"
    make_folder(picture.parent)
    plot_radar(means, list(split), f"Mean rating by {flags.judge_model}, by category", picture)
    print(f"\n{picture}")


def _show_pairs(lines: Sequence[JsonLine], flags: Flags) -> None:
    """The table of wins."""
    from lit_gpt.evaluation.mt_bench.judging import is_unrated
    from lit_gpt.evaluation.mt_bench.tables import aligned_table, pairwise_records

    found = pairwise_records(lines, flags.baseline_model if flags.mode == "pairwise-baseline" else None)
    header = ("model", "win", "loss", "tie", "win_rate", "loss_rate", "win_rate_adjusted")
    print(aligned_table(header, [(one.model, one.win, one.loss, one.tie, *one.rates) for one in found]))
    if unrated := sum(map(is_unrated, lines)):
        print(f"\n{unrated} of {len(lines)} matches are left out: a verdict is missing")


if __name__ == "__main__":
    run(main)
