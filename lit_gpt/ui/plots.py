"""Pictures: loss curves of runs, values on the spokes of a wheel, and text that emerges from masks.

Decisions: the font is the one that matplotlib carries, so that pictures are the same on every machine; a token's cell
has the place and width of the finished token from the first frame on, so that nothing jumps. Matplotlib and Pillow are
imported when they are used. May import display only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.ui.display import Denoising

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

_COLORS = ("#1f6fb4", "#d9560b", "#2a8f4a", "#8a4fb0")
_MAX_RINGS = 6
_LINE_STYLES = ("-", "--", ":", "-.")
_GREY, _INK, _PAPER = (206, 206, 206), (25, 25, 25), (255, 255, 255)
# Colours of the first and the last step within matplotlib's viridis: its darkest end would hide black text's frame.
_COLORMAP, _FIRST_COLOR, _LAST_COLOR = "viridis", 0.15, 1.0
# Pixels.
_FONT, _SMALL_FONT, _LINE, _PAD, _MARGIN = 17, 15, 26, 3, 22
_MAX_FRAMES = 60
_FRAME_MS, _LAST_FRAME_MS = 120, 3000


@dataclass(frozen=True)
class LossCurve:
    """One run's losses."""

    label: str
    """For the legend."""
    train: list[tuple[int, float]]
    """(tokens seen, nats per token)."""
    validation: list[tuple[int, float]]
    """(tokens seen, nats per token)."""


def plot_losses(curves: Sequence[LossCurve], title: str, path: Path) -> None:
    """Draw training losses (thin, with a running mean) and validation losses (marks) over the tokens seen, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for curve, color in zip(curves, _COLORS, strict=False):
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
    axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
    axes.margins(x=0.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


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
        color = _COLORS[number % len(_COLORS)]
        style = _LINE_STYLES[number // len(_COLORS) % len(_LINE_STYLES)]
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
    figure.savefig(path, dpi=130)


def plot_shares(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], title: str, path: Path) -> None:
    """Draw shares between 0 and 1 over training, one panel beside the other, as PNG.

    Args:
        panels: title of each panel to its curves, label to (optimizer step, share); labels are the same in all.
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
        for (label, points), color, style in zip(curves.items(), _COLORS, _LINE_STYLES, strict=True):
            steps, shares = zip(*points, strict=True)
            axes.plot(steps, shares, color=color, linestyle=style, marker="o", markersize=4, linewidth=2, label=label)
        axes.set(title=name, xlabel="optimizer steps", ylim=(-0.03, 1.03))
        axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)


