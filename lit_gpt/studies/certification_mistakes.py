"""Known mistakes in objectives, likelihoods, perplexities, samplers and models, each of which the certification must find.

B rows, T tokens, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lit_gpt import diffusion
from lit_gpt.data.batching import MicroBatch
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.studies.certification_findings import Finding
from lit_gpt.studies.certification_functions import (
    ModelFunction,
    check_likelihood,
    check_loss,
    check_perplexity,
    check_sampler_function,
)
from lit_gpt.studies.certification_models import CheckedModel, check_model, check_shift
from lit_gpt.studies.certification_objectives import check_objective
from lit_gpt.studies.certification_samplers import check_rare_words
from lit_gpt.studies.certification_toys import ToyDistribution, dependent_words, toy_distributions
from lit_gpt.training.objectives import MaskedDiffusion

# Of noise: mistakes are large.
_BATCHES = 32


@dataclass(frozen=True)
class Mistake:
    """Something wrong, and the checks that are run on it."""

    name: str
    checks: Callable[[], Iterator[Finding]]
    slow: bool = False
    """Whether it takes minutes."""


# --- objectives -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _WrongObjective(MaskedDiffusion):
    """Masked diffusion whose terms are changed afterwards."""

    mistake: Callable[[LossTerms, MicroBatch, Tensor], LossTerms] = lambda terms, batch, t: terms

    def _masked(self, batch: MicroBatch, t: Tensor, uniforms: Tensor) -> LossTerms:
        return self.mistake(super()._masked(batch, t, uniforms), batch, t)


def _without_weights(terms: LossTerms, batch: MicroBatch, t: Tensor) -> LossTerms:
    return terms._replace(weights=(terms.weights > 0).float())


def _mean_of_masked(terms: LossTerms, batch: MicroBatch, t: Tensor) -> LossTerms:
    masked = (terms.weights > 0).float()
    return terms._replace(weights=masked * masked.size(1) / masked.sum(1, keepdim=True).clamp(min=1))


def _other_smallest_rate(terms: LossTerms, batch: MicroBatch, t: Tensor) -> LossTerms:
    weights = 1 / (0.95 * diffusion.masking_probability(t) + 0.05)
    return terms._replace(weights=((terms.weights > 0) * weights[:, None]).float())


def _clipped(terms: LossTerms, batch: MicroBatch, t: Tensor) -> LossTerms:
    kept = diffusion.masking_probability(t) > 0.05
    return terms._replace(weights=terms.weights * kept[:, None])


def _next_targets(terms: LossTerms, batch: MicroBatch, t: Tensor) -> LossTerms:
    return terms._replace(targets=terms.targets.roll(-1, 1))


def _padding_read(terms: LossTerms, batch: MicroBatch, t: Tensor) -> LossTerms:
    return terms._replace(visibility=None)


def _columns_counted(terms: LossTerms, batch: MicroBatch, t: Tensor) -> LossTerms:
    return terms._replace(in_denominator=torch.ones_like(terms.in_denominator))


@dataclass(frozen=True)
class _NoiseByPlace(MaskedDiffusion):
    """The noise of a row is that of its place in the micro batch."""

    def training(self, batch: MicroBatch) -> LossTerms:
        return super().training(replace(batch, rows=torch.arange(len(batch.rows))))


_WRONG_TERMS: dict[str, Callable[[LossTerms, MicroBatch, Tensor], LossTerms]] = {
    "weight 1/p is missing": _without_weights,
    "mean over the masked tokens": _mean_of_masked,
    "weight 1 / ((1 - eps) t + eps) with eps 0.05 for masks at rate t": _other_smallest_rate,
    "rates below 0.05 are left out": _clipped,
    "targets are the next tokens": _next_targets,
    "padding is read": _padding_read,
    "padding is counted": _columns_counted,
}


def _objective_mistakes(toy: ToyDistribution) -> Iterator[Mistake]:
    values = {"block_size": toy.length, "mask_id": toy.words, "seed": 11, "global_batch_size": 4096}
    for name, mistake in _WRONG_TERMS.items():
        objective = _WrongObjective(**values, mistake=mistake)  # type: ignore[arg-type]
        yield Mistake(f"objective: {name}", partial(check_objective, name, objective, toy, batches=_BATCHES))
    noise = _NoiseByPlace(**values)  # type: ignore[arg-type]
    yield Mistake("objective: noise of the place in the batch", partial(check_objective, "noise", noise, toy, False))


# --- losses, likelihoods, perplexities --------------------------------------------------------------------------------


def masked_loss(model: ModelFunction, tokens: Tensor, mask_id: int, seed: int, mistake: str = "") -> Tensor:
    """The bound by one time a row, nats per token, as a fork might write it; right without a mistake."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(len(tokens), 1, generator=generator, dtype=torch.float64)
    p = torch.sin(t * math.pi / 2) if mistake == "time" else 0.999 * t + 0.001
    masked = torch.rand(tokens.shape, generator=generator, dtype=torch.float64) < p
    log_p = model(torch.where(masked, mask_id, tokens)).log_softmax(2)
    if mistake == "shift":
        log_p = log_p.roll(-1, 1)
    targets = tokens.roll(1, 0) if mistake == "row" else tokens
    nll = -log_p.gather(2, targets[..., None]).squeeze(2)
    scored = torch.ones_like(masked) if mistake == "unmasked" else masked
    # Masks that come at the rate sin(pi t / 2) need the weight p'(t) / p(t).
    return (nll * scored / p).mean()


