"""Checks of a model, given as a function from tokens to logits: what no other row, padding or place may change.

R rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_gpt.config import Config
from lit_gpt.likelihood.decision import student_tail
from lit_gpt.likelihood.elbo import elbo
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.studies.certification_findings import FALSE_ALARMS, Finding, guarded
from lit_gpt.studies.certification_toys import ToyDistribution

# Nats of a log-probability: float32 in another batch differs by about 1e-5 (measured on models of 1M parameters).
_ROUNDING = 1e-3
# Nats that a token's bound may lose to [MASK], which is never a text's token: -log(1 - p).
_MOST_FOR_MASK = 1e-3
# A log-probability moves by more than this if anything reads the token that was changed.
_SEEN = 1e-4
_ROWS = 6
# Different tokens that are enough for a t-test.
_FEWEST_WORDS = 5
# Nats: of means that are equal but for rounding.
_SMALLEST_ERROR = 1e-6


@dataclass(frozen=True)
class CheckedModel:
    """A masked model of any library."""

    name: str
    logits_fn: Callable[..., Tensor]
    """(R, T) int64 to (R, T, V). With parameters `key_mask` (R, T) bool and `positions` (R, T), padding and place too."""
    mask_id: int
    vocab_size: int
    """Tokens from 0 that a text may hold."""
    length: int = 12
    """Of the rows that it is checked on."""
    is_causal: bool = False
    """An ARM, whose predictions do not depend on what follows."""


def check_model(model: CheckedModel) -> Iterator[Finding]:
    """All that can be said without knowing what it has learnt."""
    checks = [_sound, _batch, _padding_and_place, _context]
    yield from guarded("model", model.name, [lambda check=check: check(model) for check in checks])  # type: ignore[misc]


def check_own_models() -> Iterator[Finding]:
    """This package's two networks with random weights that make context matter."""
    config = Config("tiny", 2, 2, 32, 64, 2, block_size=32, vocab_size=50)
    for kind in (TransEncoder, GPT):
        network = kind(config)
        network.init_weights(5)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
        yield from check_model(network_model(network.eval(), kind.__name__))


