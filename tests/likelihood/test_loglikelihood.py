"""Likelihoods: the original's numbers, the bound's law by enumeration, unbiased draws, and independence of the batch."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_gpt.config import Config
from lit_gpt.likelihood.chain_rule import ChainRule
from lit_gpt.likelihood.estimators import ESTIMATORS, make_estimator
from lit_gpt.likelihood.exact import ExactBound, permutation_masks, systematic_sizes
from lit_gpt.likelihood.loglikelihood import (
    Likelihood,
    LikelihoodRequest,
    LikelihoodSettings,
    NotFiniteError,
    arm_likelihoods,
    masking_plan,
    mdm_likelihoods,
)
from lit_gpt.likelihood.monte_carlo import MonteCarlo
from lit_gpt.likelihood.plan import Estimator, MaskingPlan
from lit_gpt.likelihood.scoring import ScoringModel
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.model.logits import LogitsBatch, LogitsFn, model_logits
from lit_gpt.randomness import uniform
from tests.golden.weights import golden_cases, golden_model, golden_tokens
from tests.support.gpus import DEVICES
from tests.support.out_of_memory import OUT_OF_MEMORY
from tests.support.small_models import scaled_model

GOLDEN = golden_cases()
TINY = Config("tiny", 2, 2, 32, 64, 2, block_size=64, vocab_size=50)


def all_of(results) -> list[Likelihood]:
    """Results in the order of the requests."""
    found = dict(results)
    assert sorted(found) == list(range(len(found)))
    return [found[number] for number in range(len(found))]


def one(model, request: LikelihoodRequest, settings: LikelihoodSettings) -> Likelihood:
    return all_of(mdm_likelihoods(ScoringModel.of(model, 4096), [request], settings))[0]


def tiny(kind: type, seed: int = 5):
    return scaled_model(kind, TINY, seed)


def golden_request(case: dict) -> LikelihoodRequest:
    ids = golden_tokens(case["prefix_len"] + case["target_len"], case["tokens_seed"])
    return LikelihoodRequest(tuple(ids[: case["prefix_len"]]), tuple(ids[case["prefix_len"] :]))


# Golden


@pytest.fixture(scope="module", params=DEVICES)
def golden_mdm(request: pytest.FixtureRequest) -> TransEncoder:
    return golden_model(TransEncoder, GOLDEN["likelihood"]["weights_seed"]).to(request.param)


CASES = GOLDEN["likelihood"]["cases"]


@pytest.mark.parametrize("case", [case for case in CASES if "chain_rule_nll" in case], ids=str)
def test_golden_chain_rule_and_greedy(golden_mdm: TransEncoder, case: dict):
    request = golden_request(case)
    settings = LikelihoodSettings(ChainRule(), cfg_scale=case["cfg"], greedy=True)
    result = one(golden_mdm, request, settings)
    assert result.nll == pytest.approx(case["chain_rule_nll"], rel=1e-4)
    assert result.standard_error == 0
    assert result.is_greedy == (list(request.target) == case["greedy"])
    # A target that is what greedy decoding gives is recognised as such.
    assert one(golden_mdm, LikelihoodRequest(request.prefix, tuple(case["greedy"])), settings).is_greedy


@pytest.mark.parametrize("case", [case for case in CASES if "exact_elbo" in case], ids=str)
def test_golden_bound(golden_mdm: TransEncoder, case: dict):
    request = golden_request(case)
    exact = one(golden_mdm, request, LikelihoodSettings(ExactBound(2 ** len(request.target)), cfg_scale=case["cfg"]))
    assert exact.nll == pytest.approx(case["exact_elbo"], rel=1e-4)
    assert exact.standard_error == 0


def test_golden_padding(golden_mdm: TransEncoder):
    (case,) = GOLDEN["likelihood_padded"]["cases"]
    result = one(golden_mdm, golden_request(case), LikelihoodSettings(ChainRule(), pad_to=2048))
    assert result.nll == pytest.approx(case["chain_rule_nll"], rel=1e-4)


# Law: a toy whose cross-entropies are a table


LENGTH = 5


def table_logits(seed: int = 1) -> LogitsFn:
    """Logits of three words that depend on which tokens are masked and on the position, as a table of random numbers."""
    table = np.random.default_rng(seed).normal(0, 1.5, size=(2**LENGTH, LENGTH, 3))

    def logits(batch):
        masked = (batch.input_ids == 3)[:, -LENGTH:]
        numbers = (masked * 2 ** torch.arange(LENGTH)).sum(1)
        everything = torch.tensor(table[numbers.numpy()]).float()
        yield everything.flatten(0, 1)[batch.indices]

    return logits


def all_masked_batch() -> LogitsBatch:
    """The target's places, all of them masked and wanted."""
    return LogitsBatch(torch.full((1, LENGTH), 3), None, torch.zeros(1, LENGTH, dtype=torch.bool), torch.arange(LENGTH))


