"""An ARM's answers to a question: the context is read once, and the numbers are those of whole rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lit_gpt.config import Config
from lit_gpt.likelihood.loglikelihood import LikelihoodRequest, arm_likelihoods
from lit_gpt.likelihood.scoring import ScoringModel
from lit_gpt.likelihood.shared_context import SharedContext, answers_of_a_batch, score_answers
from lit_gpt.model.causal import GPT
from tests.support.gpus import DEVICES
from tests.support.out_of_memory import OUT_OF_MEMORY
from tests.support.small_models import scaled_model

TINY = Config("tiny", 3, 4, 32, 64, 2, block_size=64, vocab_size=50)


def multiple_choice(questions: int = 6) -> list[LikelihoodRequest]:
    """Four answers of 1 to 8 tokens to each question, one of them given twice, and a text of its own."""
    draw = np.random.default_rng(4)
    requests = [LikelihoodRequest((1,), (5, 6, 7)), LikelihoodRequest((1,), (5, 8))]
    for _ in range(questions):
        context = tuple(draw.integers(1, 50, size=draw.integers(2, 30)).tolist())
        answers = [tuple(draw.integers(1, 50, size=draw.integers(1, 9)).tolist()) for _ in range(4)]
        requests += [LikelihoodRequest(context, answer) for answer in [*answers, answers[0]]]
    requests += [LikelihoodRequest((9, 9, 9), (answer,)) for answer in (2, 3)]
    draw.shuffle(requests)  # type: ignore[arg-type]
    return requests


def watched(model: GPT) -> tuple[GPT, list[int]]:
    """The model, and the tokens of each of its passes, padding included."""
    read: list[int] = []
    inner = model.hidden_states

    def hidden_states(input_ids, *args, **kwargs):
        read.append(input_ids.numel())
        return inner(input_ids, *args, **kwargs)

    model.hidden_states = hidden_states
    return model, read


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_tokens", [10**6, 100, 1])
def test_the_numbers_are_those_of_whole_rows(device: str, max_tokens: int):
    model, requests = scaled_model(GPT, TINY, 5).to(device), multiple_choice()
    whole = dataclasses.replace(ScoringModel.of(model, 10**6), network=None)
    expected = dict(arm_likelihoods(whole, requests))
    found = dict(arm_likelihoods(ScoringModel.of(model, max_tokens), requests))
    assert sorted(found) == list(range(len(requests)))
    for number, request in enumerate(requests):
        assert abs(found[number].nll - expected[number].nll) < 1e-5 * len(request.target)
        assert found[number].is_greedy == expected[number].is_greedy


def test_what_greedy_decoding_gives_is_recognised():
    model, context = scaled_model(GPT, TINY, 5), (3, 1, 4, 1, 5)
    ids = list(context)
    for _ in range(4):
        ids.append(int(model(torch.tensor([ids]))[0, -1, : TINY.vocab_size].argmax()))
    written = tuple(ids[len(context) :])
    requests = [
        LikelihoodRequest(context, written),
        LikelihoodRequest(context, (*written[:-1], (written[-1] + 1) % 50)),
    ]
    requests.append(LikelihoodRequest(context, written[:1]))
    found = dict(arm_likelihoods(ScoringModel.of(model, 10**6), requests))
    assert [found[number].is_greedy for number in range(3)] == [True, False, True]


def test_a_context_is_read_once():
    model, read = watched(scaled_model(GPT, TINY, 5))
    context = tuple(range(1, 31))
    requests = [LikelihoodRequest(context, (answer, 7, 8, 9)) for answer in (2, 3, 4, 5)]
    list(arm_likelihoods(ScoringModel.of(model, 10**6), requests))
    # Three tokens of each answer: nobody looks at what follows the last.
    assert read == [30, 4 * 3]
    read.clear()
    list(
        arm_likelihoods(ScoringModel.of(model, 10**6), [LikelihoodRequest(context, (answer,)) for answer in (2, 3, 4)])
    )
    # Answers of one token need nothing but the context.
    assert read == [30]


@pytest.mark.parametrize("tokens", [300, 280, 250, 100])
def test_answers_stay_together_however_many_rounds_there_are(tokens: int):
    """Contexts of one length, answers of two: sorted by length alone, the answers of a question would part."""
    model, read = watched(scaled_model(GPT, TINY, 5))
    contexts = [(number, *range(1, 30)) for number in range(1, 13)]
    requests = [LikelihoodRequest(context, (5,) * length) for length in (20, 2) for context in contexts]
    found = arm_likelihoods(dataclasses.replace(ScoringModel.of(model, 120), tokens_per_result=tokens), requests)
    assert sorted(number for number, _ in found) == list(range(24))
    whole_rows = sum(30 + len(request.target) - 1 for request in requests)
    assert sum(read) == 12 * (30 + 2 * 19) < whole_rows + 12 * 18


@pytest.mark.parametrize(
    ("prefix", "lengths", "max_tokens", "most"),
    [
        pytest.param((1,), [10] * 40, 1000, 60, id="texts that share one token are no answers"),
        pytest.param((1, 2, 3), [2, 3] * 100, 2, 250, id="more answers than 64 batches hold"),
    ],
)
def test_rounds_are_bounded_where_all_requests_share_a_prefix(
    prefix: tuple[int, ...], lengths: list[int], max_tokens: int, most: int
):
    model, read = watched(scaled_model(GPT, TINY, 5))
    between = []
    scoring_model = dataclasses.replace(ScoringModel.of(model, max_tokens), tokens_per_result=50)
    for _ in arm_likelihoods(
        scoring_model,
        [LikelihoodRequest(prefix, (number % 50,) * length) for number, length in enumerate(lengths)],
    ):
        between.append(sum(read))
        read.clear()
    assert len(between) == len(lengths) and sum(between) > 3 * most > 3 * max(between)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_what_does_not_fit_is_read_in_parts(error: RuntimeError):
    model = scaled_model(GPT, TINY, 5)
    questions = [SharedContext((1, 2, number), ((4, 5, 6), (7, 8), (9,))) for number in range(5)]
    expected = list(score_answers(model, questions, 10**6))
    inner, most = model.hidden_states, [9]

    def small_memory(input_ids, *args, **kwargs):
        if input_ids.numel() > most[0]:
            raise error
        return inner(input_ids, *args, **kwargs)

    model.hidden_states = small_memory
    for most[0] in (9, 4):
        found = list(score_answers(model, questions, 10**6))
        assert [number for number, _ in found] == list(range(5))
        for (_, one), (_, other) in zip(found, expected, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a.nll, b.nll, rtol=0, atol=1e-5)
                assert a.best_ids.equal(b.best_ids)
    most[0] = 2
    with pytest.raises(ValueError, match="a row of 5 tokens does not fit into the memory of cpu"):
        list(score_answers(model, questions, 10**6))
    error = RuntimeError("another error")
    with pytest.raises(RuntimeError, match="another error"):
        list(score_answers(model, questions, 10**6))


def test_many_answers_are_several_batches():
    answers = [(number, number) for number in range(1, 40)]
    parts = list(answers_of_a_batch((1, 2, 3), answers, 20))
    assert [answer for part in parts for answer in part.answers] == answers
    assert all(part.tokens() <= 20 for part in parts) and len(parts) < 10
    assert len(list(answers_of_a_batch((1, 2, 3), answers, 1))) == 39
