"""Pictures: they open, and what they say is in their pixels."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_gpt.ui.display import Denoising
from lit_gpt.ui.plots import LossCurve, animate_denoising, draw_denoising, plot_losses, short_count

TEXTS = ["GRE", "MIO", ":", "\n", *(f" word{i}" if i % 7 else "\n" for i in range(1, 60))]
GREY = (206, 206, 206)


def share(image: Image.Image, color: tuple[int, int, int]) -> float:
    """Share of the pixels that have a colour, or nearly (a GIF has few colours)."""
    return float((abs(np.asarray(image.convert("RGB")).astype(int) - color) < 6).all(-1).mean())


@pytest.fixture
def denoising() -> Denoising:
    return Denoising(TEXTS, [0] * 4 + list(range(1, len(TEXTS) - 3)), len(TEXTS) - 4)


def test_loss_curves(tmp_path: Path) -> None:
    curves = [
        LossCurve("ARM", [(1000 * i, 7 - i / 20) for i in range(50)], [(20_000, 6.2), (50_000, 4.8)]),
        LossCurve("MDM (upper bound)", [(1000 * i, 7.5 - i / 30) for i in range(50)], []),
    ]
    path = tmp_path / "losses.png"
    plot_losses(curves, "Two runs", path)
    image = Image.open(path)
    assert image.size[0] > 800 and share(image, (255, 255, 255)) > 0.5
    assert share(image, (31, 111, 180)) > 1e-4 and share(image, (217, 86, 11)) > 1e-4
    plot_losses([LossCurve("one step", [(10, 7.0)], [])], "Least", path)
    assert Image.open(path).size == image.size


def test_picture_of_a_denoising(tmp_path: Path, denoising: Denoising) -> None:
    path = tmp_path / "denoising.png"
    draw_denoising(denoising, "Tokens by step", path)
    image = Image.open(path).convert("RGB")
    width, height = image.size
    first, last = (
        image.crop((0, 0, width // 3, height // 2)),
        image.crop((2 * width // 3, height // 2, width, height - 62)),
    )
    assert share(first, GREY) > 0.2 and share(last, GREY) < 1e-3
    assert len(set(map(tuple, np.asarray(last).reshape(-1, 3)))) > 40  # a colour for every step


def test_animation_of_a_denoising(tmp_path: Path, denoising: Denoising) -> None:
    path = tmp_path / "denoising.gif"
    animate_denoising(denoising, path)
    with Image.open(path) as image:
        grey = []
        for frame in range(image.n_frames):
            image.seek(frame)
            grey.append(share(image, GREY))
    assert len(grey) == len(denoising.snapshots(60)) and grey[0] > 0.2 and grey[-1] < 1e-3
    assert all(after < before + 1e-3 for before, after in itertools.pairwise(grey))


def test_long_tokens_and_blank_lines_stay_on_the_picture(tmp_path: Path) -> None:
    odd = Denoising(["x" * 200, "\n", "\n", "\n", "", " ", "\u6f22", "\ufffd"], [0, 1, 1, 1, 2, 2, 3, 9], 3)
    draw_denoising(odd, "Odd", tmp_path / "odd.png", panels=4)
    assert Image.open(tmp_path / "odd.png").size[1] < 600


def test_short_count() -> None:
    assert [short_count(value) for value in (0, 950, 20_480, 1_228_800)] == ["0", "950", "20.5k", "1.23M"]