def brute_force(logits_fn: LogitsFn, target: tuple[int, ...]) -> float:
    """sum over k of (1/k) E over masks of k tokens of the masked tokens' cross-entropies, term by term."""
    total = 0.0
    for k in range(1, LENGTH + 1):
        sums = []
        for chosen in itertools.combinations(range(LENGTH), k):
            ids = torch.tensor(target)
            ids[list(chosen)] = 3
            batch = LogitsBatch(ids[None], None, torch.zeros(1, LENGTH, dtype=torch.bool), torch.tensor(chosen))
            log_p = next(logits_fn(batch)).log_softmax(1)
            sums.append(-sum(float(log_p[i, target[position]]) for i, position in enumerate(chosen)))
        total += float(np.mean(sums)) / k
    return total


TARGET = (0, 2, 1, 1, 0)


def toy(settings: LikelihoodSettings, prefix: tuple[int, ...] = ()) -> Likelihood:
    scoring_model = ScoringModel(table_logits(), 3, 3, 4096)
    return all_of(mdm_likelihoods(scoring_model, [LikelihoodRequest(prefix, TARGET)], settings))[0]


def test_the_exact_bound_is_the_sum_over_all_masks():
    result = toy(LikelihoodSettings(ExactBound(31)))
    assert result.nll == pytest.approx(brute_force(table_logits(), TARGET), rel=1e-6)
    assert result.standard_error == 0


@pytest.mark.parametrize(
    "settings",
    [LikelihoodSettings(MonteCarlo(16)), *(LikelihoodSettings(ExactBound(n)) for n in (2, 3, 5, 9, 14, 30))],
    ids=str,
)
def test_draws_are_unbiased(settings: LikelihoodSettings):
    """Over many seeds the mean is the bound, within four standard errors of that mean."""
    bound = brute_force(table_logits(), TARGET)
    seeds = range(600)
    values = np.array([toy(dataclasses.replace(settings, seed=seed)).nll for seed in seeds])
    assert abs(values.mean() - bound) < 4 * values.std(ddof=1) / math.sqrt(len(values))


@pytest.mark.parametrize("settings", [LikelihoodSettings(MonteCarlo(64)), LikelihoodSettings(ExactBound(12))], ids=str)
def test_the_standard_error_is_honest(settings: LikelihoodSettings):
    """Its mean square is the variance over seeds, within a factor of two in the error."""
    results = [toy(dataclasses.replace(settings, seed=seed)) for seed in range(300)]
    true_error = np.std([result.nll for result in results], ddof=1)
    reported = math.sqrt(np.mean([result.standard_error**2 for result in results]))
    assert 0.5 * true_error < reported < 2 * true_error


@pytest.mark.parametrize("length", [2, 3, 7, 40])
def test_masks_have_their_sizes_and_cover_the_target(length: int):
    for count in (1, 4, 3 * length):
        sizes, weights = systematic_sizes(length, count, 0.37)
        assert sizes.min() >= 1 and sizes.max() <= length - 1
        masks = permutation_masks(length, sizes, 1, 2)
        assert masks.sum(1).equal(sizes)
        # A chain of permutations: no token is ever two scorings ahead of another, give or take a wrapped mask.
        counts = masks.sum(0)
        assert counts.max() - counts.min() <= 2
        assert weights.sum() > 0


