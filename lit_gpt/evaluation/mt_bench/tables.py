"""MT-bench's results as numbers: mean ratings of models, by turn and category, and wins against each other.

Decisions, FastChat's: a judgment without a rating or verdict is left out; a pair whose two orders disagree is a tie; a
tie counts as half a win in the adjusted rate, which sorts the models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from lit_gpt.evaluation.mt_bench.benchmark_files import JsonLine


@dataclass(frozen=True)
class ModelRatings:
    """A model's ratings."""

    model: str
    turns: dict[int, list[float]]
    """The ratings of each turn."""
    unrated: int
    """Judgments without a rating."""

    @property
    def rated(self) -> int:
        """Judgments with a rating."""
        return sum(map(len, self.turns.values()))

    def mean(self, turn: int | None = None) -> float | None:
        """The mean rating of a turn, or of all; None without any."""
        found = [score for number, scores in self.turns.items() if turn in (None, number) for score in scores]
        return fmean(found) if found else None


@dataclass
class PairwiseRecord:
    """A model's pairwise results."""

    model: str
    win: int = 0
    loss: int = 0
    tie: int = 0

    @property
    def total(self) -> int:
        """Pairs that it was in."""
        return self.win + self.loss + self.tie

    @property
    def rates(self) -> tuple[float, float, float]:
        """Shares of wins and losses, and of wins where a tie is half a win."""
        return self.win / self.total, self.loss / self.total, (self.win + 0.5 * self.tie) / self.total


def model_ratings(lines: Iterable[JsonLine], no_rating: float = -1) -> list[ModelRatings]:
    """Ratings by model, the best first.

    Args:
        lines: of single judgments.
        no_rating: the score of those without a rating.
    """
    found: dict[str, ModelRatings] = {}
    unrated: dict[str, int] = {}
    for line in lines:
        model, score = line["model"], line["score"]
        scores = found.setdefault(model, ModelRatings(model, {}, 0))
        if score == no_rating:
            unrated[model] = unrated.get(model, 0) + 1
        else:
            scores.turns.setdefault(line["turn"], []).append(score)
    all_of_them = [ModelRatings(model, scores.turns, unrated.get(model, 0)) for model, scores in found.items()]
    return sorted(all_of_them, key=lambda scores: (-(scores.mean() or 0), scores.model))


def by_category(lines: Iterable[JsonLine], categories: Mapping[int, str]) -> dict[str, list[JsonLine]]:
    """Lines by their question's category, in the questions' order; unknown questions are left out."""
    found: dict[str, list[JsonLine]] = {name: [] for name in categories.values()}
    for line in lines:
        if line["question_id"] in categories:
            found[categories[line["question_id"]]].append(line)
    return found


def pairwise_records(lines: Iterable[JsonLine], baseline: str | None) -> list[PairwiseRecord]:
    """Wins, losses and ties by model, the highest adjusted share of wins first.

    Args:
        lines: of pairwise judgments.
        baseline: count only matches against this model, and leave it out itself; None counts all.
    """
    found: dict[str, PairwiseRecord] = {}
    for line in lines:
        models, winners = (line["model_1"], line["model_2"]), (line["g1_winner"], line["g2_winner"])
        if "error" in winners or (baseline is not None and baseline not in models):
            continue
        first, second = (found.setdefault(model, PairwiseRecord(model)) for model in models)
        if winners == ("model_1", "model_1"):
            first.win, second.loss = first.win + 1, second.loss + 1
        elif winners == ("model_2", "model_2"):
            first.loss, second.win = first.loss + 1, second.win + 1
        else:
            first.tie, second.tie = first.tie + 1, second.tie + 1
    shown = [record for record in found.values() if record.model != baseline]
    return sorted(shown, key=lambda record: (-record.rates[2], record.model))


def published_rating_table(ratings: Iterable[ModelRatings], turn: int | None) -> str:
    """Mean ratings of a turn (None: of all), the best first, in the form of the published tables (pandas').

    Two lines of header, then model, turn (where there is one) and rating with six decimals.
    """
    scores = sorted(((score, one.model) for one in ratings if (score := one.mean(turn)) is not None), reverse=True)
    own = [] if turn is None else [str(turn)]
    rows = [("", *[""] * len(own), "score"), ("model", *["turn"] * len(own), "")]
    rows += [(model, *own, f"{score:.6f}") for score, model in scores]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(" ".join([*map(str.ljust, row[:-1], widths), row[-1].rjust(widths[-1])]).rstrip() for row in rows)


def aligned_table(header: Sequence[str], rows: Iterable[Sequence[str | int | float | None]]) -> str:
    """A table as text: words to the left, numbers to the right, with four decimals where they are not whole."""

    def cell(value: str | int | float | None) -> str:
        return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    table = [list(header), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )
