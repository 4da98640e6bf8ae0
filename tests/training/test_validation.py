"""The validation loss's standard errors: against repeated experiments, and the same however the work is cut up."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lit_gpt.training import validation
from tests.support.training_runs import make_packed_data, run_pretraining, run_pretraining_process


def test_the_spread_over_sequences_is_that_of_repeated_texts():
    """Over 4000 texts of 30 sequences of several lengths, the errors' mean square is the variance of the losses."""
    generator = torch.Generator().manual_seed(1)
    losses, squares = [], []
    for _ in range(4000):
        sizes = torch.randint(5, 50, (30,), generator=generator).double()
        nats = sizes * (3 + torch.randn(30, generator=generator, dtype=torch.float64)) + torch.randn(
            30, generator=generator, dtype=torch.float64
        )
        losses.append(float(nats.sum() / sizes.sum()))
        squares.append(validation.ratio_standard_error(nats, sizes) ** 2)
    variance = torch.tensor(losses, dtype=torch.float64).var().item()
    assert sum(squares) / len(squares) == pytest.approx(variance, rel=0.1)
    assert validation.ratio_standard_error(nats[:1], sizes[:1]) is None


@pytest.mark.parametrize("interaction", [0.0, 1.0])
def test_the_draws_error_is_that_of_repeated_noise_on_one_text(interaction):
    """Unbiased where sequences and strata add up, whatever their variances; from above where they do not."""
    generator = torch.Generator().manual_seed(2)
    draws, count, repeats = 4, 12, 3000
    tokens = torch.full((count,), 20.0, dtype=torch.float64)
    means = 20 * (3 + torch.randn(1, count, generator=generator) + torch.arange(draws)[:, None])
    means = (means + interaction * 20 * torch.randn(draws, count, generator=generator)).double()
    spread = torch.tensor([30.0, 8.0, 3.0, 1.0])[:, None].double()
    nats = means + spread * torch.randn(repeats, draws, count, generator=generator, dtype=torch.float64)
    variance = (nats.mean(1).sum(1) / tokens.sum()).var().item()
    squares = [validation.draws_standard_error(one, tokens) ** 2 for one in nats]
    estimate = sum(squares) / repeats
    if interaction:
        assert estimate > 1.1 * variance
    else:
        assert estimate == pytest.approx(variance, rel=0.1)
    assert validation.draws_standard_error(nats[0, :1], tokens) is None
    assert validation.draws_standard_error(nats[0, :, :1], tokens[:1]) is None


@pytest.mark.parametrize(
    ("draws", "draws_se", "is_bound", "shown"),
    [
        (
            *(2, 0.0123, True),
            "val loss <= 5.0000 (standard error 0.0612), val ppl <= 148.41, bits per byte <= 2.1000; "
            "237 sequences, 2 draws each, whose own standard error is 0.0123; a bound",
        ),
        (
            *(1, None, True),
            "val loss <= 5.0000 (standard error 0.0612), val ppl <= 148.41, bits per byte <= 2.1000; "
            "237 sequences, 1 draw each; a bound",
        ),
        (
            *(1, 0.0, False),
            "val loss 5.0000 (standard error 0.0612), val ppl 148.41, bits per byte 2.1000; 237 sequences; a bound",
        ),
    ],
)
def test_the_line_of_a_validation(draws, draws_se, is_bound, shown):
    found = validation.Validation(5.0, 0.0612, draws_se, 2.1, 0.03, 237, draws, "a bound", is_bound)
    assert found.line() == shown


NAMES = ("val_loss", "val_loss_se", "val_loss_draws_se")


def result(folder):
    (path,) = folder.glob("workdir/*/*/run.json")
    return json.loads(path.read_text())["result"]


def test_the_errors_do_not_depend_on_batch_or_processes(tmp_path):
    flags = {"max_steps": 3, "val_samples": 7, "val_draws": 3}
    runs = {"one": (run_pretraining, {"micro_batch_size": 8}), "two": (run_pretraining_process, {"devices": 2})}
    found = {}
    for name, (start, extra) in runs.items():
        make_packed_data(tmp_path / name / "data")
        out, _ = start("train_mdm.py", tmp_path / name, **flags, **extra)
        found[name] = result(tmp_path / name)
        assert f"(standard error {found[name]['val_loss_se']:.4f})" in out
    for key in NAMES:
        assert found["one"][key] == pytest.approx(found["two"][key], rel=1e-5)
    assert 0 < found["one"]["val_loss_draws_se"] < found["one"]["val_loss"]


def test_an_exact_loss_has_the_error_of_the_text_alone(tmp_path):
    make_packed_data(tmp_path / "data")
    run_pretraining("train_ar.py", tmp_path, max_steps=3, val_samples=6)
    found = result(tmp_path)
    assert found["val_loss_draws_se"] == 0 and 0 < found["val_loss_se"] < found["val_loss"]
    assert found["val_bits_per_byte_se"] is None and math.isfinite(found["val_loss"])
