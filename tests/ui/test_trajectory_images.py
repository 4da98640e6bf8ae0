"""Images of a trajectory: they open, and what they say is in their pixels."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_gpt.files import SaveError
from lit_gpt.ui.trajectory import DenoisingTrajectory
from lit_gpt.ui.trajectory_images import animate_trajectory, draw_trajectory
from tests.support.images import share_of_color

TEXTS = ["GRE", "MIO", ":", "\n", *(f" word{i}" if i % 7 else "\n" for i in range(1, 60))]
GREY = (206, 206, 206)


@pytest.fixture
def trajectory() -> DenoisingTrajectory:
    return DenoisingTrajectory(TEXTS, [0] * 4 + list(range(1, len(TEXTS) - 3)), len(TEXTS) - 4)


def test_image_of_a_trajectory(tmp_path: Path, trajectory: DenoisingTrajectory) -> None:
    path = tmp_path / "trajectory.png"
    draw_trajectory(trajectory, "Tokens by step", path)
    image = Image.open(path).convert("RGB")
    width, height = image.size
    first, last = (
        image.crop((0, 0, width // 3, height // 2)),
        image.crop((2 * width // 3, height // 2, width, height - 62)),
    )
    assert share_of_color(first, GREY) > 0.2 and share_of_color(last, GREY) < 1e-3
    assert len(set(map(tuple, np.asarray(last).reshape(-1, 3)))) > 40  # a colour for every step


def test_animation_of_a_trajectory(tmp_path: Path, trajectory: DenoisingTrajectory) -> None:
    path = tmp_path / "trajectory.gif"
    animate_trajectory(trajectory, path)
    with Image.open(path) as image:
        grey = []
        for frame in range(image.n_frames):
            image.seek(frame)
            grey.append(share_of_color(image, GREY))
    assert len(grey) == len(trajectory.select_steps(60)) and grey[0] > 0.2 and grey[-1] < 1e-3
    assert all(after < before + 1e-3 for before, after in itertools.pairwise(grey))


@pytest.mark.parametrize("texts", [["ab", " cd", "\n", " e"], [" word"] * 80, ["a"], ["a", "\n"]])
def test_an_animation_has_no_blank_margin(tmp_path: Path, texts: list[str]) -> None:
    """On every side, what is drawn on any frame comes within a few pixels of the edge."""
    animate_trajectory(DenoisingTrajectory(texts, list(range(1, len(texts) + 1)), len(texts)), tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        drawn = np.zeros((image.height, image.width), bool)
        for frame in range(image.n_frames):
            image.seek(frame)
            drawn |= (np.asarray(image.convert("RGB")) != 255).any(axis=2)
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    margins = rows[0], drawn.shape[0] - 1 - rows[-1], columns[0], drawn.shape[1] - 1 - columns[-1]
    assert max(margins) <= (60 if len(texts) == 80 else 16), margins


def test_long_tokens_and_blank_lines_stay_on_the_picture(tmp_path: Path) -> None:
    odd = DenoisingTrajectory(["x" * 200, "\n", "\n", "\n", "", " ", "\u6f22", "\ufffd"], [0, 1, 1, 1, 2, 2, 3, 9], 3)
    draw_trajectory(odd, "Odd", tmp_path / "odd.png", panels=4)
    assert Image.open(tmp_path / "odd.png").size[1] < 600


@pytest.mark.parametrize("name", ["full.png", "full.gif"])
def test_a_full_disk_is_named_with_the_file(tmp_path: Path, trajectory: DenoisingTrajectory, monkeypatch, name) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match=f"cannot write .*{name}: No space left on device"):
        if name.endswith("png"):
            draw_trajectory(trajectory, "Tokens by step", tmp_path / name)
        else:
            animate_trajectory(trajectory, tmp_path / name)
    assert not list(tmp_path.iterdir())
