"""Likelihoods: the original's numbers, the bound's law by enumeration, unbiased draws, and independence of the batch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_gpt.config import Config
from lit_gpt.likelihood import estimators, loglikelihood
from lit_gpt.likelihood.loglikelihood import Likelihood, Method, Reader, Request, arm_likelihoods, mdm_likelihoods
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.model.logits import LogitsFn, guided, model_logits
from tests.golden.weights import golden_cases, golden_model, golden_tokens
from tests.support.small_models import scaled_model

GOLDEN = golden_cases()
TINY = Config("tiny", 2, 2, 32, 64, 2, block_size=64, vocab_size=50)


def reader_of(model, max_tokens: int = 4096, cfg_scale: float = 0.0) -> Reader:
    logits_fn = guided(model_logits(model), cfg_scale, model.config.mask_id)
    return Reader(logits_fn, model.config.mask_id, model.config.vocab_size, max_tokens)


def all_of(results) -> list[Likelihood]:
    """Results in the order of the requests."""
    found = dict(results)
    assert sorted(found) == list(range(len(found)))
    return [found[number] for number in range(len(found))]


def one(model, request: Request, method: Method) -> Likelihood:
    return all_of(mdm_likelihoods(reader_of(model, cfg_scale=method.cfg_scale), [request], method))[0]


def tiny(kind: type, seed: int = 5):
    return scaled_model(kind, TINY, seed)


def golden_request(case: dict) -> Request:
    ids = golden_tokens(case["prefix_len"] + case["target_len"], case["tokens_seed"])
    return Request(tuple(ids[: case["prefix_len"]]), tuple(ids[case["prefix_len"] :]))


# Golden


@pytest.fixture(scope="module")
def golden_mdm() -> TransEncoder:
    return golden_model(TransEncoder, GOLDEN["likelihood"]["weights_seed"])


CASES = GOLDEN["likelihood"]["cases"]


@pytest.mark.parametrize("case", [case for case in CASES if "chain_rule_nll" in case], ids=str)
def test_golden_chain_rule_and_greedy(golden_mdm: TransEncoder, case: dict):
    request = golden_request(case)
    method = Method("chain_rule", cfg_scale=case["cfg"], greedy=True)
    result = one(golden_mdm, request, method)
    assert result.nll == pytest.approx(case["chain_rule_nll"], rel=1e-4)
    assert result.standard_error == 0
    assert result.is_greedy == (list(request.target) == case["greedy"])
    # A target that is what greedy decoding gives is recognised as such.
    assert one(golden_mdm, Request(request.prefix, tuple(case["greedy"])), method).is_greedy


@pytest.mark.parametrize("case", [case for case in CASES if "exact_elbo" in case], ids=str)
def test_golden_bound(golden_mdm: TransEncoder, case: dict):
    request = golden_request(case)
    exact = one(golden_mdm, request, Method("exact", budget=2 ** len(request.target), cfg_scale=case["cfg"]))
    assert exact.nll == pytest.approx(case["exact_elbo"], rel=1e-4)
    assert exact.standard_error == 0


def test_golden_padding(golden_mdm: TransEncoder):
    (case,) = GOLDEN["likelihood_padded"]["cases"]
    result = one(golden_mdm, golden_request(case), Method("chain_rule", pad_to=2048))
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


def brute_force(logits_fn: LogitsFn, target: tuple[int, ...]) -> float:
    """sum over k of (1/k) E over masks of k tokens of the masked tokens' cross-entropies, term by term."""
    from lit_gpt.model.logits import LogitsBatch

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


def toy(method: Method, prefix: tuple[int, ...] = ()) -> Likelihood:
    reader = Reader(table_logits(), 3, 3, 4096)
    return all_of(mdm_likelihoods(reader, [Request(prefix, TARGET)], method))[0]


def test_the_exact_bound_is_the_sum_over_all_masks():
    result = toy(Method("exact", budget=31))
    assert result.nll == pytest.approx(brute_force(table_logits(), TARGET), rel=1e-6)
    assert result.standard_error == 0


@pytest.mark.parametrize(
    "method", [Method("mc", mc_num=16), *(Method("exact", budget=n) for n in (2, 3, 5, 9, 14, 30))], ids=str
)
def test_draws_are_unbiased(method: Method):
    """Over many seeds the mean is the bound, within four standard errors of that mean."""
    bound = brute_force(table_logits(), TARGET)
    seeds = range(600)
    values = np.array([toy(Method(**{**vars(method), "seed": seed})).nll for seed in seeds])
    assert abs(values.mean() - bound) < 4 * values.std(ddof=1) / math.sqrt(len(values))


@pytest.mark.parametrize("method", [Method("mc", mc_num=64), Method("exact", budget=12)], ids=str)
def test_the_standard_error_is_honest(method: Method):
    """Its mean square is the variance over seeds, within a factor of two in the error."""
    results = [toy(Method(**{**vars(method), "seed": seed})) for seed in range(300)]
    true_error = np.std([result.nll for result in results], ddof=1)
    reported = math.sqrt(np.mean([result.standard_error**2 for result in results]))
    assert 0.5 * true_error < reported < 2 * true_error


