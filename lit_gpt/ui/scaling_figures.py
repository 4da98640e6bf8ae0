"""The figures of a scaling study: loss and best size against compute, and loss against size for each budget, as PNG files.

Matplotlib is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.ui.plots import COLORS, format_count, save_figure


@dataclass(frozen=True)
class IsoflopKind:
    """What is drawn of one kind."""

    label: str
    """For the legend."""
    points: list[tuple[float, float, float]]
    """(budget in FLOPs, non-embedding parameters, loss) of every run."""
    fits: dict[str, Any]
    """Its part of the study's JSON."""


def _axes(width: float = 7.6) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)


def _few_ticks(axis: Any, values: Sequence[float], shown: Any) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axis.set_minor_formatter(NullFormatter())


def draw_scaling(kinds: Sequence[IsoflopKind], loss_path: Path, size_path: Path) -> None:
    """Loss of the best size, and the best size, over the budget, with 95 % intervals and power laws, on log scales."""
    specs = (
        (loss_path, "loss", "loss, nats per token", "Loss against compute", lambda kind: _loss_line(kind)),
        (
            size_path,
            "size",
            "best non-embedding parameters",
            "Parameters against compute",
            lambda kind: _size_line(kind),
        ),
    )
    for path, name, label, title, line in specs:
        figure, axes = _axes()
        values: list[float] = []
        for kind, color in zip(kinds, COLORS, strict=False):
            budgets = [row["flops"] for row in kind.fits["budgets"]]
            middle, low, high = np.array([row[name] for row in kind.fits["budgets"]]).T
            values += [*low, *high]
            if name == "loss":
                runs = np.array(kind.points)
                axes.scatter(runs[:, 0], runs[:, 2], color=color, alpha=0.35, s=18)
                values += list(runs[:, 2])
            errors = np.maximum(0, [middle - low, high - middle])
            axes.errorbar(
                budgets, middle, errors, fmt="o", color=color, capsize=4, markeredgecolor="white", markersize=8
            )
            if len(budgets) > 1:
                x = np.geomspace(min(budgets), max(budgets), 50)
                y, text = line(kind)
                axes.plot(x, y(x), color=color, linewidth=2, label=f"{kind.label}: {text}")
        axes.set(xscale="log", yscale="log", xlabel="training FLOPs, 6 N D", ylabel=label, title=title)
        ticks = np.geomspace(min(values), max(values), 6).tolist()
        _few_ticks(axes.yaxis, ticks, format_count if name == "size" else lambda value: f"{value:.2f}")
        _finish(figure, axes, path)


def _loss_line(kind: IsoflopKind) -> tuple[Any, str]:
    factor, exponent = kind.fits["loss_factor"][0], kind.fits["loss_exponent"]
    return lambda x: factor * x ** -exponent[0], f"C^-{exponent[0]:.3f} ({exponent[1]:.3f} to {exponent[2]:.3f})"


def _size_line(kind: IsoflopKind) -> tuple[Any, str]:
    factor, exponent = np.exp(kind.fits["size_log_factor"]), kind.fits["size_exponent"]
    return lambda x: factor * x ** exponent[0], f"C^{exponent[0]:.2f} ({exponent[1]:.2f} to {exponent[2]:.2f})"


def draw_isoflops(kinds: Sequence[IsoflopKind], path: Path) -> None:
    """Loss against size, a parabola for each budget and kind; an open circle is the lowest point within the sizes."""
    figure, axes = _axes(9)
    styles = ("-", "--", ":", "-.")
    for kind, color in zip(kinds, COLORS, strict=False):
        for number, budget in enumerate(kind.fits["budgets"]):
            own = np.array([(size, loss) for flops, size, loss in kind.points if flops == budget["flops"]])
            x = np.log(own[:, 0])
            curve = np.polyfit(x - x.mean(), own[:, 1], 2)
            smooth = np.linspace(x.min(), x.max(), 60)
            style, label = styles[number % len(styles)], f"{kind.label}, {budget['flops']:.2g} FLOPs"
            axes.plot(np.exp(smooth), np.polyval(curve, smooth - x.mean()), style, color=color, label=label)
            axes.scatter(own[:, 0], own[:, 1], color=color, s=26)
            axes.scatter(budget["size"][0], budget["loss"][0], s=90, facecolors="none", edgecolors=color)
    sizes = sorted({size for kind in kinds for _, size, _ in kind.points})
    axes.set(xscale="log", xlabel="non-embedding parameters", ylabel="loss, nats per token")
    axes.set_title("Loss by size at equal compute")
    _few_ticks(axes.xaxis, sizes, format_count)
    _finish(figure, axes, path)
