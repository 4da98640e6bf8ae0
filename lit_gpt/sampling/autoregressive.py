"""Autoregressive sampling (ARM): one token a step behind every row of a batch.

Decisions: the model is a function from new tokens to the next token's logits, so a toy distribution tests the loop
exactly, and keeping keys and values is a function around it; a token's random number depends on its row's number and its
position in the row, so that neither a longer prompt beside it nor the cache changes it.

B rows, T tokens, S tokens so far, V padded vocabulary, K real vocabulary (ids that may be sampled).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lit_gpt.model.causal import GPT
from lit_gpt.randomness import Stream, uniform
from lit_gpt.sampling.categorical import TOKEN, sample_tokens
from lit_gpt.sampling.kv_cache import KVCache, compute_dtype_of
from lit_gpt.sampling.sequence import PartialSequences, State
from lit_gpt.sampling.settings import Sampling

NextLogitsFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(input_ids (B, T) int64, positions (B, T) int64, key_mask (B, S) bool or None) -> logits (B, T or 1, V)."""


@torch.no_grad()
def extend(
    logits_fn: NextLogitsFn,
    prompts: PartialSequences,
    new_tokens: Sequence[int],
    sampling: Sampling,
    vocab_size: int,
    stop_id: int | None = None,
) -> Iterator[State]:
    """Autoregressive sampling: one token a step behind every row, until it stops or is full.

    Args:
        logits_fn: called with the tokens it has not seen yet (the prompts, then one column at a time) and a key mask
            over all; only its last column is read. See `cached` and `recomputed`.
        prompts: from `prompt_sequences`.
        new_tokens: how many tokens each row gets at most.
        sampling: temperature, seed and filters.
        vocab_size: K; ids from here on are never sampled.
        stop_id: a row ends with this token; None: each row gets all of its tokens.

    Yields:
        The state before the first step, then one after each.

    Raises:
        ValueError: the model's logits are no finite numbers; said when a state's tokens are looked at, or at the end.
    """
    device = prompts.input_ids.device
    input_ids, positions, key_mask = prompts.input_ids, prompts.positions, prompts.key_mask
    confidence, finite = prompts.prompt_mask.float(), torch.ones((), dtype=torch.bool, device=device)
    limit = torch.tensor(list(new_tokens), device=device)
    unfinished, unseen, forbidden, uniforms = limit > 0, input_ids.size(1), None, None
    yield State(0, input_ids, confidence, key_mask)
    for step in range(max(new_tokens, default=0)):
        if not bool(unfinished.any()):
            break
        logits = logits_fn(input_ids[:, -unseen:], positions[:, -unseen:], None if bool(key_mask.all()) else key_mask)
        position = positions[:, -1:] + 1
        if sampling.temperature:
            # A token's key is its position in the row, not the step: a longer prompt beside it changes nothing.
            uniforms = uniform(sampling.seed, int(Stream.SAMPLER), 0, prompts.rows, position[:, 0], TOKEN)
        if stop_id is not None:
            forbidden = torch.full_like(unfinished, step < sampling.min_new_tokens), stop_id
        sampled = sample_tokens(iter([logits[:, -1]]), uniforms, sampling, vocab_size, forbidden)
        written = unfinished[:, None]
        # A row that has stopped stays where it is: its position may not run out of the block.
        input_ids = torch.cat((input_ids, torch.where(written, sampled.token_ids[:, None], 0)), 1)
        positions = torch.cat((positions, torch.where(written, position, 0)), 1)
        confidence = torch.cat((confidence, torch.where(written, sampled.confidence[:, None].float(), 0)), 1)
        key_mask, finite, unseen = torch.cat((key_mask, written), 1), finite & sampled.finite, 1
        unfinished = unfinished & (limit > step + 1)
        if stop_id is not None:
            unfinished = unfinished & (sampled.token_ids != stop_id)
        yield State(step + 1, input_ids, confidence, key_mask, finite)
    State(0, input_ids, confidence, key_mask, finite).check()


def cached(model: GPT, batch: int, capacity: int) -> NextLogitsFn:
    """The model as `extend` calls it, with keys and values kept; returns the last column's logits, (B, 1, V).

    Args:
        model: the ARM.
        batch: B.
        capacity: columns of the finished prompts.
    """
    cache = KVCache(model.config, batch, capacity, model.lm_head.weight.device, compute_dtype_of(model))

    def last_logits(input_ids: Tensor, positions: Tensor, key_mask: Tensor | None) -> Tensor:
        hidden = model.hidden_states(input_ids, positions, model.visibility.padded(key_mask), cache)
        return model.lm_head(hidden[:, -1:])  # type: ignore[no-any-return]

    return last_logits


def recomputed(logits_fn: NextLogitsFn) -> NextLogitsFn:
    """A function of whole rows as `extend` calls it: it remembers what it was given and reads all of it each time."""
    seen: list[tuple[Tensor, Tensor]] = []

    def all_logits(input_ids: Tensor, positions: Tensor, key_mask: Tensor | None) -> Tensor:
        seen.append((input_ids, positions))
        return logits_fn(torch.cat([ids for ids, _ in seen], 1), torch.cat([at for _, at in seen], 1), key_mask)

    return all_logits
