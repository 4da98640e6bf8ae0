"""The quickstart as a user starts it, on a small text with few steps: everything it promises is there and is right."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_gpt.checkpoints.tokenizer_lookup import open_tokenizer
from lit_gpt.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "data" / "tinyshakespeare" / "input.txt"
TINY = {
    "steps": 6, "batch_size": 4, "block_size": 32, "vocab_size": 400, "n_layer": 1, "n_head": 2, "n_embd": 32,
    "intermediate_size": 64, "val_draws": 2, "sampling_steps": 12,
}  # fmt: skip


def quickstart(folder: Path, **flags: object) -> subprocess.CompletedProcess[str]:
    """Run it in `folder`, with one thread."""
    values = {"text": folder / "text.txt", **TINY, **flags}
    command = [sys.executable, str(ROOT / "scripts" / "quickstart.py"), *(f"--{k}={v}" for k, v in values.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which the quickstart has run, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "text.txt").write_text(CORPUS.read_text()[:40_000])
    process = quickstart(folder)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder, process.stdout


def test_numbers_are_reported(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    models = json.loads((folder / "quickstart" / "summary.json").read_text())["models"]
    assert models["arm"]["val_is_bound"] is False and models["mdm"]["val_is_bound"] is True
    assert models["arm"]["total_tokens"] == models["mdm"]["total_tokens"] == 6 * 4 * 32
    validation = (folder / "quickstart" / "text" / "validation.txt").read_bytes()
    for result in models.values():
        # Untrained models are near the uniform distribution; a byte holds fewer bits than 8.
        assert 0.5 * math.log(400) < result["val_loss"] < 1.3 * math.log(400)
        assert result["val_ppl"] == pytest.approx(math.exp(result["val_loss"]))
        tokens = result["val_samples"] * 32
        assert result["val_bits_per_byte"] > result["val_loss"] * tokens / math.log(2) / len(validation) * 0.99
        assert result["val_bits_per_byte"] < 8
        assert f"{result['val_loss']:.3f}" in printed and f"{result['val_bits_per_byte']:.3f}" in printed
        held = open_tokenizer(str(folder / result["export"]))
        assert held.contents == Tokenizer(folder / "quickstart" / "tokenizer").contents
        assert 0.05 < result["peak_memory_gb"] < 3
    assert f"<= {models['mdm']['val_loss']:.3f}" in printed


def test_the_split_is_by_position_and_loses_nothing(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    train, validation = (
        (folder / "quickstart" / "text" / f"{name}.txt").read_text() for name in ("train", "validation")
    )
    text = (folder / "text.txt").read_text()
    assert train + validation == text and train.endswith("\n\n")
    assert 0.05 < len(validation) / len(text) < 0.11


def test_pictures_open(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    for name in ("losses.png", "denoising.png"):
        image = np.asarray(Image.open(folder / "quickstart" / name).convert("RGB"))
        assert image.shape[0] > 200 and image.shape[1] > 500 and image.std() > 5
    with Image.open(folder / "quickstart" / "denoising.gif") as image:
        assert image.n_frames > 3


def test_text_emerges_from_masks(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    samples = json.loads((folder / "quickstart" / "summary.json").read_text())["samples"]
    prompt = samples["prompt"]
    assert (folder / "quickstart" / "text" / "validation.txt").read_text().startswith(prompt)
    assert all(text.startswith(prompt) and len(text) > len(prompt) for text in samples["texts"].values())
    written = (folder / "quickstart" / "samples.txt").read_text()
    assert all(text in written for text in samples["texts"].values())
    snapshots = printed.split("--- after step ")[1:]
    masked = [snapshot.split("\n", 1)[1].split("Validation at")[0].count("__") for snapshot in snapshots]
    assert len(masked) > 3 and masked[0] > 15 and masked[-1] == 0 and masked == sorted(masked, reverse=True)


def test_it_ends_with_what_to_type_next(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    following = printed.split("Next:")[1]
    assert "scripts/info.py" in following and "pretrain/train_mdm.py" in following
    for line in printed.split("Validation at")[1].split("\n"):
        if line.startswith("  quickstart/"):
            assert (folder / line.split()[0]).exists()


def test_another_recipe_trains_the_mdm_anew_at_the_same_compute(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    copy = folder / "copy"
    shutil.copytree(folder / "quickstart", copy)
    process = quickstart(folder, out=copy, recipe="best", steps=TINY["steps"])
    assert process.returncode == 0, process.stdout + process.stderr
    # The text, the tokenizer, the tokens and the ARM are there.
    assert process.stdout.count("done before") == 4
    mdm = json.loads((copy / "summary.json").read_text())["models"]["mdm"]
    assert (mdm["step"], mdm["total_tokens"], mdm["val_is_bound"]) == (2 * 6, 6 * 4 * 32, True)
    settings = json.loads(next((copy / "mdm" / "run").glob("*/run.json")).read_text())["settings"]
    assert settings["loss_weight"] == "cross_entropy" and settings["row_lengths"] == [[4, 3], [8, 6], [16, 9]]


def test_a_second_run_has_nothing_to_do(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = (folder / "quickstart" / "losses.png").stat().st_mtime_ns
    process = quickstart(folder)
    assert process.returncode == 0 and process.stdout.count("done before") == 6
    assert "step 6" not in process.stdout and (folder / "quickstart" / "losses.png").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"text": "missing.txt"}, "missing.txt: no such file"),
        ({"vocab_size": 100_000, "out": "other"}, "train_tokenizer.py: --vocab_size 100000 does not fit this text"),
        ({"steps": 0}, "--steps 0"),
        ({"recipe": "secret"}, "--recipe secret: expected published, "),
    ],
)
def test_mistakes_end_in_one_line(finished: tuple[Path, str], flags: dict[str, object], words: str) -> None:
    folder, _ = finished
    process = quickstart(folder, **flags)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: ") and words in process.stderr