def test_weights_of_sizes_sum_a_function():
    """Averaged over the shift, the weighted sum of f(k_j) is the sum of f(k)."""
    wanted = sum(math.sqrt(k) for k in range(1, 10))
    sums = []
    for number in range(1000):
        sizes, weights = systematic_sizes(10, 4, (number + 0.5) / 1000)
        sums.append(float((weights * sizes.double().sqrt()).sum()))
    assert np.mean(sums) == pytest.approx(wanted, rel=2e-3)


def test_every_mask_of_a_size_is_equally_likely():
    """Chi-squared over the C(5, 2) masks that a chain cuts at a place where permutations meet (20 dof at 6 places)."""
    sizes = torch.tensor([3, 4, 2])
    found: dict[tuple[int, ...], int] = {}
    draws = 3000
    for seed in range(draws):
        mask = permutation_masks(5, sizes, seed)[2]
        key = tuple(mask.nonzero().flatten().tolist())
        found[key] = found.get(key, 0) + 1
    expected = draws / math.comb(5, 2)
    assert len(found) == math.comb(5, 2)
    statistic = sum((count - expected) ** 2 / expected for count in found.values())
    assert statistic < 27.9  # the 0.999 quantile of chi-squared with 9 degrees of freedom


def test_answers_of_one_question_share_their_masks():
    short, long = (
        masking_plan(LikelihoodSettings(MonteCarlo(8)), LikelihoodRequest((5, 6), (1,) * n)).masks for n in (3, 7)
    )
    assert long[:, :3].equal(short)
    other = masking_plan(LikelihoodSettings(MonteCarlo(8)), LikelihoodRequest((5, 7), (1,) * 3)).masks
    assert not other.equal(short)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_plan_costs_what_its_estimator_says(name: str):
    estimator = make_estimator(name, {"mc_num": 6, "budget": 9})
    for length in (1, 2, 3, 5, 70):
        plan = estimator.plan(length, 1, 2)
        assert 1 <= len(plan.masks) <= estimator.passes(length)
        assert plan.masks.shape == plan.scored.shape == (len(plan.masks), length)
        assert not (plan.scored & ~plan.masks).any() and plan.scored.any()
        assert plan.reduce(torch.zeros(plan.masks.shape, dtype=torch.float64))[0] == 0


def test_an_estimator_in_words():
    values = {"mc_num": 6, "budget": 9, "nll_type": "mc"}
    found = [make_estimator(name, values).description() for name in ESTIMATORS]
    assert found == ["mc, mc_num 6", "chain_rule", "exact, budget 9"]


# A new estimator


@dataclasses.dataclass(frozen=True)
class UniformSizes(Estimator):
    """The bound by plain Monte Carlo over numbers of masked tokens: an estimator that only this test has."""

    mc_num: int = 64
    name = "uniform_sizes"
    passes_parameter = "mc_num"

    def plan(self, length: int, *keys: int) -> MaskingPlan:
        draws = torch.arange(self.mc_num)
        sizes = 1 + (uniform(*keys, draws, torch.tensor(-1)) * length).long()
        masks = uniform(*keys, draws[:, None], torch.arange(length)).argsort(1).argsort(1) < sizes[:, None]

        def reduce(nll: Tensor) -> tuple[float, float]:
            values = nll.sum(1) * length / sizes
            return float(values.mean()), float(values.std() / math.sqrt(len(values)))

        return MaskingPlan(masks, masks, reduce)

    def passes(self, length: int) -> int:
        return self.mc_num


