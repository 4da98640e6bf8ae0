"""The bound of models from another library, against the sum over all masks written out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_gpt.likelihood import elbo as module
from lit_gpt.likelihood.elbo import elbo

VOCABULARY, MASK = 40, 39
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 64}
PREFIX, TARGET = [5, 6, 7], [8, 3, 21, 3, 30]


def bert() -> Callable[[Tensor], Tensor]:
    """BERT from a tiny configuration, with random weights that make context matter."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(1)
    config = BertConfig(**SIZES, initializer_range=0.5)
    model = BertForMaskedLM(config).eval()
    return lambda tokens: model(input_ids=tokens).logits


def llada() -> Callable[[Tensor], Tensor]:
    """LLaDA's shape: a Llama whose tokens all see each other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(**SIZES, initializer_range=0.5)
    model = LlamaForCausalLM(config).eval()

    def logits_fn(tokens: Tensor) -> Tensor:
        rows, length = tokens.shape
        everybody = torch.zeros(rows, 1, length, length)  # added to the attention scores: nothing is hidden
        return model(input_ids=tokens, attention_mask=everybody).logits

    return logits_fn


MODELS = {"bert": bert, "llada": llada}


@pytest.fixture(scope="module", params=MODELS)
def logits_fn(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    return MODELS[request.param]()


@torch.no_grad()
def enumerated(logits_fn: Callable[[Tensor], Tensor], prefix: list[int], target: list[int]) -> float:
    """sum over k of (1/k) E over masks of k tokens of the masked tokens' cross-entropies, a row at a time."""
    total = 0.0
    for k in range(1, len(target) + 1):
        sums = []
        for chosen in itertools.combinations(range(len(target)), k):
            row = prefix + [MASK if place in chosen else token for place, token in enumerate(target)]
            log_p = logits_fn(torch.tensor([row]))[0].log_softmax(1)
            sums.append(-sum(float(log_p[len(prefix) + place, target[place]]) for place in chosen))
        total += float(np.mean(sums)) / k
    return total


def test_with_all_masks_it_is_the_enumerated_bound(logits_fn):
    for prefix, target in ((PREFIX, TARGET), ([], TARGET[:3]), (PREFIX, TARGET[:1])):
        result = elbo(logits_fn, prefix, target, mask_id=MASK)
        assert result.nll == pytest.approx(enumerated(logits_fn, prefix, target), rel=1e-5)
        assert (result.standard_error, result.passes) == (0.0, 2 ** len(target) - 1)


def test_context_matters_to_the_toys(logits_fn):
    """Else the tests here could not tell a right mask from a wrong one."""
    one_by_one = sum(elbo(logits_fn, PREFIX, [token], mask_id=MASK).nll for token in TARGET)
    assert abs(one_by_one - elbo(logits_fn, PREFIX, TARGET, mask_id=MASK).nll) > 0.2


def test_with_fewer_passes_it_is_unbiased_and_says_how_sure_it_is(logits_fn):
    bound = elbo(logits_fn, PREFIX, TARGET, mask_id=MASK).nll
    found = [elbo(logits_fn, PREFIX, TARGET, mask_id=MASK, budget=9, seed=seed) for seed in range(150)]
    assert {one.passes for one in found} == {9}
    values = np.array([one.nll for one in found])
    error = values.std(ddof=1)
    assert abs(values.mean() - bound) < 4 * error / np.sqrt(len(values))
    assert 0.5 * error < np.sqrt(np.mean([one.standard_error**2 for one in found])) < 2 * error


def test_a_large_vocabulary_is_read_some_rows_at_a_time(logits_fn, monkeypatch):
    rows: list[int] = []

    def counted(tokens: Tensor) -> Tensor:
        rows.append(len(tokens))
        return logits_fn(tokens)

    whole = elbo(counted, PREFIX, TARGET, mask_id=MASK)
    assert sum(rows) == whole.passes == 31 and len(rows) == 2
    rows.clear()
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 3 * len(PREFIX + TARGET) * VOCABULARY)
    assert elbo(counted, PREFIX, TARGET, mask_id=MASK).nll == pytest.approx(whole.nll, abs=1e-5)
    assert sum(rows) == 31 and max(rows) == 3


