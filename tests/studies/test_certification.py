"""The certification: everything that is registered passes, every known mistake is found, and what is new is seen."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lit_gpt.config import Config
from lit_gpt.likelihood.estimators import ESTIMATORS
from lit_gpt.likelihood.plan import Estimator, MaskingPlan
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.sampling.algorithm import Algorithm, DenoisingStep, Predictions
from lit_gpt.sampling.settings import ALGORITHMS, Sampling
from lit_gpt.studies.certification import load_function, run_verdict
from lit_gpt.studies.certification_estimators import check_estimators
from lit_gpt.studies.certification_findings import Finding, chi_squared_p_value, law_p_value, level_of, mean_p_value
from lit_gpt.studies.certification_functions import (
    check_likelihood,
    check_loss,
    check_perplexity,
    check_sampler_function,
)
from lit_gpt.studies.certification_mistakes import (
    copying_network,
    known_mistakes,
    masked_loss,
    most_confident,
    noisy_argmax,
    text_nll,
    texts_perplexity,
    toy_network,
    unmask_at_random,
)
from lit_gpt.studies.certification_models import (
    CheckedModel,
    check_model,
    check_own_models,
    check_shift,
    check_trained,
    network_model,
)
from lit_gpt.studies.certification_objectives import check_objective, check_objectives, make_objective
from lit_gpt.studies.certification_samplers import check_rare_words, check_samplers, sampled_tokens
from lit_gpt.studies.certification_toys import (
    ToyDistribution,
    dependent_words,
    left_to_right_nll,
    long_range_copy,
    sum_rule,
    toy_bound,
    toy_distributions,
)
from lit_gpt.training.objectives import OBJECTIVES, MaskedDiffusion

ROOT = Path(__file__).resolve().parents[2]
# As strict as a run of everything.
LEVEL = 1e-5
SMALL = [dependent_words(3, 3)]


def verdicts(findings: Iterator[Finding] | list[Finding]) -> dict[str, set[str]]:
    """What was found for each check."""
    found: dict[str, set[str]] = {}
    for finding in findings:
        found.setdefault(finding.check, set()).add(finding.verdict(LEVEL))
    return found


def passes(findings: Iterator[Finding] | list[Finding]) -> bool:
    found = list(findings)
    failed = [one for one in found if one.verdict(LEVEL) == "FAIL"]
    assert found and not failed, failed
    return True


# The toys


@pytest.mark.parametrize("toy", toy_distributions(), ids=lambda toy: toy.name)
def test_the_exact_models_bound_is_the_likelihood(toy: ToyDistribution) -> None:
    assert float(toy.joint.sum()) == pytest.approx(1)
    for text, nll in zip(toy.texts, toy.nll, strict=True):
        assert toy_bound(toy.exact_model, text) == pytest.approx(float(nll), abs=1e-9)
        assert left_to_right_nll(toy.exact_model, text) == pytest.approx(float(nll), abs=1e-9)


@pytest.mark.parametrize("toy", toy_distributions(), ids=lambda toy: toy.name)
def test_another_models_bound_is_above_its_mean_over_orders_and_above_the_entropy(toy: ToyDistribution) -> None:
    model, bounds = toy.inexact_model, []
    for text in toy.texts:
        table, by_order = model.cross_entropies(text), []
        for order in itertools.permutations(range(toy.length)):
            masked, nll = 2**toy.length - 1, 0.0
            for place in order:
                nll, masked = nll + float(table[masked, place]), masked - 2**place
            by_order.append(nll)
        bound = toy_bound(model, text)
        # The bound is the mean over orders, and Jensen's inequality makes it one.
        assert bound == pytest.approx(sum(by_order) / len(by_order), abs=1e-9)
        assert bound > -math.log(sum(math.exp(-nll) for nll in by_order) / len(by_order))
        bounds.append(bound)
    mean = float(torch.tensor(bounds, dtype=torch.float64) @ (-toy.nll).exp())
    assert mean > toy.entropy + 0.3


def test_toys_are_what_they_say() -> None:
    rule, copy = sum_rule(3, 4), long_range_copy(2, 5)
    assert (rule.texts[:, :-1].sum(1) % 3 == rule.texts[:, -1]).all() and len(rule.texts) == 27
    assert (copy.texts[:, 0] == copy.texts[:, -1]).all() and len(copy.texts) == 16


def test_a_row_is_the_same_behind_padding() -> None:
    model = dependent_words(3, 4).inexact_model
    row = torch.tensor([[1, 3, 2, 3]])
    padded, columns = torch.nn.functional.pad(row, (2, 0), value=1), torch.arange(6)[None]
    shifted = model(padded, columns >= 2, (columns - 2).clamp(min=0))[:, 2:]
    assert torch.equal(shifted, model(row))
    # It is seen where padding is read.
    with pytest.raises(ValueError, match="several tokens at one position"):
        model(padded, None, (columns - 2).clamp(min=0))


def test_p_values_are_uniform_where_all_is_right() -> None:
    """Of 400 samples from a law 5 % have a p-value below 0.05, and of 400 means too."""
    toy, generator = dependent_words(3, 3), torch.Generator().manual_seed(1)
    chances = [law_p_value(toy.sample(500, seed), toy.joint) for seed in range(400)]
    means = [mean_p_value(torch.randn(20, generator=generator, dtype=torch.float64), 0.0, 0.0) for _ in range(400)]
    for found in (chances, means):
        assert 8 <= sum(p < 0.05 for p in found) <= 34  # four standard errors
    assert law_p_value(torch.tensor([[0, 0, 1], [0, 0, 3]]), toy.joint) == 0
    # The 0.999 quantile of chi-squared with 26 degrees of freedom.
    counts = torch.full((27,), 100.0, dtype=torch.float64)
    off = counts.clone()
    off[0] += math.sqrt(54.05 * 100)
    assert chi_squared_p_value(off, counts) == pytest.approx(0.001, rel=0.02)


# This package


def test_every_objective_passes() -> None:
    found = [one for kind in OBJECTIVES for one in check_objective(kind, make_objective(OBJECTIVES[kind], SMALL[0]),
                                                                   SMALL[0], batches=32)]  # fmt: skip
    assert passes(found) and {one.name for one in found} == set(OBJECTIVES)
    # An ARM's order is not random; it claims no such thing.
    own = verdicts(one for one in found if one.name == "next_token")
    assert own["gradient is that of the random-order bound"] == {"no"}


def test_every_estimator_passes() -> None:
    found = list(check_estimators(SMALL))
    assert passes(found) and {one.name for one in found} == set(ESTIMATORS)
    own = verdicts(one for one in found if one.name == "chain_rule")
    assert own["mean is the bound under another model"] == {"no"}


def test_every_sampler_passes() -> None:
    found = list(check_samplers(SMALL))
    assert passes(found) and {one.name for one in found} == {*ALGORITHMS, "autoregressive"}
    assert passes([check_rare_words(sampled_tokens, ("sampler", "all"), 8192, 17)])


def test_own_networks_pass() -> None:
    assert passes(check_own_models())


@pytest.mark.slow
def test_the_package_is_certified() -> None:
    done = subprocess.run([sys.executable, "scripts/certify.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_words_that_float32_cannot_reach() -> None:
    assert passes([check_rare_words(sampled_tokens, ("sampler", "all"), 32768, 26)])
    assert check_rare_words(lambda logits, call: noisy_argmax(logits, call, torch.float32), ("sampler", "float32"), 32768,
                            26).verdict(LEVEL) == "FAIL"  # fmt: skip


# What is wrong is found


@pytest.mark.parametrize("mistake", [one for one in known_mistakes() if not one.slow], ids=lambda one: one.name)
def test_a_mistake_is_found(mistake) -> None:
    found = list(mistake.checks())
    assert any(one.verdict(LEVEL) == "FAIL" for one in found), verdicts(found)
    # By what it found, not by an error of the test.
    assert not any(one.check == "runs" for one in found), found


def test_without_their_mistakes_they_pass() -> None:
    """Else anything would be found wrong."""
    assert passes(check_loss(masked_loss, "right", SMALL))
    assert passes(check_likelihood(text_nll, "right", SMALL))
    assert passes(check_perplexity(texts_perplexity, "right", SMALL))
    assert passes(check_sampler_function(unmask_at_random, "right", [sum_rule(3, 3)], "any_order", False))
    assert passes(check_sampler_function(most_confident, "right", SMALL, "greedy", False))
    assert passes(check_model(CheckedModel("right", toy_network, 9, 9)))
    assert passes(check_shift(CheckedModel("right", copying_network, 9, 9), [number % 9 for number in range(12)]))
    assert passes(
        [check_rare_words(lambda logits, call: noisy_argmax(logits, call, torch.float64), ("", ""), 8192, 17)]
    )


def test_a_function_that_raises_fails() -> None:
    def broken(*arguments: object) -> float:
        raise RuntimeError("out of luck")

    found = list(check_likelihood(broken, "broken", SMALL))
    assert {one.verdict(LEVEL) for one in found} == {"FAIL"} and "RuntimeError: out of luck" in found[0].evidence


def test_a_model_below_the_entropy_is_impossible_and_one_far_above_has_not_learnt() -> None:
    toy = sum_rule(3, 4)

    def exact(tokens: Tensor) -> Tensor:
        return toy.exact_model(tokens)

    assert passes(check_trained(CheckedModel("exact", exact, 3, 3), toy))
    found = verdicts(check_trained(CheckedModel("uniform", lambda ids: torch.zeros(*ids.shape, 3), 3, 3), toy))
    assert found["has learnt it: within 0.05 nats a token"] == {"FAIL"}
    # "Probabilities" that do not sum to 1, as of a head whose softmax was forgotten, are no model at all: the bound is
    # computed with a softmax, so that it cannot be below.
    assert found["mean bound is not below the entropy"] == {"pass"}


def random_network(seed: int) -> CheckedModel:
    config = Config("tiny", 1, 2, 16, 32, 2, block_size=32, vocab_size=50)
    network = TransEncoder(config)
    network.init_weights(seed)
    return network_model(network.eval(), f"seed {seed}")


def test_an_untrained_models_place_cannot_be_told() -> None:
    """All of them are right: by chance a neighbour's logits are better for a short text, which is no failure."""
    generator, found = torch.Generator().manual_seed(0), []
    for seed in range(30):
        text = torch.randint(0, 50, (12,), generator=generator).tolist()
        found += [one.verdict(1e-3) for one in check_shift(random_network(seed), text)]
    assert found == ["no"] * 30