def text_nll(
    model: ModelFunction, prefix: list[int], target: list[int], mask_id: int, seed: int, mistake: str = ""
) -> tuple[float, float]:
    """The bound by random numbers of masked tokens, as a fork might write it; right without a mistake."""
    generator, draws, length = torch.Generator().manual_seed(seed), 32, len(target)
    sizes = 1 + torch.randint(0, length, (draws,), generator=generator)
    order = torch.rand(draws, length, generator=generator).argsort(1).argsort(1)
    masked = torch.nn.functional.pad(order < sizes[:, None], (len(prefix), 0), value=False)
    text = torch.tensor(prefix + target)
    log_p = model(torch.where(masked, mask_id, text)).log_softmax(2)
    nll = -log_p.gather(2, text.expand(masked.shape)[..., None]).squeeze(2)
    per_size = torch.full((draws,), 1.0) if mistake == "size" else length / sizes
    values = (nll * masked).sum(1) * per_size
    if mistake == "no error":
        return float(values.mean()), 0.0
    error = values.std() / (1 if mistake == "error" else math.sqrt(draws))
    return float(values.mean()), float(error)


def texts_perplexity(model: ModelFunction, texts: list[list[int]], mask_id: int, seed: int, mistake: str = "") -> float:
    """The exponential of the mean bound of a token; right without a mistake."""
    nats = [text_nll(model, [], text, mask_id, seed * len(texts) + number)[0] for number, text in enumerate(texts)]
    lengths = list(map(len, texts))
    if mistake == "padded":
        return math.exp(sum(nats) / (max(lengths) * len(texts)))
    if mistake == "one less":
        return math.exp(sum(nats) / (sum(lengths) - len(texts)))
    if mistake == "mean of texts":
        return sum(math.exp(own / length) for own, length in zip(nats, lengths, strict=True)) / len(texts)
    return math.exp(sum(nats) / sum(lengths))


