"""Images of a denoising trajectory: the text at several steps side by side (PNG), or moving (GIF).

The font is the one that matplotlib carries, so that images are the same on every machine; a token has the place and
width of its finished text from the first step on, so that nothing jumps. Matplotlib and Pillow are imported when they
are used.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from lit_gpt.files import write_file
from lit_gpt.ui.trajectory import DenoisingTrajectory

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

_GREY, _INK, _PAPER = (206, 206, 206), (25, 25, 25), (255, 255, 255)
# Colours of the first and the last step within matplotlib's viridis: its darkest end would hide black text's frame.
_COLORMAP, _FIRST_COLOR, _LAST_COLOR = "viridis", 0.15, 1.0
# Pixels.
_FONT, _SMALL_FONT, _LINE, _PAD, _MARGIN = 17, 15, 26, 3, 22
# Around the text of an animation.
_FRAME = 6
_MAX_FRAMES = 60
_FRAME_MS, _LAST_FRAME_MS = 120, 3000


def draw_trajectory(
    trajectory: DenoisingTrajectory, title: str, path: Path, panels: int = 6, panel_width: int = 600
) -> None:
    """Draw a row's tokens at several steps, side by side, as PNG: masks grey, tokens coloured by their step."""
    from PIL import Image

    painter = _TokenPainter(trajectory, panel_width)
    steps = trajectory.select_steps(panels)
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
    content = io.BytesIO()
    image.save(content, "PNG")
    write_file(path, lambda file: file.write(content.getvalue()))


def animate_trajectory(trajectory: DenoisingTrajectory, path: Path, width: int = 720) -> None:
    """`draw_trajectory` as an animated GIF, one panel, a frame for each step that revealed something (at most 60).

    Lines break at `width`; the picture is as wide as the longest one.
    """
    from PIL import Image
    from PIL.Image import Dither

    painter = _TokenPainter(trajectory, width - 2 * _FRAME)
    size = (painter.used_width + 2 * _FRAME, painter.height + 2 * _FRAME)
    frames = []
    for step in trajectory.select_steps(_MAX_FRAMES):
        frame = Image.new("RGB", size, _PAPER)
        frame.paste(painter.panel(step).crop((0, 0, painter.used_width, painter.height)), (_FRAME, _FRAME))
        frames.append(frame)
    # One palette for all frames, or the colours would flicker: the first frame has the masks, the last every step.
    both = Image.new("RGB", (size[0], 2 * size[1]))
    both.paste(frames[0], (0, 0))
    both.paste(frames[-1], (0, size[1]))
    palette = both.quantize(255)
    indexed = [frame.quantize(palette=palette, dither=Dither.NONE) for frame in frames]
    durations = [_FRAME_MS] * (len(frames) - 1) + [_LAST_FRAME_MS]
    content = io.BytesIO()
    indexed[0].save(
        content, "GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0, optimize=False
    )
    write_file(path, lambda file: file.write(content.getvalue()))


class _TokenPainter:
    """Places the tokens of a row once and paints them at any step."""

    def __init__(self, trajectory: DenoisingTrajectory, width: int) -> None:
        self.trajectory, self.width = trajectory, width
        self.font, self.small = _font(_FONT), _font(_SMALL_FONT)
        self.cells: list[tuple[int, int, int, str]] = []
        x, y = 0, _LINE
        for text, following in zip(trajectory.texts, [*trajectory.texts[1:], ""], strict=True):
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
        # Of the last line that has a token: a text may end with its line's end.
        self.height = max((at for _, at, _, _ in self.cells), default=0) + _LINE
        head = self.small.getlength(self._head(trajectory.steps, len(trajectory.texts)))
        self.used_width = min(width, max([math.ceil(head), *(left + cell + 1 for left, _, cell, _ in self.cells)]))

    def panel(self, step: int) -> Image:
        """The row after a step, below a line that says which."""
        from PIL import Image, ImageDraw

        trajectory = self.trajectory
        image = Image.new("RGB", (self.width, self.height), _PAPER)
        draw = ImageDraw.Draw(image)
        hidden = sum(at > step for at in trajectory.revealed)
        draw.text((0, 2), self._head(step, hidden), _INK, self.small)
        for (x, y, width, text), at in zip(self.cells, trajectory.revealed, strict=True):
            box = (x, y, x + width, y + _LINE - 3)
            if at > step:
                draw.rectangle(box, _GREY)
                continue
            fill = _PAPER if at == 0 else _step_color(at, trajectory.steps)
            draw.rectangle(box, fill, outline=_INK if at == 0 else None)
            dark = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] < 140
            draw.text((x + _PAD, y + 1), text, _PAPER if dark else _INK, self.font)
        return image

    def _head(self, step: int, hidden: int) -> str:
        """The line above the tokens."""
        return f"after step {step} of {self.trajectory.steps}: {hidden} masked"

    def write(self, image: Image, where: tuple[int, int], text: str) -> None:
        """Put a line of text on a picture."""
        from PIL import ImageDraw

        ImageDraw.Draw(image).text(where, text, _INK, self.font)

    def legend(self, image: Image, top: int) -> None:
        """What the colours mean: given, masked, and the scale of steps."""
        from PIL import ImageDraw

        draw = ImageDraw.Draw(image)
        x, bottom, steps = _MARGIN, top + 20, self.trajectory.steps
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