def test_a_new_estimator_is_a_class_and_its_registration(monkeypatch):
    """Its name is known to users, its parameters are read, its identity is its own, and it estimates the bound."""
    monkeypatch.setitem(ESTIMATORS, UniformSizes.name, UniformSizes)
    settings = LikelihoodSettings(make_estimator("uniform_sizes", {"mc_num": 16, "budget": 3}))
    assert settings.identity() == {
        "estimator": "uniform_sizes", "mc_num": 16, "eps": 0.0, "cfg_scale": 0.0, "greedy": False, "pad_to": 0, "seed": 1234
    }  # fmt: skip
    assert settings.estimator.description() == "uniform_sizes, mc_num 16"
    with pytest.raises(ValueError, match="choose from mc, chain_rule, exact, uniform_sizes"):
        make_estimator("uniform", {})
    results = [toy(dataclasses.replace(settings, seed=seed)) for seed in range(300)]
    values = np.array([result.nll for result in results])
    error = values.std(ddof=1)
    assert abs(values.mean() - brute_force(table_logits(), TARGET)) < 4 * error / math.sqrt(len(values))
    assert 0.5 * error < math.sqrt(np.mean([result.standard_error**2 for result in results])) < 2 * error


# Equivalence


def mixed_requests(count: int = 24) -> list[LikelihoodRequest]:
    generator = np.random.default_rng(3)
    return [
        LikelihoodRequest(
            tuple(generator.integers(1, 50, size=generator.integers(1, 20)).tolist()),
            tuple(generator.integers(1, 50, size=generator.integers(1, 9)).tolist()),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        LikelihoodSettings(MonteCarlo(12), greedy=True),
        LikelihoodSettings(ChainRule(), cfg_scale=0.7),
        LikelihoodSettings(ExactBound(9), greedy=True),
        LikelihoodSettings(ExactBound(9), pad_to=40),
    ],
    ids=str,
)
def test_batches_change_nothing(settings: LikelihoodSettings):
    model, requests = tiny(TransEncoder), mixed_requests()
    together = all_of(mdm_likelihoods(ScoringModel.of(model, 10**6), requests, settings))
    alone = [one(model, request, settings) for request in requests]
    one_row = all_of(mdm_likelihoods(ScoringModel.of(model, 1), requests, settings))
    for request, *results in zip(requests, together, alone, one_row, strict=True):
        for result in results[1:]:
            assert abs(result.nll - results[0].nll) < 1e-4 * len(request.target)
            assert result.is_greedy == results[0].is_greedy


def test_arm_likelihoods():
    model, requests = tiny(GPT), mixed_requests()
    together = all_of(arm_likelihoods(ScoringModel.of(model, 10**6), requests))
    for request, result in zip(requests, together, strict=True):
        ids = torch.tensor([request.prefix + request.target])
        log_p = model(ids)[0, len(request.prefix) - 1 : -1].log_softmax(1).detach()
        expected = -log_p.gather(1, torch.tensor(request.target)[:, None]).sum()
        assert result.nll == pytest.approx(float(expected), abs=1e-4 * len(request.target))
        assert result.is_greedy == (log_p.argmax(1).tolist() == list(request.target))
        assert result.standard_error == 0


def test_equal_rows_are_read_once():
    """Four one-token answers to one question, and a repeated request: one row."""
    rows = []
    model = tiny(TransEncoder)
    inner = model_logits(model)

    def counted(batch) -> Tensor:
        rows.append(len(batch.input_ids))
        yield from inner(batch)

    scoring_model = ScoringModel(counted, TINY.mask_id, TINY.vocab_size, 4096)
    requests = [LikelihoodRequest((1, 2, 3), (answer,)) for answer in (4, 5, 6, 7, 7)]
    results = all_of(mdm_likelihoods(scoring_model, requests, LikelihoodSettings(ExactBound(4))))
    assert sum(rows) == 1
    assert [result.nll for result in results] == pytest.approx(
        [one(model, request, LikelihoodSettings(ExactBound())).nll for request in requests], abs=1e-5
    )
    assert results[3].nll == results[4].nll


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_batch_that_does_not_fit_is_halved(error: RuntimeError):
    sizes = []

    def small_memory(limit: int) -> LogitsFn:
        def logits(batch):
            sizes.append(len(batch.input_ids))
            if len(batch.input_ids) > limit:
                raise error
            yield from table_logits()(batch)

        return logits

    request, settings = LikelihoodRequest((), TARGET), LikelihoodSettings(ExactBound(31))
    ((_, result),) = mdm_likelihoods(ScoringModel(small_memory(4), 3, 3, 4096), [request], settings)
    assert result.nll == toy(settings).nll
    assert max(sizes) == 31 and sizes.count(3) > 3
    with pytest.raises(ValueError, match="a row of 5 tokens does not fit into the memory of cpu"):
        list(mdm_likelihoods(ScoringModel(small_memory(0), 3, 3, 4096), [request], settings))
    error = RuntimeError("another error")
    with pytest.raises(RuntimeError, match="another error"):
        list(mdm_likelihoods(ScoringModel(small_memory(4), 3, 3, 4096), [request], settings))