def _function_mistakes(toys: list[ToyDistribution]) -> Iterator[Mistake]:
    losses = {
        "shift": "logits of the next position are scored",
        "time": "weight 1/p for masks that come at the rate sin(pi t / 2)",
        "unmasked": "tokens that are not masked are scored",
        "row": "another row's tokens are predicted",
    }
    for key, name in losses.items():
        yield Mistake(f"loss: {name}", partial(check_loss, partial(masked_loss, mistake=key), name, toys[:1]))
    errors = {
        "size": "weight L/k is missing",
        "error": "the standard error of one draw is told",
        "no error": "a standard error of 0 is told",
    }
    for key, name in errors.items():
        yield Mistake(f"likelihood: {name}", partial(check_likelihood, partial(text_nll, mistake=key), name, toys[:1]))
    counts = {
        "padded": "divides by the padded length",
        "one less": "divides by one token less a text",
        "mean of texts": "mean of the texts' perplexities",
    }
    for key, name in counts.items():
        function = partial(texts_perplexity, mistake=key)
        yield Mistake(f"perplexity: {name}", partial(check_perplexity, function, name, toys[:1]))


# --- samplers ---------------------------------------------------------------------------------------------------------


def unmask_at_random(
    model: ModelFunction, tokens: Tensor, mask_id: int, steps: int, seed: int, mistake: str = ""
) -> Tensor:
    """One token a step in a random order, as a fork might write it; right without a mistake."""
    generator, tokens = torch.Generator().manual_seed(seed), tokens.clone()
    rows = 1 if mistake == "one stream" else len(tokens)
    for _ in range(steps):
        log_p = model(tokens).log_softmax(2)
        noise = torch.rand((rows, *log_p.shape[1:]), generator=generator, dtype=torch.float64)
        gumbel = 0.0 if mistake == "greedy" else -torch.log(-torch.log(noise))
        words = (log_p / (0.8 if mistake == "temperature" else 1.0) + gumbel).argmax(2)
        score = torch.rand(rows, tokens.size(1), generator=generator).expand(tokens.shape)
        if mistake == "confidence":
            score = log_p.gather(2, words[..., None]).squeeze(2)
        place = score.masked_fill(tokens != mask_id, -torch.inf).argmax(1, keepdim=True)
        kept = torch.where(tokens.gather(1, place) == mask_id, words.gather(1, place), tokens.gather(1, place))
        tokens = tokens.scatter(1, place, kept)
        if mistake == "together":
            tokens = torch.where(tokens == mask_id, words, tokens)
    return tokens


def most_confident(
    model: ModelFunction, tokens: Tensor, mask_id: int, steps: int, seed: int, mistake: str = ""
) -> Tensor:
    """SMDM's greedy rule over the published times; with the mistake it counts and ranks over the whole batch."""
    generator, tokens = torch.Generator().manual_seed(seed), tokens.clone()
    times = [*torch.linspace(1, 1e-5, steps + 1)[:-1].tolist(), 0.0]
    for t, s in zip(times, times[1:], strict=False):
        p = model(tokens).softmax(2)
        words = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(tokens.shape)
        masked = tokens == mask_id
        confidence = p.gather(2, words[..., None]).squeeze(2).masked_fill(~masked, -torch.inf)
        rows = [slice(None)] if mistake else [slice(row, row + 1) for row in range(len(tokens))]
        for part in rows:
            count = int(masked[part].sum().float() * (1 - torch.tensor(s) / torch.tensor(t)))
            best = confidence[part].flatten().argsort(descending=True, stable=True)[:count]
            tokens[part] = tokens[part].flatten().scatter(0, best, words[part].flatten()[best]).view_as(tokens[part])
    return tokens


def noisy_argmax(logits: Tensor, call: int, dtype: torch.dtype) -> Tensor:
    """A word of each row by Gumbel noise of a precision."""
    noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(call)).to(dtype)
    if dtype == torch.float64:
        noise += torch.rand(logits.shape, generator=torch.Generator().manual_seed(-call - 1)) * 2.0**-24
    return (logits.to(dtype) - (-noise.log()).log()).argmax(1)