@pytest.mark.parametrize("length", [2, 3, 7, 40])
def test_masks_have_their_sizes_and_cover_the_target(length: int):
    for count in (1, 4, 3 * length):
        sizes, weights = estimators.systematic_sizes(length, count, 0.37)
        assert sizes.min() >= 1 and sizes.max() <= length - 1
        masks = estimators.permutation_masks(length, sizes, 1, 2)
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
        sizes, weights = estimators.systematic_sizes(10, 4, (number + 0.5) / 1000)
        sums.append(float((weights * sizes.double().sqrt()).sum()))
    assert np.mean(sums) == pytest.approx(wanted, rel=2e-3)


def test_every_mask_of_a_size_is_equally_likely():
    """Chi-squared over the C(5, 2) masks that a chain cuts at a place where permutations meet (20 dof at 6 places)."""
    sizes = torch.tensor([3, 4, 2])
    found: dict[tuple[int, ...], int] = {}
    draws = 3000
    for seed in range(draws):
        mask = estimators.permutation_masks(5, sizes, seed)[2]
        key = tuple(mask.nonzero().flatten().tolist())
        found[key] = found.get(key, 0) + 1
    expected = draws / math.comb(5, 2)
    assert len(found) == math.comb(5, 2)
    statistic = sum((count - expected) ** 2 / expected for count in found.values())
    assert statistic < 27.9  # the 0.999 quantile of chi-squared with 9 degrees of freedom


def test_answers_of_one_question_share_their_masks():
    short, long = (loglikelihood.make_plan(Method("mc", mc_num=8), Request((5, 6), (1,) * n)).masks for n in (3, 7))
    assert long[:, :3].equal(short)
    other = loglikelihood.make_plan(Method("mc", mc_num=8), Request((5, 7), (1,) * 3)).masks
    assert not other.equal(short)


# Equivalence


def mixed_requests(count: int = 24) -> list[Request]:
    generator = np.random.default_rng(3)
    return [
        Request(
            tuple(generator.integers(1, 50, size=generator.integers(1, 20)).tolist()),
            tuple(generator.integers(1, 50, size=generator.integers(1, 9)).tolist()),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    "method",
    [
        Method("mc", mc_num=12, greedy=True),
        Method("chain_rule", cfg_scale=0.7),
        Method("exact", budget=9, greedy=True),
        Method("exact", budget=9, pad_to=40),
    ],
    ids=str,
)
def test_batches_change_nothing(method: Method):
    model, requests = tiny(TransEncoder), mixed_requests()
    together = all_of(mdm_likelihoods(reader_of(model, 10**6, method.cfg_scale), requests, method))
    alone = [one(model, request, method) for request in requests]
    one_row = all_of(mdm_likelihoods(reader_of(model, 1, method.cfg_scale), requests, method))
    for request, *results in zip(requests, together, alone, one_row, strict=True):
        for result in results[1:]:
            assert abs(result.nll - results[0].nll) < 1e-4 * len(request.target)
            assert result.is_greedy == results[0].is_greedy


def test_arm_likelihoods():
    model, requests = tiny(GPT), mixed_requests()
    together = all_of(arm_likelihoods(reader_of(model, 10**6), requests))
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

    reader = Reader(counted, TINY.mask_id, TINY.vocab_size, 4096)
    requests = [Request((1, 2, 3), (answer,)) for answer in (4, 5, 6, 7, 7)]
    results = all_of(mdm_likelihoods(reader, requests, Method("exact", budget=4)))
    assert sum(rows) == 1
    assert [result.nll for result in results] == pytest.approx(
        [one(model, request, Method("exact")).nll for request in requests], abs=1e-5
    )
    assert results[3].nll == results[4].nll


def test_a_batch_that_does_not_fit_is_halved():
    sizes = []

    def small_memory(limit: int) -> LogitsFn:
        def logits(batch):
            sizes.append(len(batch.input_ids))
            if len(batch.input_ids) > limit:
                raise torch.OutOfMemoryError
            yield from table_logits()(batch)

        return logits

    request, method = Request((), TARGET), Method("exact", budget=31)
    ((_, result),) = mdm_likelihoods(Reader(small_memory(4), 3, 3, 4096), [request], method)
    assert result.nll == toy(method).nll
    assert max(sizes) == 31 and sizes.count(3) > 3
    with pytest.raises(ValueError, match="a row of 5 tokens does not fit into the memory of cpu"):
        list(mdm_likelihoods(Reader(small_memory(0), 3, 3, 4096), [request], method))


def test_wrong_settings_are_refused_together():
    with pytest.raises(ValueError, match=r"'montecarlo' is unknown: choose from mc, .*mc_num is 0.*budget is 1"):
        Method("montecarlo", mc_num=0, budget=1)
    with pytest.raises(ValueError, match="cfg is -1"):
        Method(cfg_scale=-1.0)