def draw_denoising(denoising: Denoising, title: str, path: Path, panels: int = 6, panel_width: int = 600) -> None:
    """Draw a row's tokens at several steps, side by side, as PNG: masks grey, tokens coloured by their step."""
    from PIL import Image

    painter = _Painter(denoising, panel_width)
    steps = denoising.snapshots(panels)
    columns = min(3, len(steps))
    rows = math.ceil(len(steps) / columns)
    width = columns * (panel_width + _MARGIN) + _MARGIN
    top, bottom = 48, 62
    image = Image.new("RGB", (width, top + rows * (painter.height + _MARGIN) + bottom), _PAPER)
    painter.write(image, (_MARGIN, 14), title)
    for index, step in enumerate(steps):
        x = _MARGIN + index % columns * (panel_width + _MARGIN)
        image.paste(painter.panel(step), (x, top + index // columns * (painter.height + _MARGIN)))
    painter.legend(image, image.height - bottom + 8)
    image.save(path)


def animate_denoising(denoising: Denoising, path: Path, width: int = 720) -> None:
    """`draw_denoising` as an animated GIF, one panel, a frame for each step that revealed something (at most 60)."""
    from PIL import Image
    from PIL.Image import Dither

    painter = _Painter(denoising, width)
    frames = [painter.panel(step) for step in denoising.snapshots(_MAX_FRAMES)]
    # One palette for all frames, or the colours would flicker: the first frame has the masks, the last every step.
    both = Image.new("RGB", (width, 2 * painter.height))
    both.paste(frames[0], (0, 0))
    both.paste(frames[-1], (0, painter.height))
    palette = both.quantize(255)
    indexed = [frame.quantize(palette=palette, dither=Dither.NONE) for frame in frames]
    durations = [_FRAME_MS] * (len(frames) - 1) + [_LAST_FRAME_MS]
    indexed[0].save(path, save_all=True, append_images=indexed[1:], duration=durations, loop=0, optimize=False)


class _Painter:
    """Places the tokens of a row once and paints them at any step."""

    def __init__(self, denoising: Denoising, width: int) -> None:
        self.denoising, self.width = denoising, width
        self.font, self.small = _font(_FONT), _font(_SMALL_FONT)
        self.cells: list[tuple[int, int, int, str]] = []
        x, y = 0, _LINE
        for text, following in zip(denoising.texts, [*denoising.texts[1:], ""], strict=True):
            visible = text.replace("\n", "↵").strip() or " "
            gap = 5 if text.startswith(" ") else 0
            cell = math.ceil(self.font.getlength(visible)) + 2 * _PAD
            if x and x + gap + cell > width:
                x, y, gap = 0, y + _LINE, 0
            self.cells.append((x + gap, y, cell, visible))
            x += gap + cell + 1
            # Blank lines would take much room and say little: their line ends stay on one line.
            if text.endswith("\n") and following != "\n":
                x, y = 0, y + _LINE
        self.height = y + _LINE + 6

    def panel(self, step: int) -> Image:
        """The row after a step, below a line that says which."""
        from PIL import Image, ImageDraw

        denoising = self.denoising
        image = Image.new("RGB", (self.width, self.height), _PAPER)
        draw = ImageDraw.Draw(image)
        hidden = sum(at > step for at in denoising.revealed)
        draw.text((0, 2), f"after step {step} of {denoising.steps}: {hidden} masked", _INK, self.small)
        for (x, y, width, text), at in zip(self.cells, denoising.revealed, strict=True):
            box = (x, y, x + width, y + _LINE - 3)
            if at > step:
                draw.rectangle(box, _GREY)
                continue
            fill = _PAPER if at == 0 else _step_color(at, denoising.steps)
            draw.rectangle(box, fill, outline=_INK if at == 0 else None)
            dark = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] < 140
            draw.text((x + _PAD, y + 1), text, _PAPER if dark else _INK, self.font)
        return image

    def write(self, image: Image, where: tuple[int, int], text: str) -> None:
        """Put a line of text on a picture."""
        from PIL import ImageDraw

        ImageDraw.Draw(image).text(where, text, _INK, self.font)

    def legend(self, image: Image, top: int) -> None:
        """What the colours mean: given, masked, and the scale of steps."""
        from PIL import ImageDraw

        draw = ImageDraw.Draw(image)
        x, bottom, steps = _MARGIN, top + 20, self.denoising.steps
        for label, fill, outline in (("given", _PAPER, _INK), ("masked", _GREY, None)):
            draw.rectangle((x, top, x + 26, bottom), fill, outline=outline)
            draw.text((x + 34, top + 1), label, _INK, self.small)
            x += 34 + int(self.small.getlength(label)) + 30
        label = "revealed in step 1"
        draw.text((x, top + 1), label, _INK, self.small)
        x += int(self.small.getlength(label)) + 10
        for offset in range(300):
            color = _step_color(1 + offset / 299 * (steps - 1), steps)
            draw.line((x + offset, top, x + offset, bottom), color)
        draw.text((x + 310, top + 1), str(steps), _INK, self.small)


def _font(size: int) -> FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _step_color(step: float, steps: int) -> tuple[int, int, int]:
    """A step's colour, from dark (first) to light (last)."""
    from matplotlib import colormaps

    share = (step - 1) / max(1, steps - 1)
    red, green, blue, _ = colormaps[_COLORMAP](_FIRST_COLOR + share * (_LAST_COLOR - _FIRST_COLOR), bytes=True)
    return int(red), int(green), int(blue)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a twentieth of the values to either side of each; fewer, equally many, near the ends."""
    means = []
    for index in range(len(values)):
        reach = min(max(1, len(values) // 20), index, len(values) - 1 - index)
        part = values[index - reach : index + reach + 1]
        means.append(sum(part) / len(part))
    return means


def short_count(value: float) -> str:
    """`250k`, `1.23M`: three digits."""
    return f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}k" if value >= 1e3 else f"{value:.3g}"
