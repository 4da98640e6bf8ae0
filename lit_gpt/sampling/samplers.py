"""Every sampler: a batch of prompts of different lengths in, tokens out, one state per step for whoever watches.

Decisions:

- Samplers see a model only as a function from a batch to logits at chosen positions (`reading`), so a toy distribution
  tests them exactly, and guidance or a cache is a function around it.
- A row's tokens depend on its own number and prompt alone: random numbers are hashes of (seed, step, row, position in
  the row), and padding is masked (`canvas`).
- A masked-diffusion algorithm is one function, from the model's certainty to the positions that are revealed
  (`algorithms`); blocks, caches, remasking, guidance and filters go with all of them.
- Only what a step may reveal is computed; a step that reveals nothing is not computed at all.

May import algorithms, block_cache, canvas, config, denoising, drawing, layers, model, noise and reading only.

B rows, T tokens, L new tokens, V padded vocabulary, K real vocabulary (ids that may be sampled), N masked positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lit_gpt.model.causal import GPT
from lit_gpt.model.layers import Transformer
from lit_gpt.model.logits import LogitsFn, guided, model_logits
from lit_gpt.randomness import Stream, uniform
from lit_gpt.sampling.block_cache import block_cached
from lit_gpt.sampling.categorical import Drawing, draw
from lit_gpt.sampling.denoising import TOKEN, denoise
from lit_gpt.sampling.kv_cache import KVCache
from lit_gpt.sampling.sequence import Canvas, State, context_lengths, masked_canvas, prompt_canvas
from lit_gpt.sampling.settings import Sampling

NextLogitsFn = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(input_ids (B, T) int64, positions (B, T) int64, key_mask (B, S) bool or None) -> logits (B, T or 1, V)."""


def sample(
    model: Transformer,
    prompts: Sequence[Sequence[int] | Tensor],
    sampling: Sampling,
    rows: Sequence[int] | None = None,
    on_state: Callable[[State], None] | None = None,
) -> list[Tensor]:
    """Complete a batch of prompts with an ARM or an MDM.

    Args:
        model: a `GPT` or a `TransEncoder`; the batch is read on its device.
        prompts: token ids per row, of any lengths (an MDM's may be empty).
        sampling: how.
        rows: each row's number, which decides its random stream; None numbers them from 0. A row with the same number
            and prompt gets the same tokens in any batch.
        on_state: called with every `State`, the first one before the first step.

    Returns:
        One (L_i,) int64 tensor per row: the prompt and what follows; an MDM's row always has the context length, an
        ARM's ends with the stop token if that came earlier.

    Raises:
        ValueError: as `sample_states`.
    """
    for state in sample_states(model, prompts, sampling, rows):
        if on_state is not None:
            on_state(state)
    return state.tokens()


def sample_states(
    model: Transformer,
    prompts: Sequence[Sequence[int] | Tensor],
    sampling: Sampling,
    rows: Sequence[int] | None = None,
) -> Iterator[State]:
    """`sample`, as the sequence of its states: one before the first step and one after each.

    Args are those of `sample`.

    Returns:
        The states; the last one's `tokens()` is the result. Arguments are checked before this returns.

    Raises:
        ValueError: a prompt longer than the context, a context longer than the model's block size, ids that are no
            tokens of the model, guidance for an ARM, or an empty prompt for one.
    """
    config, device = model.config, next(model.parameters()).device
    lengths = context_lengths(prompts, sampling.context_length, config)
    if isinstance(model, GPT):
        if sampling.cfg_scale:
            raise ValueError(
                f"sampling: cfg_scale {sampling.cfg_scale} needs an MDM: an ARM cannot read a masked prompt"
            )
        canvas = prompt_canvas(prompts, rows, device)
        new = [total - len(prompt) for total, prompt in zip(lengths, prompts, strict=True)]
        logits_fn = (
            cached(model, len(new), canvas.input_ids.size(1) + max(new))
            if sampling.use_cache
            else recomputed(lambda ids, positions, mask: model(ids, positions, model.visibility.padded(mask)))
        )
        return extend(logits_fn, canvas, new, sampling, config.vocab_size)
    return denoise(
        mdm_logits(model, sampling),
        masked_canvas(prompts, lengths, config.mask_id, rows, device),
        sampling,
        config.vocab_size,
    )