def spoilt_logits(value: float, rows: int, kind: str) -> LogitsFn:
    """The table's logits until so many rows were read; then one of them, or all of its position, is another number."""
    seen = 0

    def logits(batch):
        nonlocal seen
        seen += len(batch.input_ids)
        for chunk in table_logits()(batch):
            if seen > rows:
                # Token 0 at the last wanted position: not one that is asked for, but where the target ends.
                chunk[-1, 0 if kind == "one" else slice(None)] = value
            yield chunk

    return logits


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0], ids=str)
@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        (LikelihoodSettings(MonteCarlo(8)), 0),
        (LikelihoodSettings(ChainRule(), cfg_scale=0.5), 0),
        (LikelihoodSettings(ExactBound(31)), 0),
        # 31 masks, of which one is the greedy check's first: the check's second pass reads what is spoilt.
        (LikelihoodSettings(ExactBound(31), greedy=True), 31),
    ],
    ids=["mc", "chain_rule", "exact", "greedy"],
)
def test_logits_that_are_no_numbers_end_the_scoring(settings: LikelihoodSettings, rows: int, value: float):
    """A logit of -inf vanishes in a sum of exponentials, and equal logits are what is left where states overflow."""
    # The greedy check's first choice is the target's, so that it goes on.
    best = next(table_logits()(all_masked_batch())).softmax(1).max(1)
    target, first = [1] * LENGTH, int(best.values.argmax())
    target[first] = int(best.indices[first])
    request = LikelihoodRequest((), tuple(target))
    logits = spoilt_logits(value, rows, "all" if value == 0 else "one")
    with pytest.raises(NotFiniteError, match="the model's logits are NaN, infinite or all equal") as raised:
        list(mdm_likelihoods(ScoringModel(logits, 3, 3, 4096), [request], settings))
    assert raised.value.request == request


def test_an_arms_logits_that_are_no_numbers_end_the_scoring():
    requests = mixed_requests(6)
    for name in ("lm_head.weight", "transformer.wte.weight"):
        model = tiny(GPT)
        with torch.no_grad():
            dict(model.named_parameters())[name].mul_(1e38 if name.startswith("lm") else 1e30)
        with pytest.raises(NotFiniteError):
            list(arm_likelihoods(ScoringModel.of(model, 4096), requests))


def test_results_come_after_a_bounded_amount_of_work():
    """An evaluation that is stopped has kept some: a batch of many rows does not hold the first results back."""
    read = 0

    def counted(batch: LogitsBatch):
        nonlocal read
        read += batch.input_ids.numel()
        yield from model_logits(model)(batch)

    model, settings = tiny(TransEncoder), LikelihoodSettings(MonteCarlo(4))
    scoring_model = dataclasses.replace(ScoringModel.of(model, 10**6), logits_fn=counted, tokens_per_result=500)
    between = []
    for _ in mdm_likelihoods(scoring_model, mixed_requests(), settings):
        between.append(read)
        read = 0
    # The largest request is 28 tokens in 4 passes.
    assert sum(between) > 1000 and max(between) < 500 + 4 * 28
    parameters = sum(value.numel() for value in model.parameters())
    assert ScoringModel.of(model, 10**6).tokens_per_result == int(3e12 / (2 * parameters))


def test_wrong_settings_are_refused_together():
    with pytest.raises(ValueError, match=r"'montecarlo' is unknown: choose from mc, .*mc_num is 0.*budget is 1"):
        make_estimator("montecarlo", {"mc_num": 0, "budget": 1})
    with pytest.raises(ValueError, match="cfg is -1"):
        LikelihoodSettings(cfg_scale=-1.0)