@pytest.mark.parametrize("text", [[3] * 12, [1, 2, 1, 2, 1, 2, 1, 2, 1, 2], [5], [5, 6], []])
def test_a_text_of_few_words_tells_no_place(text: list[int]) -> None:
    found = list(check_shift(random_network(1), text))
    assert {one.verdict(1e-3) for one in found} == {"no"} and {one.check for one in found} == {
        "logits stand at their tokens"
    }


def test_a_trained_models_place_is_told() -> None:
    text = [number % 9 for number in range(12)]
    assert verdicts(check_shift(CheckedModel("right", copying_network, 9, 9), text)) == {
        "logits stand at their tokens": {"pass"}
    }
    for moved in (-1, 1):
        wrong = CheckedModel("moved", lambda ids, moved=moved: copying_network(ids).roll(moved, 1), 9, 9)
        assert verdicts(check_shift(wrong, text)) == {"logits stand at their tokens": {"FAIL"}}


def test_a_false_alarm_is_only_of_chance() -> None:
    certain = Finding("model", "a", "shape", "tokens", "")
    assert run_verdict([certain] * 4, 3) == "all 4 checks pass (none is of chance; 3 s)"
    chance = dataclasses.replace(certain, p_value=0.5)
    assert "1 of chance, each fails at p < 1.0e-03: a false alarm in 0.001 of runs" in run_verdict([certain, chance], 3)