def network_model(network: Any, name: str) -> CheckedModel:
    """One of this package's networks, on whatever device it is."""
    config, device = network.config, next(network.parameters()).device

    @torch.no_grad()
    def logits_fn(tokens: Tensor, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        there = [None if one is None else one.to(device) for one in (tokens, positions, key_mask)]
        return network(there[0], there[1], network.visibility.padded(there[2])).float().cpu()  # type: ignore[no-any-return]

    return CheckedModel(
        name, logits_fn, config.mask_id, config.vocab_size, min(12, config.block_size // 2), network.kind == "arm"
    )


def check_shift(model: CheckedModel, text: Sequence[int]) -> Iterator[Finding]:
    """A text's tokens are likelier by the logits of their own positions than by those of the positions beside them.

    Every third token is masked, in three rows. Compared are the means over equal tokens, by Student's t: a model fails if
    its neighbours' logits are better beyond chance, and passes if they are worse beyond chance.
    """
    check, where = "logits stand at their tokens", f"{len(text)} tokens"
    words = len(set(text[1:-1]))

    def compared() -> Iterator[Finding]:
        if words < _FEWEST_WORDS:
            evidence = f"{words} different tokens between the ends, {_FEWEST_WORDS} are needed: cannot be told"
            yield Finding("model", model.name, check, where, evidence, told=False)
            return
        nll = {by: _shifted_nll(model, text, by) for by in (-1, 0, 1)}
        chances = [_better_by_chance(nll[by] - nll[0], text) for by in (-1, 1)]
        # Two neighbours are asked.
        p_value = min(1.0, 2 * min(neighbour for neighbour, _ in chances))
        told = max(own for _, own in chances) < FALSE_ALARMS
        evidence = ", ".join(f"{float(value[1:-1].mean()):.3f} nats a token moved by {by}" for by, value in nll.items())
        unsaid = "" if told or p_value < FALSE_ALARMS else ": cannot be told"
        yield Finding("model", model.name, check, where, evidence + unsaid, p_value=p_value, told=told)

    yield from guarded("model", model.name, [compared])


def _shifted_nll(model: CheckedModel, text: Sequence[int], by: int) -> Tensor:
    """-log p (T,) of each token of a text by logits that are moved by some positions; the ends have none of their own."""
    ids = torch.tensor(text, dtype=torch.int64)
    columns = torch.arange(len(ids))
    logits = _logits(model, torch.where(columns % 3 == torch.arange(3)[:, None], model.mask_id, ids)).double()
    if model.mask_id < logits.size(2):
        logits[..., model.mask_id] = -torch.inf
    return -logits.log_softmax(2).roll(by, 1)[columns % 3, columns, ids]


def _better_by_chance(worse: Tensor, text: Sequence[int]) -> tuple[float, float]:
    """How likely it is by chance that a neighbour is as much better as it is, and that it is as much worse.

    Args:
        worse: (T,) nats of each token that its neighbour's logits lose; those at the ends do not count.
        text: the tokens; equal ones are no independent evidence, and count as one.
    """
    inner = torch.tensor(text[1:-1])
    means = torch.tensor([float(worse[1:-1][inner == word].mean()) for word in sorted(set(text[1:-1]))])
    error = float(means.std()) / math.sqrt(len(means))
    t = float(means.mean()) / max(error, _SMALLEST_ERROR)
    return student_tail(-t, len(means) - 1), student_tail(t, len(means) - 1)


def check_trained(model: CheckedModel, toy: ToyDistribution) -> Iterator[Finding]:
    """A model that was trained on a toy distribution: its mean bound is above the entropy, and how far."""

    def mean_bound() -> Iterator[Finding]:
        """Over all texts, with every mask."""
        nats = [elbo(lambda ids: _logits(model, ids), [], text, mask_id=model.mask_id).nll for text in toy.texts]
        mean = float(torch.tensor(nats, dtype=torch.float64) @ (-toy.nll).exp())
        evidence = f"{mean:.4f} nats a text, entropy {toy.entropy:.4f}"
        yield Finding("model", model.name, "mean bound is not below the entropy", toy.name, evidence,
                      holds=mean > toy.entropy - _ROUNDING)  # fmt: skip
        evidence = f"{mean - toy.entropy:.4f} nats above it"
        close = mean < toy.entropy + 0.05 * toy.length
        yield Finding("model", model.name, "has learnt it: within 0.05 nats a token", toy.name, evidence, holds=close)

    yield from guarded("model", model.name, [mean_bound])


def _logits(model: CheckedModel, ids: Tensor, **given: Tensor) -> Tensor:
    """Logits as float32."""
    with torch.no_grad():
        return model.logits_fn(ids, **given).float()


def _rows(model: CheckedModel) -> tuple[Tensor, Tensor]:
    """Random texts, and the same with a third to all of their tokens masked, which no ARM can read."""
    generator = torch.Generator().manual_seed(2)
    texts = torch.randint(0, model.vocab_size, (_ROWS, model.length), generator=generator)
    texts = torch.where(texts == model.mask_id, (texts + 1) % model.vocab_size, texts)
    masked = torch.rand(texts.shape, generator=generator) < torch.linspace(0.3, 1, _ROWS)[:, None]
    return texts, texts if model.is_causal else torch.where(masked, model.mask_id, texts)


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of probabilities, in log-probabilities where they are above e^-20."""
    one, other = (logits.log_softmax(-1).clamp(min=-20) for logits in (one, other))
    return float((one - other).abs().max())


def _sound(model: CheckedModel) -> Iterator[Finding]:
    """Shape, numbers, [MASK]'s share."""
    _, rows = _rows(model)
    logits = _logits(model, rows)
    right = logits.dim() == 3 and logits.shape[:2] == rows.shape and logits.size(2) >= model.vocab_size
    evidence = f"{tuple(logits.shape)} for {tuple(rows.shape)}"
    yield Finding("model", model.name, "logits (R, T, V), no NaN", "random tokens", evidence,
                  holds=right and not bool(logits.isnan().any()))  # fmt: skip
    share = 0.0
    if model.mask_id < logits.size(2) and not model.is_causal:
        share = float(logits.softmax(2)[..., model.mask_id][rows == model.mask_id].mean())
    lost = -math.log(max(1e-30, 1 - share))
    yield Finding("model", model.name, "[MASK] has no probability", "random tokens",
                  f"{share:.2g} on average, {abs(lost):.2g} nats a token", holds=lost <= _MOST_FOR_MASK)  # fmt: skip


def _batch(model: CheckedModel) -> Iterator[Finding]:
    """Each row alone."""
    _, rows = _rows(model)
    together = _logits(model, rows)
    alone = torch.cat([_logits(model, row[None]) for row in rows])
    worst = _distance(together, alone)
    yield Finding("model", model.name, "batch changes nothing", "random tokens", f"at most {worst:.1e} nats",
                  holds=worst <= _ROUNDING)  # fmt: skip


def _padding_and_place(model: CheckedModel) -> Iterator[Finding]:
    """Rows behind three columns of padding, with the positions that they have alone."""
    names = inspect.signature(model.logits_fn).parameters
    if not {"key_mask", "positions"} <= set(names):
        return
    _, rows = _rows(model)
    padded = torch.nn.functional.pad(rows, (3, 0), value=1)
    columns = torch.arange(padded.size(1)).expand_as(padded)
    given = {"key_mask": columns >= 3, "positions": (columns - 3).clamp(min=0)}
    worst = _distance(_logits(model, padded, **given)[:, 3:], _logits(model, rows))
    yield Finding("model", model.name, "padding and place change nothing", "3 columns of padding",
                  f"at most {worst:.1e} nats", holds=worst <= _ROUNDING)  # fmt: skip


def _context(model: CheckedModel) -> Iterator[Finding]:
    """A masked position's prediction when a token left or right of it is changed."""
    texts, _ = _rows(model)
    middle, moved = model.length // 2, {}
    for words, place in (("left", middle - 1), ("right", middle + 1)):
        rows = texts.clone()
        if not model.is_causal:
            rows[:, middle] = model.mask_id
        other = rows.clone()
        other[:, place] = (other[:, place] + 1) % model.vocab_size
        other[:, place] = torch.where(other[:, place] == model.mask_id, 0, other[:, place])
        moved[words] = _distance(_logits(model, rows)[:, middle], _logits(model, other)[:, middle])
    evidence = ", ".join(f"{words} {value:.1e} nats" for words, value in moved.items())
    yield Finding("model", model.name, "sees both sides of [MASK]", "random tokens", evidence,
                  holds=min(moved.values()) > _SEEN, claimed=not model.is_causal)  # fmt: skip