def _sampler_mistakes(toys: list[ToyDistribution]) -> Iterator[Mistake]:
    names = {
        "greedy": "the likeliest word in place of a random one",
        "temperature": "temperature 0.8",
        "one stream": "one random number for all rows",
        "confidence": "the most confident word first, said to be any order",
        "together": "all words at once, said to be one a step",
    }
    for key, name in names.items():
        function = partial(unmask_at_random, mistake=key)
        checks = partial(check_sampler_function, function, name, toys[:2], "any_order", False)
        yield Mistake(f"sampler: {name}", checks)
    whole = partial(most_confident, mistake="whole batch")
    name = "counts and ranks over the whole batch"
    yield Mistake(f"sampler: {name}", partial(check_sampler_function, whole, name, toys[:1], "greedy", False))
    for dtype, width, exponent in ((torch.float16, 8192, 17), (torch.float32, 32768, 26)):
        name = f"Gumbel noise in {str(dtype).removeprefix('torch.')}"
        choose = partial(noisy_argmax, dtype=dtype)

        def rare(choose: Callable[[Tensor, int], Tensor] = choose, width: int = width, power: int = exponent,
                 name: str = name) -> Iterator[Finding]:  # fmt: skip
            yield check_rare_words(choose, ("sampler", name), width, power)

        yield Mistake(f"sampler: {name}", rare, slow=dtype == torch.float32)


# --- models -----------------------------------------------------------------------------------------------------------


def toy_network(
    tokens: Tensor, key_mask: Tensor | None = None, positions: Tensor | None = None, mistake: str = ""
) -> Tensor:
    """Logits of 9 words from an attention layer with random weights, [MASK] being the last; right without a mistake."""
    generator = torch.Generator().manual_seed(1)
    width, words = 16, 9
    embedding, places, head = (torch.randn(rows, width, generator=generator) for rows in (words + 1, 64, words + 1))
    if positions is None or mistake == "place":
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
    hidden = embedding[tokens] + places[positions]
    scores = hidden @ hidden.mT / width**1.5
    if key_mask is not None and mistake != "padding":
        scores = scores.masked_fill(~key_mask[:, None], -torch.inf)
    if mistake == "causal":
        scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    read = hidden + scores.softmax(2) @ hidden
    if mistake == "batch":
        read = read - read.mean(0)
    logits = read @ head.T
    if mistake != "mask":
        logits[..., words] = -1e9
    return logits.roll(1, 1) if mistake == "shift" else logits


def copying_network(tokens: Tensor, mistake: str = "") -> Tensor:
    """A model of texts that count up modulo 9: a masked word is one more than the word before it."""
    before = torch.where(tokens == 9, -1, tokens).roll(1, 1)
    known = (before >= 0) & (torch.arange(tokens.size(1)) > 0)
    logits = torch.nn.functional.one_hot((before + 1) % 9, 10).float() * 5 * known[..., None]
    logits[..., 9] = -1e9
    return logits.roll(-1, 1) if mistake else logits


def _model_mistakes() -> Iterator[Mistake]:
    names = {
        "padding": "padding is read",
        "place": "positions begin at the padding",
        "causal": "what follows is not seen",
        "batch": "the batch's mean is taken off",
        "mask": "[MASK] may be predicted",
    }
    for key, name in names.items():

        def logits_fn(tokens: Tensor, key_mask: Tensor | None = None, positions: Tensor | None = None,
                      key: str = key) -> Tensor:  # fmt: skip
            return toy_network(tokens, key_mask, positions, key)

        yield Mistake(f"model: {name}", partial(check_model, CheckedModel(name, logits_fn, 9, 9)))
    shifted = CheckedModel("shifted", partial(copying_network, mistake="shift"), 9, 9)
    text = [number % 9 for number in range(12)]
    yield Mistake("model: logits stand one place to the left", partial(check_shift, shifted, text))


def known_mistakes() -> list[Mistake]:
    """All of them."""
    toys = toy_distributions()
    return [
        *_objective_mistakes(dependent_words(3, 4)),
        *_function_mistakes(toys),
        *_sampler_mistakes(toys),
        *_model_mistakes(),
    ]