# What is new is seen


@dataclasses.dataclass(frozen=True)
class Unweighted(MaskedDiffusion):
    """The plain cross-entropy of masked tokens, which says that it is no bound."""

    training_is_bound = False

    def _masked(self, batch, t, uniforms):
        terms = super()._masked(batch, t, uniforms)
        return terms._replace(weights=(terms.weights > 0).float())

    def validation(self, batch, draw, draws):
        return MaskedDiffusion(self.block_size, self.mask_id, self.seed, self.global_batch_size).validation(
            batch, draw, draws
        )


# Afterwards a registry is as before in its order, too, which users read; undone one by one, it would be turned round.
@patch.dict(OBJECTIVES, {"unweighted": Unweighted}, clear=True)
def test_a_new_objective_is_checked_and_may_say_that_it_is_no_bound() -> None:
    found = list(check_objectives(SMALL))
    assert passes(found) and {one.name for one in found} == {"unweighted"}
    own = verdicts(found)
    assert own["gradient is that of a bound"] == {"no"} and own["validation loss is the bound"] == {"pass"}


@dataclasses.dataclass(frozen=True)
class HalfSize(Estimator):
    """Always half of the tokens, which is no estimate of the bound."""

    name = "half_size"

    def plan(self, length: int, *keys: int) -> MaskingPlan:
        masks = torch.arange(length)[None] < (length + 1) // 2
        return MaskingPlan(masks, masks, lambda nll: (float(nll.sum()) * 2, 0.0))

    def passes(self, length: int) -> int:
        return 1


