"""Checks of samplers: what they write has the law that enumeration gives their rule.

A step samples all positions that it reveals independently. So only a sampler that reveals one position a step, in an order
that does not depend on the sampled words, has the law of the exact model's distribution; the law of the others is that of
their steps, and of a model whose orders differ, that of their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_gpt.model.logits import LogitsBatch
from lit_gpt.sampling.algorithm import Algorithm, DenoisingStep, Predictions, make_algorithm
from lit_gpt.sampling.autoregressive import extend, recomputed
from lit_gpt.sampling.denoising import denoise
from lit_gpt.sampling.sequence import masked_sequences, prompt_sequences
from lit_gpt.sampling.settings import ALGORITHMS, Sampling
from lit_gpt.studies.certification_findings import Finding, chi_squared_p_value, guarded, law_p_value, smallest_of
from lit_gpt.studies.certification_laws import (
    SelectionRule,
    SelectionStep,
    left_to_right_law,
    sampler_law,
    selection_rules,
)
from lit_gpt.studies.certification_toys import TableModel, ToyDistribution

Writer = Callable[[TableModel, Sequence[Sequence[int]], int], Sequence[Tensor]]
"""(model, rows of words followed by [MASK]s, steps) to the finished rows."""
RowLaw = Callable[[TableModel, Sequence[int], int], Tensor]
"""(model, row, steps) to the law of the finished row, (V,) * l."""
_ROWS_OF_A_KIND = 2000
_STEPS = 2
_THRESHOLD, _ENTROPY_BOUND = 0.4, 0.8
_AUTOREGRESSIVE = "autoregressive"


def check_samplers(toys: list[ToyDistribution]) -> Iterator[Finding]:
    """All algorithms that are registered, and the ARM's loop, on each toy."""
    for name in (*ALGORITHMS, _AUTOREGRESSIVE):
        for toy in toys:
            yield from check_sampler(name, toy)


def check_sampler(name: str, toy: ToyDistribution) -> Iterator[Finding]:
    """One of this package's samplers, by its name."""
    subject, one_by_one = ("sampler", name), _writer(name, {"block_length": 1})

    def law_finding(write: Writer, law: RowLaw, words: str, steps: int) -> Finding:
        rows = [_rows(toy)[number % 3] for number in range(3 * _ROWS_OF_A_KIND)]
        return sampled_law(write, law, toy.natural_model, rows, (steps, *subject, f"law, {words}", toy.name))

    def one_token() -> Iterator[Finding]:
        """From left to right, which for the exact model is the distribution."""

        def law(model: TableModel, row: Sequence[int], steps: int) -> Tensor:
            return conditional_law(toy, row) if model is toy.exact_model else left_to_right_law(model, row)

        yield law_finding(one_by_one, law, "one token a step", toy.length)

    def several_tokens() -> Iterator[Finding]:
        """Positions that are revealed together."""
        rule = selection_rules(_THRESHOLD, _ENTROPY_BOUND).get(name) or _own_rule(make_algorithm(_settings(name, {})))

        def law(model: TableModel, row: Sequence[int], steps: int) -> Tensor:
            return sampler_law(model, row, rule, steps)

        yield law_finding(_writer(name, {}), law, "several tokens a step", _STEPS)

    def batch() -> Iterator[Finding]:
        """Rows of several lengths, together and alone."""
        rows = [row for row in _rows(toy) for _ in range(3)]
        write = _writer(name, {})
        together = write(toy.inexact_model, rows, _STEPS)
        alone = [_write(name, toy.inexact_model, [row], _settings(name, {"steps": _STEPS}), [number])[0]
                 for number, row in enumerate(rows)]  # fmt: skip
        same = all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
        evidence = (
            f"{len(rows)} rows of {toy.length - 1} and {toy.length} tokens: {'the same' if same else 'other'} tokens"
        )
        yield Finding(*subject, "batch and padding change nothing", toy.name, evidence, holds=same)

    checks = [one_token, batch]
    yield from guarded(*subject, checks if name == _AUTOREGRESSIVE else [several_tokens, *checks])


def sampled_law(
    write: Writer, law: RowLaw, model: TableModel, rows: Sequence[Sequence[int]], told: tuple[int, str, str, str, str]
) -> Finding:
    """Whether every kind of row in a batch has its law.

    Args:
        write: the sampler.
        law: of a row.
        model: whose words are sampled.
        rows: a batch; equal rows are of one kind.
        told: steps, and part, name, check and place of the finding.
    """
    steps, part, name, check, place = told
    written, p_values = write(model, rows, steps), []
    for kind in sorted(set(map(tuple, rows))):
        samples = torch.stack([one for one, row in zip(written, rows, strict=True) if tuple(row) == kind])
        p_values.append(law_p_value(samples, law(model, kind, steps)))
    evidence = f"chi-squared of {len(rows)} rows, p by row's kind: " + " ".join(f"{p:.2g}" for p in p_values)
    return Finding(part, name, check, place, evidence, p_value=smallest_of(p_values))


def conditional_law(toy: ToyDistribution, row: Sequence[int]) -> Tensor:
    """The distribution's own law of a row's words, given those that stand there, (V,) * l."""
    kept = toy.joint.sum(list(range(len(row), toy.length))) if len(row) < toy.length else toy.joint
    law = torch.zeros_like(kept)
    slot = tuple(slice(None) if word == toy.words else word for word in row)
    law[slot] = kept[slot]
    return law / law.sum()


