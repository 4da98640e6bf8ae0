"""Plots as PNG files: loss curves, accuracies over training, values on the spokes of a wheel.

Matplotlib is imported when it is used.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#1f6fb4", "#d9560b", "#2a8f4a", "#8a4fb0")
_LINE_STYLES = ("-", "--", ":", "-.")
_MAX_RINGS = 6


@dataclass(frozen=True)
class LossCurve:
    """One run's losses, in training and on validation data."""

    label: str
    """For the legend."""
    train: list[tuple[int, float]]
    """(tokens seen, nats per token)."""
    validation: list[tuple[int, float]]
    """(tokens seen, nats per token)."""

    @classmethod
    def from_csv(cls, label: str, path: Path | str, tokens_per_step: float) -> LossCurve:
        """The losses in a run's metrics.csv, whose rows have optimizer steps."""
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        train_losses, val_losses = (
            [(int(int(row["step"]) * tokens_per_step), float(row[name])) for row in rows if row.get(name)]
            for name in ("metric/train_loss", "metric/val_loss")
        )
        return cls(label, train_losses, val_losses)


def plot_losses(curves: Sequence[LossCurve], title: str, path: Path) -> None:
    """Draw training losses (thin, with a running mean) and validation losses (marks) over the tokens seen, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for curve, color in zip(curves, COLORS, strict=False):
        if curve.train:
            tokens, losses = zip(*curve.train, strict=True)
            axes.plot(tokens, losses, color=color, alpha=0.22, linewidth=1)
            axes.plot(tokens, _running_mean(losses), color=color, linewidth=2, label=f"{curve.label}, training")
        if curve.validation:
            tokens, losses = zip(*curve.validation, strict=True)
            axes.plot(
                tokens, losses, color=color, linestyle="--", marker="o", markersize=6, markeredgecolor="white",
                label=f"{curve.label}, validation: {losses[-1]:.2f}",
            )  # fmt: skip
    axes.set(xlabel="tokens seen in training", ylabel="loss, nats per token", title=title)
    axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.margins(x=0.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_radar(values: Mapping[str, Sequence[float | None]], spokes: Sequence[str], title: str, path: Path) -> None:
    """Draw one polygon for each name over named spokes, from 0 at the centre, as PNG.

    Args:
        values: by name, one for each spoke; None leaves a gap.
        spokes: their names, clockwise from the top.
        title: above the picture.
        path: where to write it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot(projection="polar")
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    angles = [2 * math.pi * number / len(spokes) for number in range(len(spokes))]
    for number, (name, points) in enumerate(values.items()):
        color = COLORS[number % len(COLORS)]
        style = _LINE_STYLES[number // len(COLORS) % len(_LINE_STYLES)]
        closed = [math.nan if value is None else value for value in [*points, *points[:1]]]
        axes.plot([*angles, *angles[:1]], closed, style, color=color, linewidth=2, marker="o", markersize=5, label=name)
        if not any(math.isnan(value) for value in closed):
            axes.fill(angles, closed[:-1], color=color, alpha=0.1)
    axes.set_xticks(angles, spokes)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        # Names beside the circle begin or end at it; those above and below stand in the middle.
        side = math.sin(angle)
        label.set_horizontalalignment("left" if side > 0.1 else "right" if side < -0.1 else "center")
    axes.tick_params(axis="x", pad=6)
    highest = max([1.0, *(value for points in values.values() for value in points if value is not None)])
    step = math.ceil(highest / _MAX_RINGS)
    rings = [step * number for number in range(1, math.ceil(highest / step) + 1)]
    axes.set_ylim(0, rings[-1])
    axes.set_yticks(rings)
    # Between the first two spokes, where no line of a polygon runs along the numbers.
    axes.set_rlabel_position(math.degrees(angles[1] / 2) if len(angles) > 1 else 0)
    axes.grid(alpha=0.4)
    axes.spines["polar"].set_alpha(0.4)
    axes.set_title(title, pad=18)
    figure.legend(loc="outside lower center", ncols=min(4, max(1, len(values))), frameon=False)
    save_figure(figure, path)


def plot_accuracies(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], title: str, path: Path) -> None:
    """Draw accuracies over training, one panel beside the other, as PNG.

    Args:
        panels: title of each panel to its curves, label to (optimizer step, accuracy from 0 to 1); labels are the same in all.
        title: above the picture.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, curves) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for (label, points), color, style in zip(curves.items(), COLORS, _LINE_STYLES, strict=True):
            steps, accuracies = zip(*points, strict=True)
            axes.plot(
                steps, accuracies, color=color, linestyle=style, marker="o", markersize=4, linewidth=2, label=label
            )
        axes.set(title=name, xlabel="optimizer steps", ylim=(-0.03, 1.03))
        axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)


@dataclass(frozen=True)
class SeriesPanel:
    """One plot of several series with their standard errors."""

    xlabel: str
    ylabel: str
    series: Mapping[str, Sequence[tuple[float, float, float]]]
    """By label: (x, y, standard error of y); NaN draws no bar."""
    log_base: int | None = None
    """Of the x axis; None is linear."""


def plot_series(panels: Sequence[SeriesPanel], title: str, path: Path) -> None:
    """Draw measurements with error bars of one standard error, one panel beside the other, as PNG.

    Args:
        panels: a label has the same color in all.
        title: above the picture.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(panels), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.series))
    shown: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, points in panel.series.items():
            number = labels.index(label)
            x, y, errors = zip(*points, strict=True)
            shown[label] = axes.errorbar(
                x, y, [0.0 if math.isnan(error) else error for error in errors], label=label, capsize=3, marker="o",
                markersize=4, color=COLORS[number % len(COLORS)],
                linestyle=_LINE_STYLES[number // len(COLORS) % len(_LINE_STYLES)],
            )  # fmt: skip
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        if panel.log_base:
            ticks = sorted({point[0] for points in panel.series.values() for point in points})
            axes.set_xscale("log", base=panel.log_base)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a whole picture, or name the file that could not be written."""
    content = io.BytesIO()
    figure.savefig(content, dpi=130)
    write_file(path, lambda file: file.write(content.getvalue()))


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a twentieth of the values to either side of each; fewer, equally many, near the ends."""
    means = []
    for index in range(len(values)):
        reach = min(max(1, len(values) // 20), index, len(values) - 1 - index)
        part = values[index - reach : index + reach + 1]
        means.append(sum(part) / len(part))
    return means


def format_count(value: float) -> str:
    """`250k`, `1.23M`: three digits."""
    return f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}k" if value >= 1e3 else f"{value:.3g}"
