"""Checks of functions that are not this package's: a loss, a likelihood, a perplexity, a sampler, each given a model.

They get a table in the place of a network: `model(tokens)` is (R, T) int64 to (R, T, V + 1) logits, where the last column is
[MASK]'s and has probability 0. What is expected of each function is in docs/certify.md.

B rows, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_gpt.studies.certification_estimators import check_estimates
from lit_gpt.studies.certification_findings import Finding, guarded, mean_p_value
from lit_gpt.studies.certification_laws import left_to_right_law, sampler_law, selection_rules
from lit_gpt.studies.certification_objectives import coefficient_findings
from lit_gpt.studies.certification_samplers import check_rare_words, conditional_law, sampled_law
from lit_gpt.studies.certification_toys import TableModel, ToyDistribution, position_sets, toy_bound

ModelFunction = Callable[[Tensor], Tensor]
LossFunction = Callable[[ModelFunction, Tensor, int, int], Tensor]
"""(model, tokens (B, L), id of [MASK], seed) to the loss, nats per token, a scalar that can be differentiated."""
LikelihoodFunction = Callable[[ModelFunction, list[int], list[int], int, int], Any]
"""(model, prefix, target, id of [MASK], seed) to nats of the target, or to (nats, standard error)."""
PerplexityFunction = Callable[[ModelFunction, list[list[int]], int, int], float]
"""(model, texts of several lengths, id of [MASK], seed) to the perplexity per token."""
SamplerFunction = Callable[[ModelFunction, Tensor, int, int, int], Tensor]
"""(model, tokens (B, T), id of [MASK], steps, seed) to (B, T) without [MASK]."""

LAWS = ("any_order", "left_to_right", *selection_rules(0, 0))
"""What a sampler may say of itself; `any_order` is one token a step, in an order that the sampled words do not change."""
_LOSS_BATCHES, _LOSS_ROWS = 128, 1024
_ESTIMATES, _PERPLEXITIES = 100, 60
_ROWS_OF_A_KIND = 2000
_ROUNDING = 1e-4
_STEPS = 2


class _LearningTable(TableModel):
    """A table whose logits have gradients."""

    def __init__(self, model: TableModel) -> None:
        super().__init__(model.mask_id, model.length, model.probabilities)
        self._logits.requires_grad_()

    def coefficients(self, texts: Tensor) -> tuple[list[Tensor], float]:
        """How the gradient is made of cross-entropies of texts (N, L) that differ from each other at every position.

        Returns:
            For each text the weights (2^L, L) of its cross-entropies, and the largest part of the gradient that has no such
            weight. Of several texts the row in which everything is masked, which they share, is left out of that part.
        """
        assert self._logits.grad is not None
        masked, found = position_sets(texts.size(1)), []
        rest = self._logits.grad.clone()
        for text in texts:
            states, _ = self._read(torch.where(masked, self.mask_id, text), None, None)
            with torch.no_grad():
                p = self._logits.softmax(2)
                own = p[states].gather(2, text.expand(masked.shape)[..., None]).squeeze(2)
                gradient = self._logits.grad[states]
                weight = -gradient.gather(2, text.expand(masked.shape)[..., None]).squeeze(2) / (1 - own)
                told = torch.nn.functional.one_hot(text, self.mask_id + 1).expand_as(gradient)
                rest[states] -= (masked * weight)[..., None] * (p[states] - told)
            found.append(masked * weight)
        if len(texts) > 1:
            rest[states[-1]] = 0.0
        return found, float(rest.abs().max())


def check_loss(loss: LossFunction, name: str, toys: list[ToyDistribution]) -> Iterator[Finding]:
    """The loss's gradient and value, of rows of one text and of rows of two texts, from each toy distribution."""
    for toy in toys:
        checks = [lambda toy=toy: _loss_findings(loss, name, toy), lambda toy=toy: _rows_findings(loss, name, toy)]  # type: ignore[misc]
        yield from guarded("loss", name, checks)


def _loss_findings(loss: LossFunction, name: str, toy: ToyDistribution) -> Iterator[Finding]:
    """All rows are one text, whose every coefficient can be told."""
    text = toy.texts[toy.nll.argsort()[1]]
    tables, values, rest = _loss_batches(loss, toy, text[None], text.repeat(_LOSS_ROWS, 1))

    def finding(check: str, evidence: str, **result: Any) -> Finding:
        return Finding("loss", name, check, toy.name, evidence, **result)

    evidence = f"gradient at other words or rows: at most {rest:.1e}"
    yield finding("reads and predicts the text alone", evidence, holds=rest < _ROUNDING)
    yield from coefficient_findings(finding, tables, 0, (True, True))
    yield finding("loss is the bound", **_compared(values, toy_bound(toy.inexact_model, text), toy.length))


def _rows_findings(loss: LossFunction, name: str, toy: ToyDistribution) -> Iterator[Finding]:
    """Rows of two texts in no order: what a row takes from another one is not its own."""
    text = toy.texts[toy.nll.argsort()[1]]
    apart = (toy.texts != text).all(1)
    texts = torch.stack((text, toy.texts[apart][toy.nll[apart].argmin()]))
    chosen = torch.randint(0, 2, (_LOSS_ROWS,), generator=torch.Generator().manual_seed(5))
    _, values, rest = _loss_batches(loss, toy, texts, texts[chosen])
    evidence = f"gradient at words or rows of neither text's own: at most {rest:.1e}"
    yield Finding("loss", name, "each row reads and predicts its own text", toy.name, evidence, holds=rest < _ROUNDING)
    bounds = [toy_bound(toy.inexact_model, one) for one in texts]
    expected = sum(bounds[number] for number in chosen.tolist()) / _LOSS_ROWS
    yield Finding("loss", name, "loss of two texts is their mean bound", toy.name,
                  **_compared(values, expected, toy.length))  # fmt: skip


