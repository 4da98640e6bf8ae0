"""Scoring of rows: the host works while the device computes, and what is not asked for is not computed."""

from __future__ import annotations

import pytest
import torch

from lit_gpt.likelihood.scoring import ScoringInput, ScoringModel, score_tokens
from tests.support.far_device import FarDevice

ROWS, LENGTH, VOCABULARY = 6, 4, 7


def rows() -> list[ScoringInput]:
    """Two requests of three rows each."""
    ids = torch.arange(1, 1 + ROWS * LENGTH).view(2, ROWS // 2, LENGTH)
    scored = torch.ones(ROWS // 2, LENGTH, dtype=torch.bool).triu()
    return [ScoringInput(part, scored, torch.arange(LENGTH)) for part in ids]


def table_logits(batch):
    """Logits that are a function of the token."""
    ids = batch.input_ids.flatten()[batch.indices]
    yield torch.sin(ids[:, None] * torch.arange(1, VOCABULARY + 1, device=ids.device))


def test_a_batch_is_started_before_the_one_before_it_is_fetched():
    wanted = score_tokens(ScoringModel(table_logits, 9, VOCABULARY, LENGTH), rows())
    waits_at_start = []
    with FarDevice() as far:

        def logits(batch):
            waits_at_start.append(len(far.waits))
            yield from table_logits(batch)

        found = score_tokens(ScoringModel(logits, 9, VOCABULARY, LENGTH, far.device), rows())
    # Batches of one row: the first two begin before anything is waited for, and each later one before the one in front of
    # it has been fetched, which is three waits: losses, likeliest tokens, their probabilities.
    assert waits_at_start == [0, 0, 3, 6, 9, 12]
    for own, other in zip(found, wanted, strict=True):
        for name in ("nll", "best_ids", "best_probability"):
            assert getattr(own, name).equal(getattr(other, name))


def test_likeliest_tokens_only_where_they_are_asked_for():
    model = ScoringModel(table_logits, 9, VOCABULARY, 2 * LENGTH)
    for with_best, without in zip(score_tokens(model, rows()), score_tokens(model, rows(), best=False), strict=True):
        assert without.nll.equal(with_best.nll) and with_best.best_probability.any()
        assert not without.best_probability.any()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_a_batch_ends_the_call(error: type[BaseException]):
    """What is raised arrives as it is, and the next call is unaffected."""
    calls = []

    def logits(batch):
        calls.append(len(batch.input_ids))
        if len(calls) == 2:
            raise error("the second batch")
        yield from table_logits(batch)

    model = ScoringModel(logits, 9, VOCABULARY, LENGTH)
    with pytest.raises(error, match="the second batch"):
        score_tokens(model, rows())
    assert len(calls) == 2
    assert score_tokens(model, rows())[0].nll.any()