def mdm_logits(model: Transformer, sampling: Sampling) -> LogitsFn:
    """An MDM as `denoise` calls it, with the guidance and the cache of some settings."""
    inner = model_logits(model) if sampling.cache == "none" else block_cached(model)
    return guided(inner, sampling.cfg_scale, model.config.mask_id)


@torch.no_grad()
def extend(
    logits_fn: NextLogitsFn, canvas: Canvas, new_tokens: Sequence[int], sampling: Sampling, vocab_size: int
) -> Iterator[State]:
    """Autoregressive sampling: one token a step behind every row, until it stops or is full.

    Args:
        logits_fn: called with the tokens it has not seen yet (the prompts, then one column at a time) and a key mask
            over all; only its last column is read. See `cached` and `recomputed`.
        canvas: prompts from `prompt_canvas`.
        new_tokens: how many tokens each row gets at most.
        sampling: temperature, seed, stop_id.
        vocab_size: K; ids from here on are never sampled.

    Yields:
        The state before the first step, then one after each.

    Raises:
        ValueError: the model's logits are no finite numbers; said when a state's tokens are looked at, or at the end.
    """
    device, how = canvas.input_ids.device, Drawing(sampling.temperature, sampling.top_k, sampling.top_p)
    input_ids, key_mask, confidence = canvas.input_ids, canvas.key_mask, canvas.prompt_mask.float()
    positions = canvas.positions
    limit = torch.tensor(list(new_tokens), device=device)
    open_rows = limit > 0
    state = State(0, input_ids, confidence, key_mask)
    yield state
    finite = torch.ones((), dtype=torch.bool, device=device)
    unseen = input_ids.size(1)
    everyone = torch.ones(len(limit), 1, dtype=torch.bool, device=device)
    for step in range(max(new_tokens, default=0)):
        if not bool(open_rows.any()):
            break
        logits = logits_fn(input_ids[:, -unseen:], positions[:, -unseen:], None if bool(key_mask.all()) else key_mask)
        position = positions[:, -1:] + 1
        # A token's key is its position in the row, not the step: a longer prompt beside it changes nothing.
        uniforms = None
        if sampling.temperature:
            uniforms = uniform(sampling.seed, int(Stream.SAMPLER), 0, canvas.rows, position[:, 0], TOKEN)
        forbidden = None
        if step < sampling.min_new_tokens and sampling.stop_id is not None:
            forbidden = everyone[:, 0], sampling.stop_id
        drawn = draw(iter([logits[:, -1]]), uniforms, how, vocab_size, forbidden)
        token_ids, probability, finite = drawn.token_ids, drawn.confidence, finite & drawn.finite
        written = open_rows[:, None]
        input_ids = torch.cat((input_ids, torch.where(written, token_ids[:, None], 0)), 1)
        confidence = torch.cat((confidence, torch.where(written, probability[:, None].float(), 0)), 1)
        # A row that has stopped stays where it is: its position may not run out of the block.
        positions = torch.cat((positions, torch.where(written, position, 0)), 1)
        key_mask = torch.cat((key_mask, written), 1)
        open_rows = open_rows & (limit > step + 1)
        if sampling.stop_id is not None:
            open_rows = open_rows & (token_ids != sampling.stop_id)
        unseen = 1
        state = State(step + 1, input_ids, confidence, key_mask, finite)
        yield state
    state.check()


def cached(model: GPT, batch: int, capacity: int) -> NextLogitsFn:
    """The model as `extend` calls it, with keys and values kept; returns the last column's logits, (B, 1, V).

    Args:
        model: the ARM.
        batch: B.
        capacity: columns of the finished canvas.
    """
    weight = model.lm_head.weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    cache = KVCache(model.config, batch, capacity, weight.device, dtype)

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