def test_tensors_and_lists_are_the_same(logits_fn):
    tensors = torch.tensor(PREFIX), torch.tensor(TARGET)
    assert elbo(logits_fn, *tensors, mask_id=MASK, budget=9) == elbo(logits_fn, PREFIX, TARGET, mask_id=MASK, budget=9)


def excluding(token: int) -> Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    """A model that gives a token the probability 0, as a logit of -inf."""
    return lambda logits_fn: lambda tokens: logits_fn(tokens).masked_fill(torch.arange(VOCABULARY) == token, -torch.inf)


def test_the_mask_may_be_excluded(logits_fn):
    """Some models give [MASK] the probability 0; the others' probabilities grow by what it had."""
    without = elbo(excluding(MASK)(logits_fn), PREFIX, TARGET, mask_id=MASK)
    assert without.nll == pytest.approx(enumerated(excluding(MASK)(logits_fn), PREFIX, TARGET), rel=1e-5)
    assert without.nll < elbo(logits_fn, PREFIX, TARGET, mask_id=MASK).nll


MISTAKES = {
    "the target is empty": {"target": []},
    "the target holds the mask": {"target": [3, MASK]},
    "budget is 1: at least 2 forward passes are needed": {"budget": 1},
    r"returned \(7, 40\) for tokens \(1, 7\): expected": {"logits_fn": lambda tokens: torch.zeros(7, VOCABULARY)},
    "logits are NaN": {"logits_fn": lambda tokens: torch.full((*tokens.shape, VOCABULARY), torch.nan)},
    "logits are NaN, infinite": {"logits_fn": lambda tokens: torch.full((*tokens.shape, VOCABULARY), torch.inf)},
    "excludes a token of the target": {"logits_fn": lambda tokens: excluding(TARGET[1])(bert())(tokens)},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    values = {"logits_fn": bert(), "prefix": PREFIX, "target": TARGET[:4], "mask_id": MASK, **MISTAKES[message]}
    with pytest.raises(ValueError, match=message):
        elbo(**values)


def test_a_uniform_models_bound_is_that_of_its_vocabulary():
    result = elbo(lambda tokens: torch.zeros(*tokens.shape, VOCABULARY), PREFIX, TARGET, mask_id=MASK)
    assert result.nll == pytest.approx(len(TARGET) * np.log(VOCABULARY), rel=1e-6)
    assert result.standard_error == 0.0


@pytest.mark.parametrize(
    ("name", "token"), [("target", VOCABULARY), ("target", VOCABULARY + 10), ("target", -3), ("prefix", -1)]
)
def test_ids_that_the_vocabulary_does_not_have_are_named(name: str, token: int):
    texts = {"prefix": PREFIX, "target": TARGET[:3], name: [2, token]}
    with pytest.raises(ValueError, match=f"elbo: the {name} holds the id {token}: "):
        elbo(lambda tokens: torch.ones(*tokens.shape, VOCABULARY).cumsum(2), **texts, mask_id=MASK)


def test_the_lines_of_the_document_run(capsys):
    text = (Path(__file__).resolve().parents[2] / "docs" / "likelihood.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, "docs/likelihood.md", "exec"), {})
    first, second = capsys.readouterr().out.splitlines()
    # Random weights: about ln 40 nats for each of 5 and 12 tokens.
    pattern = r"at most (\d+\.\d\d) nats, standard error (\d+\.\d\d), (\d+) passes"
    found = [re.fullmatch(pattern, line) for line in (first, second)]
    assert all(found), (first, second)
    (nats, error, passes), (more_nats, more_error, more_passes) = (one.groups() for one in found if one)
    assert 15 < float(nats) < 22 and (error, passes) == ("0.00", "31")
    assert 38 < float(more_nats) < 50 and 0 < float(more_error) < 1 and more_passes == "32"
