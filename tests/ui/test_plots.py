"""Plots: they open, and what they say is in their pixels."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lit_gpt.ui.plots import LossCurve, format_count, plot_losses
from tests.support.images import share_of_color


def test_loss_curves(tmp_path: Path) -> None:
    curves = [
        LossCurve("ARM", [(1000 * i, 7 - i / 20) for i in range(50)], [(20_000, 6.2), (50_000, 4.8)]),
        LossCurve("MDM (upper bound)", [(1000 * i, 7.5 - i / 30) for i in range(50)], []),
    ]
    path = tmp_path / "losses.png"
    plot_losses(curves, "Two runs", path)
    image = Image.open(path)
    assert image.size[0] > 800 and share_of_color(image, (255, 255, 255)) > 0.5
    assert share_of_color(image, (31, 111, 180)) > 1e-4 and share_of_color(image, (217, 86, 11)) > 1e-4
    plot_losses([LossCurve("one step", [(10, 7.0)], [])], "Least", path)
    assert Image.open(path).size == image.size


def test_format_count() -> None:
    assert [format_count(value) for value in (0, 950, 20_480, 1_228_800)] == ["0", "950", "20.5k", "1.23M"]
