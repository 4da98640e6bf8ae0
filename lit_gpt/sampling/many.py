"""Many prompts through one model: batches of about equal rows, each ended as soon as all its texts are decided.

Decisions: a row's tokens depend on its own number and prompt alone (`sample`), so neither the batches nor a batch that is
computed again in halves after memory ran out change them; what a text is, and where it ends, the caller knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lit_gpt.devices import is_out_of_memory
from lit_gpt.model.layers import Transformer
from lit_gpt.sampling.sample import sample_states
from lit_gpt.sampling.sequence import State
from lit_gpt.sampling.settings import Sampling


@dataclass(frozen=True)
class SampleRequest:
    """One prompt to complete."""

    prompt: Sequence[int]
    """Token ids."""
    length: int
    """Tokens of the finished row, prompt included."""
    row: int
    """The row's number, which decides its random numbers."""
    is_decided: Callable[[list[int]], bool] | None = None
    """Given the first new tokens, as far as they are final: whether nothing behind them counts. None: all tokens count."""


def sample_many(
    model: Transformer, requests: Sequence[SampleRequest], sampling: Sampling, stop_id: int, batch_tokens: int
) -> Iterator[tuple[int, list[int]]]:
    """Complete prompts.

    Args:
        model: an ARM or an MDM.
        requests: in any order.
        sampling: how.
        stop_id: the end token.
        batch_tokens: tokens of a batch, padding included; halved for the rest when memory runs out.

    Yields:
        (number of the request, its new tokens) as they are done: up to the row's end, or at least up to where they were
        decided.

    Raises:
        ValueError: as `sample`; a single row does not fit into memory.
    """
    # Rows of about the same length waste the least, and the longest show at once whether memory suffices.
    order = sorted(range(len(requests)), key=lambda number: (-requests[number].length, -len(requests[number].prompt)))
    start, shrunk = 0, batch_tokens
    while start < len(order):
        length = requests[order[start]].length
        numbers = order[start : start + max(1, shrunk // length)]
        try:
            found = _batch(model, [requests[number] for number in numbers], sampling, stop_id)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(numbers) == 1:
                device = next(model.parameters()).device
                raise ValueError(f"a row of {length} tokens does not fit into the memory of {device}") from None
            shrunk = len(numbers) // 2 * length
            continue
        start += len(numbers)
        yield from zip(numbers, found, strict=True)


def _batch(model: Transformer, requests: Sequence[SampleRequest], sampling: Sampling, stop_id: int) -> list[list[int]]:
    """The new tokens of requests that are computed together."""
    prompts, lengths, rows = ([getattr(one, name) for one in requests] for name in ("prompt", "length", "row"))
    open_numbers = set(range(len(requests)))
    new: list[list[int]] = [[] for _ in requests]
    watched = all(one.is_decided is not None for one in requests)
    for state in sample_states(model, prompts, sampling, lengths, stop_id, rows):
        last = state
        if not watched:
            continue
        final = _final_tokens(model, state)
        for number in sorted(open_numbers):
            request = requests[number]
            new[number] = final[number][len(request.prompt) :]
            assert request.is_decided is not None
            if request.is_decided(new[number]):
                open_numbers.remove(number)
        if not open_numbers:
            state.check()
            return new
    whole = [ids.tolist() for ids in last.tokens()]
    return [
        whole[number][len(request.prompt) :] if number in open_numbers else new[number]
        for number, request in enumerate(requests)
    ]


def _final_tokens(model: Transformer, state: State) -> list[list[int]]:
    """The beginning of each row that no later step changes."""
    final = state.key_mask
    if model.kind == "mdm":
        changeable = state.input_ids == model.config.mask_id if state.changeable is None else state.changeable
        final = final & ((changeable & state.key_mask).cumsum(1) == 0)
    return [ids[keep].tolist() for ids, keep in zip(state.input_ids.cpu(), final.cpu(), strict=True)]