def _loss_batches(
    loss: LossFunction, toy: ToyDistribution, texts: Tensor, rows: Tensor
) -> tuple[Tensor, list[float], float]:
    """The first text's coefficients (n, 2^L, L) and the loss of a row, nats, with each seed; the gradient's largest rest."""
    model = _LearningTable(toy.inexact_model)
    tables, values, rest = [], [], 0.0
    for seed in range(_LOSS_BATCHES):
        model._logits.grad = torch.zeros_like(model._logits)
        value = loss(model, rows, toy.words, seed) * toy.length
        value.backward()  # type: ignore[no-untyped-call]
        found, outside = model.coefficients(texts)
        tables.append(found[0])
        values.append(float(value.detach()))
        rest = max(rest, outside)
    return torch.stack(tables), values, rest


def _compared(values: Sequence[float], expected: float, length: int) -> dict[str, Any]:
    """Evidence and p-value of a mean loss, nats a text."""
    found = torch.tensor(values, dtype=torch.float64)
    evidence = f"{float(found.mean()):.4f} nats a text, enumerated {expected:.4f}"
    return {"evidence": evidence, "p_value": mean_p_value(found, expected, _ROUNDING * length)}


def check_likelihood(function: LikelihoodFunction, name: str, toys: list[ToyDistribution]) -> Iterator[Finding]:
    """A likelihood's mean and standard error, as those of this package's estimators."""

    def estimates(model: TableModel, text: Tensor, given: int, count: int) -> list[tuple[float, float | None]]:
        words, found = text.tolist(), []
        for seed in range(count):
            value = function(model, words[:given], words[given:], model.mask_id, seed)
            nats, error = value if isinstance(value, tuple) else (value, None)
            found.append((float(nats), None if error is None else float(error)))
        return found

    for toy in toys:
        yield from check_estimates(estimates, toy, ("likelihood", name), True, _ESTIMATES)


def check_perplexity(function: PerplexityFunction, name: str, toys: list[ToyDistribution]) -> Iterator[Finding]:
    """The exponential of the bounds' sum over the number of tokens, of texts that are not all as long."""

    def ragged(toy: ToyDistribution) -> Iterator[Finding]:
        texts = [text[: toy.length - number % 3] for number, text in enumerate(toy.sample(12, 3))]
        tokens = sum(map(len, texts))
        for words, model in (("the exact model", toy.exact_model), ("another model", toy.inexact_model)):
            expected = sum(toy_bound(model, text) for text in texts) / tokens
            found = [
                function(model, [text.tolist() for text in texts], toy.words, seed) for seed in range(_PERPLEXITIES)
            ]
            values = torch.tensor([math.log(value) for value in found], dtype=torch.float64)
            evidence = f"{math.exp(float(values.mean())):.4f} a token, enumerated {math.exp(expected):.4f}"
            p_value = mean_p_value(values, expected, _ROUNDING)
            yield Finding("perplexity", name, f"perplexity under {words}", toy.name, evidence, p_value)

    for toy in toys:
        yield from guarded("perplexity", name, [lambda toy=toy: ragged(toy)])  # type: ignore[misc]


def check_sampler_function(
    function: SamplerFunction, name: str, toys: list[ToyDistribution], law_name: str, thorough: bool
) -> Iterator[Finding]:
    """What a sampler writes, all rows at once, against the law that it says it has.

    Args:
        function: see the type.
        name: in the table.
        toys: the distributions.
        law_name: one of `LAWS`.
        thorough: also words that float32 noise cannot reach, which takes minutes.
    """
    one_token = law_name in ("any_order", "left_to_right", "random_order")

    def write(model: TableModel, rows: Sequence[Sequence[int]], steps: int) -> Sequence[Tensor]:
        return list(function(model, torch.tensor(rows), model.mask_id, steps, 1))

    def findings(toy: ToyDistribution) -> Iterator[Finding]:
        steps = toy.length if one_token else _STEPS

        def law(model: TableModel, row: Sequence[int], steps: int) -> Tensor:
            if law_name == "any_order":
                return conditional_law(toy, row)
            if law_name == "left_to_right":
                return left_to_right_law(model, row)
            return sampler_law(model, row, selection_rules(0.9, 0.1)[law_name], steps)

        mask, likeliest = toy.words, int(toy.texts[toy.nll.argmin()][0])
        kinds = ([mask] * toy.length, [likeliest, *[mask] * (toy.length - 1)])
        rows = [kinds[number % 2] for number in range(2 * _ROWS_OF_A_KIND)]
        model = toy.exact_model if law_name == "any_order" else toy.natural_model
        yield sampled_law(write, law, model, rows, (steps, "sampler", name, f"law, {law_name}", toy.name))

    def rare_words() -> Iterator[Finding]:
        """Random numbers of few bits."""

        def choose(logits: Tensor, call: int) -> Tensor:
            width = logits.size(1)
            padded = torch.nn.functional.pad(logits, (0, 1), value=-1e9)[:, None]
            return function(lambda ids: padded, torch.full((len(logits), 1), width), width, 1, call)[:, 0]

        for width, exponent in ((8192, 17), (32768, 26))[: 1 + thorough]:
            yield check_rare_words(choose, ("sampler", name), width, exponent)

    yield from guarded("sampler", name, [lambda toy=toy: findings(toy) for toy in toys] + [rare_words])  # type: ignore[misc]
