"""Budget to steps and step to learning rate, against the published values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_gpt.config import Config
from lit_gpt.training import schedule

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "data_and_schedule.json").read_text())["schedule"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['script']}-{case['model']}-{case['flops']}")
def test_golden_steps_and_rates(case):
    config = Config.from_name(case["model"])
    length = schedule.mean_random_length(config.block_size, case.get("ssl_ratio", 0.0))
    steps = schedule.budget_steps(case["flops"], config.size_in_millions, case["batch_size"], length)
    warmup = schedule.default_warmup(steps)
    assert (steps, warmup) == (case["max_step"], case["warmup_steps"])
    for step, expected in case["lr_at_step"].items():
        assert schedule.learning_rate(int(step), steps, warmup, 2e-4, 2e-5) == pytest.approx(
            expected, rel=2e-8, abs=1e-15
        )


def test_budget_and_steps_are_inverse():
    flops = schedule.budget_flops(1234, 6.294784, 256, 2048)
    assert schedule.budget_steps(flops * (1 + 1e-12), 6.294784, 256, 2048) == 1234


def test_budget_too_small_says_the_price_of_a_step():
    with pytest.raises(ValueError, match=r"--flops 1e-09 .* which costs 1.98e-05"):
        schedule.budget_steps(1e-9, 6.294784, 256, 2048)


def test_an_extended_run_rises_to_the_cosine_of_all_its_steps():
    rates = [schedule.learning_rate(step, 400, 50, 1.0, 0.1, extended_from=200) for step in range(1, 401)]
    plain = [schedule.learning_rate(step, 400, 50, 1.0, 0.1) for step in range(1, 401)]
    assert rates[:200] == plain[:200] and rates[249:] == plain[249:]
    assert rates[200] == pytest.approx(0.1 + 0.9 / 50)
    assert all(after - before < 0.9 / 50 + 1e-12 for before, after in zip(rates[200:], rates[201:], strict=False))


def test_rate_stays_at_the_floor_beyond_the_end():
    assert schedule.learning_rate(2000, 1000, 10, 1.0, 0.1) == 0.1


def test_rows_grow_at_their_steps():
    pairs = schedule.parse_row_lengths(["16:300", "32:600"])
    assert [schedule.row_length(step, pairs, 128) for step in (0, 299, 300, 599, 600)] == [16, 16, 32, 32, 128]


@pytest.mark.parametrize("words", [["16"], ["16:x"], ["0:5"], ["16:300", "16:600"], ["32:600", "64:600"]])
def test_row_lengths_that_mean_nothing_are_refused(words):
    with pytest.raises(ValueError, match="--row_lengths"):
        schedule.parse_row_lengths(words)
