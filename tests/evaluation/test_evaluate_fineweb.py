"""The temporal evaluation by its real script: packed tokens and old lists, both kinds of model, resuming, processes."""

from __future__ import annotations

import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_gpt.checkpoints.export import WeightsRecord, export_weights
from lit_gpt.config import Config
from lit_gpt.data.packed_format import PackedDatasetBuilder
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT

ROOT = Path(__file__).resolve().parents[2]
LENGTH, ROWS = 16, 6
TINY = Config("tiny", 2, 2, 32, 64, 2, block_size=LENGTH, vocab_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models, and the same tokens packed and as an old list."""
    folder = tmp_path_factory.mktemp("fineweb")
    for kind, model_class in (("arm", GPT), ("mdm", TransEncoder)):
        model = model_class(TINY)
        model.init_weights(7)
        with torch.no_grad():
            model.transformer.wte.weight.mul_(6)
        export_weights(folder, kind, model.state_dict(), WeightsRecord(kind, TINY))
    (folder / "new").mkdir()
    builder = PackedDatasetBuilder(folder / "new", "validation", chunk_size=LENGTH * 4, sep_token=1, vocab_size=60)
    builder.add_array(tokens())
    builder.write_reminder()
    (folder / "old.pkl").write_bytes(pickle.dumps(tokens().tolist()))
    return folder


def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(2, 60, size=LENGTH * ROWS)


def evaluate(folder: Path, *words: str, code: int = 0, processes: int = 1) -> str:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29573"]
    done = subprocess.run(
        [*launch, str(ROOT / "evaluate_fineweb.py"), "--data-dir", str(folder), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(folder)},
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def perplexity(out: str) -> float:
    return float(out.strip().splitlines()[-1].rpartition("ppl=")[2])


def test_an_arm_by_hand_from_both_files(folder):
    model = GPT(TINY)
    model.init_weights(7)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(6)
        rows = torch.from_numpy(tokens()).view(ROWS, LENGTH)
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    words = ("--type", "arm", "--ckpt-path", str(folder / "arm.safetensors"))
    out = evaluate(folder, *words, "--fineweb", "new", "--cache", "off")
    assert perplexity(out) == pytest.approx(math.exp(float(loss)), rel=1e-4)
    assert out.splitlines()[-1].startswith(f"{folder / 'arm.safetensors'}, new, ppl=")
    assert perplexity(evaluate(folder, *words, "--fineweb", "old", "--cache", "off")) == pytest.approx(perplexity(out))


def test_an_mdm_by_both_estimators_processes_and_resuming(folder):
    words = ("--type", "mdm", "--ckpt_path", str(folder / "mdm.safetensors"), "--fineweb", "new", "--mc-samples", "512")
    cache = ("--cache", str(folder / "cache"))
    first = evaluate(folder, *words, *cache, "--rows", "3")
    whole = evaluate(folder, *words, *cache)
    assert re.search(r", 6 rows$\nthe rows' standard deviation 0\.\d{5} nats per token$", whole, re.MULTILINE)
    assert "3 of 6 rows were there already" in whole and "bound, mc with 512 samples, seed 1234" in whole
    assert perplexity(first) != perplexity(whole)
    two = evaluate(folder, *words, "--cache", "off", "--batch-size", "3", processes=2)
    assert perplexity(two) == pytest.approx(perplexity(whole), rel=1e-5)
    exact = evaluate(folder, *words, "--cache", "off", "--estimator", "exact")
    # The same bound but for eps; its two estimates differ by no more than their noise.
    assert perplexity(exact) == pytest.approx(perplexity(whole), rel=0.03)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--type", "mdm", "--fineweb", "nosuch"), "make the first with scripts/prepare_fineweb.py"),
        (("--type", "diffusion"), "--type diffusion: choose arm or mdm"),
        (("--type", "mdm", "--estimator", "chain_rule"), "--estimator chain_rule: choose mc or exact"),
        (("--type", "arm"), "an autoregressive model (arm) was asked for"),
        (("--type", "mdm", "--mc-samples", "0"), "--mc_samples 0: expected at least 1"),
    ],
)
def test_mistakes_are_one_line(folder, words, message):
    err = evaluate(folder, "--ckpt-path", str(folder / "mdm.safetensors"), *words, code=2)
    assert message in err and len(err.strip().splitlines()) == 1