def check_rare_words(
    choose: Callable[[Tensor, int], Tensor], subject: tuple[str, str], width: int, exponent: int
) -> Finding:
    """Whether words of small probability are sampled as often as they should be.

    Noise of few bits cuts a distribution's tail off: a Gumbel number of float32 is at most 16.6, so that words with less
    than about e^-16.6 of the likeliest one's probability never win (arXiv 2409.02908 measures what this does to text).

    Args:
        choose: (logits (n, V) float32, number of the call) to tokens (n,), sampled.
        subject: part and name of the finding.
        width: V.
        exponent: all words but the first have the probability 2^-exponent.
    """
    small, expected = 2.0**-exponent, 25
    count = int(expected / small / (width - 1))
    logits = torch.full((width,), small).log()
    logits[0] = torch.log(torch.tensor(1 - (width - 1) * small))
    at_once, found = max(1, 2**25 // width), 0
    for call, start in enumerate(range(0, count, at_once)):
        rows = min(at_once, count - start)
        found += int((choose(logits.expand(rows, -1).contiguous(), call) > 0).sum())
    rate = (width - 1) * small
    counts = torch.tensor([found, count - found]), torch.tensor([rate * count, (1 - rate) * count])
    p_value = chi_squared_p_value(*(one.double() for one in counts))
    evidence = f"{found} of {count} for {rate * count:.1f} expected"
    return Finding(*subject, f"words with probability 2^-{exponent} are sampled", f"{width} words", evidence, p_value)


def sampled_tokens(logits: Tensor, call: int) -> Tensor:
    """This package's sampler for `check_rare_words`: one masked position a row, revealed in one step."""

    def logits_fn(batch: LogitsBatch) -> Iterator[Tensor]:
        yield logits[batch.indices]

    count, width = logits.shape
    rows = range(call * count, (call + 1) * count)
    sequences = masked_sequences([[]] * count, [1] * count, width, rows)
    *_, state = denoise(logits_fn, sequences, Sampling("origin", 1), width)
    return state.input_ids[:, 0]


# --- this package's samplers --------------------------------------------------------------------------------------------


def _rows(toy: ToyDistribution) -> list[list[int]]:
    """Nothing given, a word given, and a shorter row."""
    mask, likeliest = toy.words, int(toy.texts[toy.nll.argmin()][0])
    return [[mask] * toy.length, [likeliest, *[mask] * (toy.length - 1)], [mask] * (toy.length - 1)]


def _settings(name: str, values: dict[str, Any]) -> Sampling:
    algorithm = "origin" if name == _AUTOREGRESSIVE else name
    known = {"threshold": _THRESHOLD, "entropy": _ENTROPY_BOUND}
    own = {"threshold": {"threshold": known["threshold"]}, "entropy": {"entropy_bound": known["entropy"]}}
    return Sampling(algorithm, **{"steps": _STEPS, **own.get(name, {}), **values})


def _writer(name: str, values: dict[str, Any]) -> Writer:
    def write(model: TableModel, rows: Sequence[Sequence[int]], steps: int) -> Sequence[Tensor]:
        return _write(name, model, rows, _settings(name, {**values, "steps": steps}), None)

    return write


def _write(
    name: str, model: TableModel, rows: Sequence[Sequence[int]], sampling: Sampling, numbers: Sequence[int] | None
) -> list[Tensor]:
    """Rows through the loop of an algorithm, or through the ARM's behind a start token."""
    given = [[word for word in row if word != model.mask_id] for row in rows]
    if name == _AUTOREGRESSIVE:
        prompts = prompt_sequences([[0, *words] for words in given], numbers)
        new = [len(row) - len(words) for row, words in zip(rows, given, strict=True)]
        *_, state = extend(recomputed(model.next_logits), prompts, new, sampling, model.mask_id)
        return [row[1:] for row in state.tokens()]
    sequences = masked_sequences(given, [len(row) for row in rows], model.mask_id, numbers)
    *_, state = denoise(model.tempting_logits, sequences, sampling, model.mask_id)
    return state.tokens()


def _own_rule(algorithm: Algorithm) -> SelectionRule:
    """The rule of an algorithm that is not written down here: its own, for one row at a time."""

    def rule(step: SelectionStep) -> Iterator[tuple[Sequence[int], float]]:
        def uniforms(purpose: int) -> Tensor:
            raise ValueError("the algorithm draws random numbers of its own: add its rule to `selection_rules`")

        masked = torch.ones(1, len(step.confidences), dtype=torch.bool)
        moment = DenoisingStep(masked, ~masked, torch.tensor([step.t]), torch.tensor([step.s]), uniforms)
        measure = None if algorithm.measure is None else algorithm.measure(step.log_p)[None]
        confidence = torch.tensor([list(step.confidences)], dtype=torch.float64)
        predictions = Predictions(torch.zeros_like(masked, dtype=torch.int64), confidence, measure, torch.tensor(True))
        revealed = algorithm.revealed(moment, algorithm.candidates(moment), predictions)
        yield revealed[0].nonzero().flatten().tolist(), 1.0

    return rule