@patch.dict(ESTIMATORS, {HalfSize.name: HalfSize}, clear=True)
def test_a_new_estimator_is_checked() -> None:
    found = verdicts(check_estimators(SMALL))
    assert found["mean is -log p under the exact model"] == {"FAIL"}


@dataclasses.dataclass(frozen=True)
class RightToLeft(Algorithm):
    """The last masked position of each row."""

    def revealed(self, step: DenoisingStep, candidates: Tensor, predictions: Predictions) -> Tensor:
        later = candidates.flip(1).cumsum(1).flip(1)
        return candidates & ((later == 1) | step.last)


@patch.dict(ALGORITHMS, {"right_to_left": f"{__name__}:RightToLeft"}, clear=True)
def test_a_new_sampler_is_checked_by_its_own_rule(monkeypatch) -> None:
    # A name in the file itself is a choice from the start.
    (field,) = (one for one in dataclasses.fields(Sampling) if one.name == "algorithm")
    monkeypatch.setattr(field, "metadata", {**field.metadata, "choices": tuple(ALGORITHMS)})
    found = [one for one in check_samplers(SMALL) if one.name == "right_to_left"]
    assert passes(found)
    assert {one.check for one in found} >= {"law, several tokens a step", "law, one token a step"}


# The command


def certify(*words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "scripts/certify.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


FORK = """
import math
import torch

def logits(tokens):
    generator = torch.Generator().manual_seed(1)
    embedding, places = torch.randn(10, 16, generator=generator), torch.randn(64, 16, generator=generator)
    hidden = embedding[tokens] + places[: tokens.size(1)]
    read = hidden + (hidden @ hidden.mT / 64).softmax(2) @ hidden
    logits = read @ embedding.T
    logits[..., 9] = -math.inf
    return logits

def perplexity(model, texts, mask_id, seed):
    text = max(texts, key=len)
    return math.exp(len(text))
"""


def test_a_fork_is_certified_by_name(tmp_path: Path) -> None:
    (tmp_path / "fork.py").write_text(FORK)
    output = tmp_path / "found.json"
    said = certify("--model", f"{tmp_path}/fork.py:logits", "--mask_id", "9", "--output", str(output))
    assert "all 4 checks pass" in said and "| model |" in said
    kept = json.loads(output.read_text())
    assert {one["verdict"] for one in kept["findings"]} == {"pass"} and kept["level"] == 1e-3
    error = certify("--perplexity", f"{tmp_path}/fork.py:perplexity", code=2)
    assert error.count("\n") == 1 and "6 of 6 checks FAIL" in error


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.py:nll", "no such file"),
        ("nll", "expected file.py:function"),
        ("json:nll", "has no attribute 'nll'"),
        ("json:__name__", "not a function"),
        ("no_such_package:nll", "No module named"),
    ],
)
def test_a_wrong_name_is_said(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_function(name, "likelihood")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x = undefined_name", "NameError: name 'undefined_name' is not defined"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_what_a_users_file_raises_at_import_is_said_in_one_line(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "bad.py").write_text(f"{line}\n\ndef nll(*given): ...\n")
    with pytest.raises(ValueError) as error:
        load_function(f"{tmp_path}/bad.py:nll", "likelihood")
    assert str(error.value) == f"--likelihood {tmp_path}/bad.py:nll: {words}"


def test_the_level_is_shared() -> None:
    chance = Finding("sampler", "a", "law", "toy", "", p_value=4e-4)
    assert chance.verdict(level_of([chance])) == "FAIL" and chance.verdict(level_of([chance] * 3)) == "pass"
