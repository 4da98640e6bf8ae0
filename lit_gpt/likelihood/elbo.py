"""The bound on one text's likelihood under any masked model, given as a function from tokens to logits.

For models that are not this package's, from any library: the estimator is `exact`, everything else is the caller's. The
rows of the estimate are read some at a time, so that a large vocabulary does not fill the memory.

R rows (masked copies of the text), T tokens of prefix and target, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.likelihood.exact import ExactBound
from lit_gpt.likelihood.loglikelihood import LikelihoodRequest, LikelihoodSettings, masking_plan, mdm_likelihoods
from lit_gpt.likelihood.scoring import ScoringModel
from lit_gpt.model.logits import LogitsBatch, LogitsFn

TokensToLogits = Callable[[Tensor], Tensor]
"""(R, T) int64 to (R, T, V): position t holds the logits of the token at t, as masked models have it."""

# 1 GB of logits in float32: choices that bound memory, not measurements.
_LOGITS_AT_ONCE = 2**28
_TOKENS_AT_ONCE = 8192
# Stands for a logit of -inf: e to this power is 0, and sums stay numbers.
_IMPOSSIBLE = -1e30


@dataclass(frozen=True)
class BoundEstimate:
    """An estimate of the bound on a target's negative log-likelihood."""

    nll: float
    """Nats, summed over the target's tokens: an upper bound on -log p(target | prefix)."""
    standard_error: float
    """Of the estimator, nats; 0 where every mask was read."""
    passes: int
    """Rows that the model read."""


@torch.no_grad()
def elbo(
    logits_fn: TokensToLogits,
    prefix: Sequence[int] | Tensor,
    target: Sequence[int] | Tensor,
    *,
    mask_id: int,
    budget: int = ExactBound.budget,
    seed: int = LikelihoodSettings.seed,
) -> BoundEstimate:
    """The bound sum over k = 1..L of (1/k) E over masks M of k tokens of [sum over i in M of -log p(target_i)], in nats.

    Args:
        logits_fn: the model: (R, T) int64 tokens, [MASK] among them, to (R, T, V) logits. A row's logits must not depend
            on the other rows: put the model into evaluation mode. A logit of -inf excludes a token, as some models do
            with [MASK].
        prefix: (P,) token ids, never masked; may be empty.
        target: (L,) token ids, at least one. The tokens that `logits_fn` gets are on the target's device.
        mask_id: id of [MASK].
        budget: rows that may be read; with 2^L - 1 or more the bound is exact.
        seed: of the random masks; the same seed gives the same masks for all targets behind a prefix.

    Raises:
        ValueError: an empty target, one with [MASK] in it, with a token that the model excludes or that has no column in
            the logits, an id below 0, a budget below 2, logits of another shape, NaN or infinite.
    """
    device = target.device if isinstance(target, Tensor) else "cpu"
    before, scored = (tuple(torch.as_tensor(ids, dtype=torch.int64).flatten().tolist()) for ids in (prefix, target))
    if not scored or mask_id in scored:
        raise ValueError(f"elbo: the target {'holds the mask' if scored else 'is empty'}: it must be tokens of a text")
    for name, ids in (("prefix", before), ("target", scored)):
        if ids and min(ids) < 0:
            raise ValueError(f"elbo: the {name} holds the id {min(ids)}: ids count from 0")
    settings, request = LikelihoodSettings(ExactBound(budget), seed=seed), LikelihoodRequest(before, scored)
    # All columns of the logits are tokens, however many there are.
    scoring_model = ScoringModel(
        _at_indices(logits_fn, max(scored)), mask_id, sys.maxsize, _TOKENS_AT_ONCE, device, may_be_uniform=True
    )
    ((_, result),) = mdm_likelihoods(scoring_model, [request], settings)
    if result.nll > math.sqrt(-_IMPOSSIBLE):
        raise ValueError("elbo: the model excludes a token of the target: its logit is -inf")
    return BoundEstimate(result.nll, result.standard_error, len(masking_plan(settings, request).masks))


def _at_indices(logits_fn: TokensToLogits, largest_target: int) -> LogitsFn:
    """The same model as likelihoods use one: logits at the wanted positions, some rows at a time.

    Raises:
        ValueError: logits of another shape, or without a column for the target's largest id.
    """

    def logits(batch: LogitsBatch) -> Iterator[Tensor]:
        rows, length = batch.input_ids.shape
        start, at_once = 0, 1  # one row tells the size of the vocabulary
        while start < rows:
            part = batch.input_ids[start : start + at_once]
            found = logits_fn(part)
            if found.shape[:2] != part.shape or found.dim() != 3:
                raise ValueError(
                    f"elbo: logits_fn returned {tuple(found.shape)} for tokens {tuple(part.shape)}: expected (R, T, V)"
                )
            if largest_target >= found.size(2):
                raise ValueError(
                    f"elbo: the target holds the id {largest_target}: the logits are of {found.size(2)} tokens"
                )
            here = (batch.indices >= start * length) & (batch.indices < (start + len(part)) * length)
            wanted = found.flatten(0, 1)[batch.indices[here] - start * length].float()
            yield wanted.masked_fill(wanted == -math.inf, _IMPOSSIBLE)
            start, at_once = start + len(part), max(1, _LOGITS_AT_ONCE // (length * found.size(2)))

    return logits
