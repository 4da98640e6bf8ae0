"""Questions that are read until they are decided: the error rate against enumerated bounds, and what stays the same."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from lit_gpt.likelihood import decision
from lit_gpt.likelihood.decision import Question, QuestionResult, look_sizes, question_likelihoods, student_tail
from lit_gpt.likelihood.exact import ExactBound
from lit_gpt.likelihood.loglikelihood import LikelihoodRequest, LikelihoodSettings, mdm_likelihoods
from lit_gpt.likelihood.monte_carlo import MonteCarlo
from lit_gpt.likelihood.scoring import ScoringModel
from lit_gpt.model.logits import LogitsBatch
from lit_gpt.randomness import hash_tensor, uniform

WORDS, LENGTH = 6, 6
PLAIN = (1.0, 1.0, 1.0)
# 63 masks: more than the budget, so that looks are needed, and few enough to enumerate.
SETTINGS = LikelihoodSettings(ExactBound(62))


def toy_logits(batch: LogitsBatch):
    """Words that depend on their neighbours, and less on everything else, as hashes; a prefix of one token is a world."""
    rows, length = batch.indices // batch.input_ids.size(1), batch.input_ids.size(1)
    place = batch.indices % length
    whole = hash_tensor(torch.arange(length), batch.input_ids).sum(1)[rows, None]
    seen = batch.input_ids[rows]
    left, right = (seen.gather(1, (place + step).clamp(0, length - 1)[:, None]) for step in (-1, 1))
    word, here = torch.arange(WORDS), place[:, None]
    near = uniform(left, seen[:, :1], here, word) + uniform(right, seen[:, :1], here, word + WORDS)
    yield (4 * near + 2 * uniform(whole, here, word)).float()


MODEL = ScoringModel(toy_logits, WORDS + 1, WORDS, 200_000)


def bounds(requests: list[LikelihoodRequest]) -> list[float]:
    """The enumerated bounds."""
    found = dict(mdm_likelihoods(MODEL, requests, LikelihoodSettings(ExactBound(2**LENGTH))))
    return [found[number].nll for number in range(len(requests))]


@pytest.fixture(scope="module")
def close_questions() -> tuple[list[Question], list[list[float]]]:
    """Questions whose three answers are, of five, those with the closest bounds; and these bounds."""
    draw = random.Random(1)
    questions, truth = [], []
    for number in range(100):
        answers = [
            LikelihoodRequest((WORDS + 2 + number,), tuple(draw.randrange(WORDS) for _ in range(LENGTH)))
            for _ in range(5)
        ]
        found = sorted(zip(bounds(answers), answers, strict=True), key=lambda pair: pair[0])
        start = min(range(3), key=lambda n: found[n + 1][0] - found[n][0])
        chosen = found[start : start + 3]
        draw.shuffle(chosen)
        questions.append(Question(tuple(answer for _, answer in chosen), (PLAIN,)))
        truth.append([bound for bound, _ in chosen])
    return questions, truth


def all_of(questions: list[Question], settings: LikelihoodSettings, chance: float, model=MODEL) -> list[QuestionResult]:
    found = dict(question_likelihoods(model, questions, settings, chance))
    assert sorted(found) == list(range(len(questions)))
    return [found[number] for number in range(len(questions))]


def chosen(result: QuestionResult, rule: tuple[float, ...] = PLAIN) -> int:
    return int(np.argmin([one.nll / scale for one, scale in zip(result.likelihoods, rule, strict=True)]))


def check_reports(results: list[QuestionResult], truth: list[list[float]]) -> None:
    """Answers are dropped at different looks, within the budget, and standard errors are honest."""
    assert len({result.passes for result in results}) > 5
    assert all(10 < passes <= 62 for result in results for passes in result.passes)
    pairs = [
        (one.nll - exact, one.standard_error)
        for result, bound in zip(results, truth, strict=True)
        for one, exact in zip(result.likelihoods, bound, strict=True)
    ]
    errors, reported = np.square(pairs).mean(0)
    assert 0.5 * errors < reported < 2 * errors


@pytest.mark.parametrize("chance", [0.01, 0.3])
def test_decisions_are_wrong_more_seldom_than_stated(close_questions, chance):
    questions, truth = close_questions
    results = all_of(questions, SETTINGS, chance)
    if chance == 0.3:
        check_reports(results, truth)
    decided = [number for number, result in enumerate(results) if result.is_decided]
    wrong = sum(chosen(results[number]) != np.argmin(truth[number]) for number in decided)
    assert wrong <= chance * len(questions)
    # These questions are hard: at the budget, more are wrong than a decision may be.
    assert sum(chosen(result) != np.argmin(bound) for result, bound in zip(results, truth, strict=True)) > 10
    assert len(decided) > (25 if chance == 0.3 else 1)


@pytest.fixture
def drawn(monkeypatch):
    """Races whose replicates are drawn by a function of (answer, first, last), instead of being computed by a model."""
    monkeypatch.setattr(decision._Answer, "plan", lambda self, replicates, passes: None)
    request = LikelihoodRequest((1,), tuple(range(40)))

    def race(rules, chance: float, replicates):
        question = Question((request,) * len(rules[0]), rules)
        race = decision._Race(question, LikelihoodSettings(ExactBound(128)), chance)
        reads_after_the_end = 0
        while True:
            for answer in race.next:
                number = race._answers.index(answer)
                answer.values += replicates(number, len(answer.values), look_sizes(128)[race._look]).tolist()
            reads_after_the_end += race._is_settled
            if race.advance():
                return race.result([False] * len(rules[0])), reads_after_the_end

    return race


@pytest.mark.parametrize("skewed", [False, True])
def test_equal_bounds_are_decided_more_seldom_than_stated(drawn, skewed):
    """The worst case, where every decision may be called wrong."""
    draw = np.random.default_rng(3)

    def replicates(number: int, first: int, last: int):
        # A mean of four numbers of an exponential law is more skewed than a replicate of a model is.
        shape = (last - first, 4)
        return draw.exponential(1, shape).mean(1) if skewed else draw.normal(20, 1, shape[0])

    rules = ((1.0,) * 4, (20.0, 20.0, 20.0, 20.000001))
    results = [drawn(rules, 0.2, replicates)[0] for _ in range(600)]
    assert 0 < sum(result.is_decided for result in results) <= 0.2 * 600
    for result in results:
        assert not result.is_decided or chosen(result, rules[0]) == chosen(result, rules[1])


def test_equal_bounds_of_a_model_are_decided_more_seldom_than_stated(close_questions):
    """Divided by their bounds, all answers are alike."""
    ties = [Question(one.answers, (tuple(bound),)) for one, bound in zip(*close_questions, strict=True)]
    decided = sum(result.is_decided for result in all_of(ties, SETTINGS, 0.3))
    assert 0 < decided <= 0.3 * len(ties)


def test_one_look_at_two_answers_has_the_stated_error_rate(drawn, monkeypatch):
    """Where nothing is left of the union bound, the stated rate is the true one: the simulation can tell."""
    monkeypatch.setattr(decision, "_LAST_LOOK", 0.17)
    assert look_sizes(128) == [5, 31]
    draw = np.random.default_rng(4)
    results = [drawn(((1.0, 1.0),), 0.1, lambda _, first, last: draw.normal(20, 1, last - first)) for _ in range(2000)]
    # Of two answers with equal bounds, each is chosen with the stated chance.
    assert 0.17 < sum(result.is_decided for result, _ in results) / 2000 < 0.23


def test_the_answer_that_is_left_is_the_one_that_is_chosen(drawn):
    """The noise that answers share moves their means after one is out: where that one would be chosen, it is read on."""
    reads = 0
    for seed in range(100):
        draw = np.random.default_rng(seed)
        shared, own = draw.normal(200, 30, 31), draw.normal(0, 1, (3, 31))
        # The third answer is out at the first look, the second one is not.
        values = shared + own + np.array([[0], [0.7], [8]])
        result, more = drawn((PLAIN,), 0.2, lambda number, first, last, values=values: values[number, first:last])
        assert chosen(result) != 2
        assert not result.is_decided or chosen(result) == 0
        reads += more
    assert reads, "else this test sees nothing"


def test_a_result_does_not_depend_on_the_batch(close_questions):
    questions = close_questions[0][:20]
    together = all_of(questions, SETTINGS, 0.05)
    few = dataclasses.replace(MODEL, max_tokens=1, tokens_per_result=1)
    assert all_of(questions, SETTINGS, 0.05, few) == together
    assert all_of(questions[::-1], SETTINGS, 0.05) == together[::-1]


def test_every_rule_must_be_safe(close_questions):
    """As long as one of two rules is open, passes are spent."""
    questions, _ = close_questions
    results = all_of(questions[:30], SETTINGS, 0.1)
    number = next(n for n, one in enumerate(results) if one.is_decided and max(one.passes) < 40)
    first, second = questions[number].answers[:2], results[number].likelihoods[:2]
    plain = (1.0, 1.0)
    tie = (second[0].nll / second[1].nll, 1.0)
    one, same, opened = all_of(
        [Question(first, rules) for rules in ((plain,), (plain, plain), (plain, tie))], SETTINGS, 0.1
    )
    assert one.is_decided and sum(one.passes) <= sum(same.passes)
    assert not opened.is_decided and min(opened.passes) > max(one.passes)


def test_short_answers_are_exact_and_cost_all_masks():
    answers = tuple(LikelihoodRequest((50,), ids) for ids in ((1,), (2, 3), (1, 2, 3, 4)))
    (result,) = all_of([Question(answers, (PLAIN,))], SETTINGS, 0.01)
    assert result.is_decided and result.passes == (1, 3, 15)
    assert [one.standard_error for one in result.likelihoods] == [0.0] * 3
    assert [one.nll for one in result.likelihoods] == pytest.approx(bounds(list(answers)))


def test_what_stays_open_reads_all_masks_where_they_fit(close_questions):
    """With a budget of 63, an undecided answer of 6 tokens is exact at the end, and was read once under each mask."""
    settings = LikelihoodSettings(ExactBound(63))
    questions, truth = close_questions
    results = all_of(questions[:20], settings, 0.01)
    assert any(63 in result.passes for result in results)
    for result, bound in zip(results, truth, strict=False):
        for one, passes, exact in zip(result.likelihoods, result.passes, bound, strict=True):
            assert passes <= 63
            if passes == 63:
                assert (one.nll, one.standard_error) == (pytest.approx(exact), 0.0)


def test_equal_answers_end():
    answers = (LikelihoodRequest((50,), (1, 2, 3, 4, 5, 0)),) * 2
    (result,) = all_of([Question(answers, ((1.0, 1.0),))], SETTINGS, 0.01)
    assert result.likelihoods[0] == result.likelihoods[1] and not result.is_decided


def test_the_tail_of_students_t():
    """Quantiles of a printed table (one-sided 0.005; Abramowitz & Stegun, table 26.10)."""
    for freedom, quantile in {1: 63.657, 2: 9.925, 3: 5.841, 4: 4.604, 7: 3.499, 10: 3.169, 30: 2.750}.items():
        assert student_tail(quantile, freedom) == pytest.approx(0.005, rel=1e-3)
        assert student_tail(-quantile, freedom) == pytest.approx(0.995, rel=1e-3)


def test_looks_grow_and_spend_the_budget():
    assert look_sizes(128) == [5, 8, 12, 18, 31] and look_sizes(29) == [5, 7]
    for budget in range(29, 600, 7):
        sizes = look_sizes(budget)
        assert sizes == sorted(set(sizes)) and budget - 4 < 1 + 4 * sizes[-1] <= budget


@pytest.mark.parametrize(
    ("settings", "chance", "message"),
    [
        (SETTINGS, 0.0, "decide is 0"),
        (SETTINGS, 0.7, "decide is 0.7: .* less than 0.5"),
        (LikelihoodSettings(MonteCarlo(8)), 0.01, "needs nll_type=exact, not mc"),
        (LikelihoodSettings(ExactBound(28)), 0.01, "needs a budget of 29 or more, not 28"),
    ],
)
def test_settings_that_decide_nothing_are_refused(settings, chance, message):
    with pytest.raises(ValueError, match=message):
        list(question_likelihoods(MODEL, [], settings, chance))


def test_greedy_and_guidance_are_as_elsewhere(close_questions):
    settings = dataclasses.replace(SETTINGS, greedy=True, cfg_scale=0.5)
    questions = close_questions[0][:4]
    requests = [request for question in questions for request in question.answers]
    wanted = dict(mdm_likelihoods(MODEL, requests, dataclasses.replace(settings, estimator=ExactBound(63))))
    found = [one for result in all_of(questions, settings, 0.05) for one in result.likelihoods]
    for number, one in enumerate(found):
        assert one.is_greedy == wanted[number].is_greedy
        assert abs(one.nll - wanted[number].nll) < 6 * one.standard_error
