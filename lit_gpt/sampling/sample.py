"""The entry points: a batch of prompts of different lengths in, tokens out, or one state per step for whoever watches.

Decisions: a model is seen as a function from a batch to logits at chosen positions, so guidance or a cache is a function
around it; a row's tokens depend on its own number and prompt alone, because random numbers are hashes of (seed, step, row,
position in the row) and padding is masked. What a call is about (prompts, context length, end token) is its arguments;
how it samples is a `Sampling`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from torch import Tensor

from lit_gpt.model.causal import GPT
from lit_gpt.model.layers import Transformer
from lit_gpt.model.logits import LogitsFn, guided, model_logits
from lit_gpt.sampling.autoregressive import cached, extend, recomputed
from lit_gpt.sampling.block_cache import block_cached
from lit_gpt.sampling.denoising import denoise
from lit_gpt.sampling.sequence import State, context_lengths, masked_sequences, prompt_sequences
from lit_gpt.sampling.settings import Sampling


def sample(
    model: Transformer,
    prompts: Sequence[Sequence[int] | Tensor],
    sampling: Sampling,
    context_length: int | Sequence[int],
    stop_id: int | None = None,
    rows: Sequence[int] | None = None,
) -> list[Tensor]:
    """Complete a batch of prompts with an ARM or an MDM.

    Args:
        model: a `GPT` or a `TransEncoder`; the batch is read on its device.
        prompts: token ids per row, of any lengths (an MDM's may be empty).
        sampling: how.
        context_length: tokens of the finished row, prompt included; of all rows, or of each.
        stop_id: the end token (the tokenizer's eos): an ARM's row ends with it, an MDM's with early_stop.
        rows: each row's number, which decides its random stream; None numbers them from 0. A row with the same number
            and prompt gets the same tokens in any batch.

    Returns:
        One (L_i,) int64 tensor per row: the prompt and what follows; an MDM's row always has the context length, an
        ARM's ends with the stop token if that came earlier.

    Raises:
        ValueError: as `sample_states`.
    """
    (state,) = deque(sample_states(model, prompts, sampling, context_length, stop_id, rows), maxlen=1)
    return state.tokens()


def sample_states(
    model: Transformer,
    prompts: Sequence[Sequence[int] | Tensor],
    sampling: Sampling,
    context_length: int | Sequence[int],
    stop_id: int | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[State]:
    """`sample`, as the sequence of its states: one before the first step and one after each.

    Args are those of `sample`.

    Returns:
        The states; the last one's `tokens()` is the result. Arguments are checked before this returns.

    Raises:
        ValueError: a prompt longer than the context, a context longer than the model's block size, ids that are no
            tokens of the model, guidance for an ARM, an empty prompt for one, or early stopping without an end token.
    """
    config = model.config
    lengths = context_lengths(prompts, context_length, config)
    if not isinstance(model, GPT):
        return mdm_states(model, prompts, lengths, sampling, stop_id, rows)
    if sampling.cfg_scale:
        raise ValueError(f"sampling: cfg_scale {sampling.cfg_scale} needs an MDM: an ARM cannot read a masked prompt")
    sequences = prompt_sequences(prompts, rows, next(model.parameters()).device)
    new = [total - len(prompt) for total, prompt in zip(lengths, prompts, strict=True)]
    capacity = sequences.input_ids.size(1) + max(new)
    visibility = model.visibility
    logits_fn = (
        cached(model, len(new), capacity)
        if sampling.use_cache
        else recomputed(lambda ids, positions, key_mask: model(ids, positions, visibility.padded(key_mask)))
    )
    return extend(logits_fn, sequences, new, sampling, config.vocab_size, stop_id)


def mdm_states(
    model: Transformer,
    prompts: Sequence[Sequence[int] | Tensor],
    lengths: Sequence[int],
    sampling: Sampling,
    stop_id: int | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[State]:
    """`sample_states` of an MDM, whose prompts may hold [MASK] anywhere, and whose lengths are checked."""
    if sampling.early_stop and stop_id is None:
        raise ValueError("sampling: early_stop needs a stop_id")
    mask_id = model.config.mask_id
    sequences = masked_sequences(prompts, lengths, mask_id, rows, next(model.parameters()).device)
    return denoise(mdm_logits(model, sampling), sequences, sampling, model.config.vocab_size, stop_id)


def mdm_logits(model: Transformer, sampling: Sampling) -> LogitsFn:
    """An MDM as `denoise` calls it, with the guidance and the cache of some settings."""
    inner = model_logits(model) if sampling.cache == "none" else block_cached(model)
    return guided(inner, sampling.cfg_scale, model.config.mask_id)
