"""Categorical sampling, from logits to tokens: temperature, top-k, top-p, and one random number per token.

A token is sampled by inverting its distribution function, which has the same law as the published Gumbel-max,
argmax exp(logit) / (-log u)^temperature, at one uniform number per position in place of one per vocabulary entry (float64
noise and logarithms over the whole vocabulary take most of the published loop's time). Sums are in float64. Nothing here
waits for the device.

N positions, K vocabulary that may be sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_gpt.sampling.settings import Sampling

TOKEN = 0
"""The purpose of a token's random number, in the place of its last key."""
_BLOCK = 128
"""Entries that are searched together: two short searches in place of one over the whole vocabulary (measured)."""


@dataclass(frozen=True)
class SampledTokens:
    """What was sampled at N positions."""

    token_ids: Tensor
    """(N,) int64."""
    confidence: Tensor
    """(N,) float64: softmax(logits) of the token, at temperature 1."""
    measure: Tensor | None
    """(N,): what was to be measured of each distribution; None for nothing."""
    finite: Tensor
    """Scalar bool: whether all logits were finite numbers; else the rest means nothing."""


def sample_tokens(
    chunks: Iterator[Tensor],
    uniforms: Tensor | None,
    sampling: Sampling,
    vocab_size: int,
    forbidden: tuple[Tensor, int] | None = None,
    measure: Callable[[Tensor], Tensor] | None = None,
) -> SampledTokens:
    """Sample a token at every position.

    Args:
        chunks: logits (n, V) in the order of the positions; may be overwritten.
        uniforms: (N,) float64 in [0, 1); unused at temperature 0, where None will do.
        sampling: temperature and filters.
        vocab_size: K; ids from here on are never sampled.
        forbidden: (N,) bool and a token id that may not be sampled where it is True.
        measure: log-probabilities (n, K) to whatever else must be known of them, (n,).
    """
    tokens, confidences, measures, totals = [], [], [], []
    start = 0
    for chunk in chunks:
        part = slice(start, start := start + len(chunk))
        logits = chunk[:, :vocab_size]
        if forbidden is not None:
            logits[:, forbidden[1]].masked_fill_(forbidden[0][part], -torch.inf)
        likeliest = _likeliest(logits)
        best = logits.gather(1, likeliest)
        # The logsumexp, which would look for the largest logit once more.
        shares = (logits - best).exp_()
        total = shares.sum(1).log_() + best.squeeze(1)
        totals.append(total)
        if sampling.temperature == 0:
            chosen = likeliest.squeeze(1)
        else:
            assert uniforms is not None
            temperature = sampling.temperature
            weights = shares if temperature == 1 else ((logits - best) / temperature).exp_()
            chosen = _invert(_filtered(weights, sampling), uniforms[part])
        tokens.append(chosen)
        picked = logits.gather(1, chosen[:, None]).squeeze(1)
        confidences.append((picked.double() - total.double()).exp())
        if measure is not None:
            measures.append(measure(logits - total[:, None]))
    finite = torch.cat(totals).isfinite().all()
    return SampledTokens(torch.cat(tokens), torch.cat(confidences), torch.cat(measures) if measures else None, finite)


def _likeliest(logits: Tensor) -> Tensor:
    """Where each row's largest logit is, (n, 1); the first one among equals."""
    if logits.size(1) % _BLOCK:
        return logits.argmax(1, keepdim=True)
    # Two steps: on a CPU an index costs six times the maximum (120 rows of 32000: 2.1 ms, 0.3 ms).
    blocks = logits.unflatten(1, (-1, _BLOCK))
    block = blocks.amax(2).argmax(1, keepdim=True)
    inner = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK)).squeeze(1)
    return block * _BLOCK + inner.argmax(1, keepdim=True)


def _filtered(weights: Tensor, sampling: Sampling) -> Tensor:
    """Unnormalised probabilities (n, K), those filtered out set to 0."""
    if 0 < sampling.top_k < weights.size(1):
        least = weights.topk(sampling.top_k, dim=1).values[:, -1:]
        weights = weights.masked_fill(weights < least, 0.0)
    if sampling.top_p < 1:
        needed = sampling.top_p * weights.sum(1, keepdim=True, dtype=torch.float64)
        ordered = _descending(weights)
        before = ordered.double().cumsum(1) - ordered
        # The likeliest token is always kept; equal ones stand or fall together.
        least = ordered.masked_fill(before >= needed, torch.inf).min(1, keepdim=True).values
        least = torch.minimum(least, ordered[:, :1])
        weights = weights.masked_fill(weights < least, 0.0)
    return weights


def _descending(weights: Tensor) -> Tensor:
    """Every row sorted, the largest first."""
    if weights.device.type == "cpu":
        # 120 rows of 32000: 9 ms, by torch 200; its `topk` of the first 512 takes 28.
        return torch.from_numpy(np.sort(weights.numpy(), axis=1)).flip(1)
    return weights.sort(dim=1, descending=True).values


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative weight passes u times the total, (n,)."""
    padded = torch.nn.functional.pad(weights, (0, -weights.size(1) % _BLOCK)).view(len(weights), -1, _BLOCK)
    sums = padded.sum(2, dtype=torch.float64).cumsum(1)
    target = uniforms[:, None] * sums[:, -1:]
    block = torch.searchsorted(sums, target, right=True).clamp(max=sums.size(1) - 1)
    inner = padded.gather(1, block[..., None].expand(-1, 1, _BLOCK)).squeeze(1).double().cumsum(1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    # Just below the block's own sum, so that rounding cannot lead to an entry of weight 0 behind its last one.
    rest = torch.minimum(target - before, inner[:, -1:].nextafter(torch.zeros_like(inner[:, -1:])))
    return (block * _BLOCK + torch.searchsorted(inner, rest, right=True)).squeeze(1).clamp(max=weights.size(1) - 1)
