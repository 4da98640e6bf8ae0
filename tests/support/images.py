"""What is in an image's pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image


def share_of_color(image: Image.Image, color: tuple[int, int, int]) -> float:
    """Share of the pixels that have a colour, or nearly (a GIF has few colours)."""
    return float((abs(np.asarray(image.convert("RGB")).astype(int) - color) < 6).all(-1).mean())
