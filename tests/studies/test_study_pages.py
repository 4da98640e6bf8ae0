"""What studies say of differences: Holm's procedure over Student's t."""

from __future__ import annotations

import math
import random

import pytest

from lit_gpt.studies.guidance import guidance_verdict
from lit_gpt.studies.stochastic_lengths import LengthStudy, verdict
from lit_gpt.studies.study_pages import tell_apart


def test_holms_procedure() -> None:
    """Of three comparisons the smallest p-value must be below 0.05 / 3, the next one below 0.05 / 2, the last below 0.05."""

    def at(p_value: float) -> tuple[float, float, int]:
        # With one degree of freedom P(|T| > t) = 1 - 2 atan(t) / pi.
        return math.tan((1 - p_value) * math.pi / 2), 1.0, 1

    assert tell_apart([at(0.04), at(0.016), at(0.024)]) == [True, True, True]
    assert tell_apart([at(0.04), at(0.016), at(0.026)]) == [False, True, False]
    assert tell_apart([at(0.02), at(0.02), at(0.02)]) == [False, False, False]
    difference, error, freedom = at(0.001)
    assert tell_apart([(-difference, error, freedom), (0.0, 0.0, 5), (0.1, 0.0, 5)]) == [True, False, True]
    assert tell_apart([(1.0, math.nan, 5), (1.0, 0.1, 0)]) == [False, False]


def null_lengths(numbers: random.Random, seeds: int) -> LengthStudy:
    """Two kinds of models without any difference but that of runs (0.02 nats) and of the text (0.03 nats a block)."""
    lengths = [8, 16, 32, 64, 128]

    def model() -> dict[str, list[list[float]]]:
        run = numbers.gauss(0, 0.02)
        losses = [[5 + run + numbers.gauss(0, 0.03) for _ in range(32)] for _ in lengths]
        return {"loss": losses, "correct": [[0.0, 0.0]] * 5, "nll": [[0.0, 0.0]] * 5}

    return LengthStudy(lengths, {}, {name: [model() for _ in range(seeds)] for name in ("plain", "cut")}, "plain", "no")


@pytest.mark.parametrize("seeds", [2, 3])
def test_lengths_without_an_effect_are_told_apart_in_at_most_a_twentieth_of_studies(seeds: int) -> None:
    numbers = random.Random(1)
    said = [verdict(null_lengths(numbers, seeds), "cut") for _ in range(100)]
    assert sum("better" in one or "worse" in one for one in said) <= 10


def test_one_run_of_each_kind_says_nothing_about_runs() -> None:
    assert "not tested" in verdict(null_lengths(random.Random(1), 1), "cut")


def test_guidance_without_an_effect_is_told_apart_in_at_most_a_twentieth_of_studies() -> None:
    numbers, alarms = random.Random(1), 0
    for _ in range(100):
        found = {
            scale: {name: [numbers.gauss(0, 1) for _ in range(64)] for name in ("lines", "correct", "loss", "words")}
            for scale in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
        }
        said = guidance_verdict(found)
        alarms += "better" in said or "worse" in said
    assert alarms <= 10
