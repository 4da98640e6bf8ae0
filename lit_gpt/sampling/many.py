"""Many prompts through one model: a finished row's place is taken by the next prompt.

Decisions: nothing is computed behind where a text is decided; a row's tokens depend on its own number and prompt alone
(`sample`), so that no batch changes them, nor one that is computed again in halves after memory ran out; a batch holds no
rows below half of its longest one's length; what a text is, and where it ends, the caller knows. Where keys and values of
whole batches are kept (an MDM's block caches), or an ARM's are not, a batch ends before the next one begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_gpt.devices import check_halvable
from lit_gpt.model.causal import GPT
from lit_gpt.model.layers import Transformer
from lit_gpt.sampling.denoising import Denoising
from lit_gpt.sampling.sample import mdm_logits, sample_states
from lit_gpt.sampling.sequence import SampleRequest, State, context_lengths, masked_sequences
from lit_gpt.sampling.settings import Sampling
from lit_gpt.sampling.slots import SlotSampler

SAMPLING_VERSION = 1
"""Raised whenever the same settings write other tokens: kept texts of another version are not served."""


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
    if requests:
        context_lengths([one.prompt for one in requests], [one.length for one in requests], model.config)
    # Rows of about the same length waste the least, and the longest show at once whether memory suffices.
    order = sorted(range(len(requests)), key=lambda number: (-requests[number].length, -len(requests[number].prompt)))
    waiting = dict.fromkeys(order)
    while waiting:
        length = requests[next(iter(waiting))].length
        # A much shorter row would be read in columns of the longest: it waits for a batch of more rows.
        todo = [(number, requests[number]) for number in waiting if 2 * requests[number].length >= length]
        rows = min(len(todo), max(1, batch_tokens // length))
        try:
            if isinstance(model, GPT) and sampling.use_cache and not sampling.cfg_scale:
                found = SlotSampler(model, sampling, stop_id, rows, length).write(todo)
            elif model.kind == "mdm" and sampling.cache == "none":
                found = _refilled(model, todo, sampling, stop_id, rows)
            else:
                found = _batch(model, todo[:rows], sampling, stop_id)
            for number, new in found:
                del waiting[number]
                yield number, new
        except RuntimeError as error:
            check_halvable(error, rows, length, next(model.parameters()).device)
            batch_tokens = rows // 2 * length


def _batch(
    model: Transformer, numbered: Sequence[tuple[int, SampleRequest]], sampling: Sampling, stop_id: int
) -> Iterator[tuple[int, list[int]]]:
    """(number, new tokens) of requests that are computed together, once all of them are done."""
    requests = [request for _, request in numbered]
    prompts, lengths, rows = ([getattr(one, name) for one in requests] for name in ("prompt", "length", "row"))
    undecided = set(range(len(requests)))
    new: list[list[int]] = [[] for _ in requests]
    watched = all(one.is_decided is not None for one in requests)
    for state in sample_states(model, prompts, sampling, lengths, stop_id, rows):
        if watched:
            final = _final_tokens(model, state)
            for place in sorted(undecided):
                request = requests[place]
                new[place] = final[place][len(request.prompt) :]
                if request.is_decided is not None and request.is_decided(new[place]):
                    undecided.remove(place)
            if not undecided:
                break
    for place, ids in enumerate(state.tokens()):
        whole = ids[len(prompts[place]) :].tolist()
        yield numbered[place][0], whole if place in undecided else new[place]


def _refilled(
    model: Transformer,
    numbered: Sequence[tuple[int, SampleRequest]],
    sampling: Sampling,
    stop_id: int,
    rows: int,
) -> Iterator[tuple[int, list[int]]]:
    """(number, new tokens) of an MDM's requests, the longest of which comes first, so many rows at a time."""
    waiting, width = list(numbered), numbered[0][1].length
    logits_fn = mdm_logits(model, sampling)
    device = next(model.parameters()).device

    def begun(requests: Sequence[SampleRequest]) -> Denoising:
        prompts, lengths, names = ([getattr(one, name) for one in requests] for name in ("prompt", "length", "row"))
        sequences = masked_sequences(prompts, lengths, model.config.mask_id, names, device, width)
        return Denoising(logits_fn, sequences, sampling, model.config.vocab_size, stop_id)

    active, waiting = waiting[:rows], waiting[rows:]
    denoising, done = begun([request for _, request in active]), set[int]()
    while active:
        state = denoising.state()
        state.check()
        final = _final_tokens(model, state)
        kept = []
        for place, (number, request) in enumerate(active):
            new = final[place][len(request.prompt) :]
            if number in done:
                continue
            if len(final[place]) == request.length or (request.is_decided is not None and request.is_decided(new)):
                done.add(number)
                yield number, new
            else:
                kept.append(place)
        joining, waiting = waiting[: rows - len(kept)], waiting[rows - len(kept) :]
        # Finished rows without successors are computed along until they are half of the batch: copying costs, too.
        if joining or 2 * len(kept) <= len(active):
            active = [active[place] for place in kept] + joining
            if not active:
                return
            denoising.regroup(kept, begun([request for _, request in joining]) if joining else None)
        denoising.step()


def _final_tokens(model: Transformer, state: State) -> list[list[int]]:
    """The beginning of each row that no later step changes."""
    final = state.key_mask
    if model.kind == "mdm":
        changeable = state.input_ids == model.config.mask_id if state.changeable is None else state.changeable
        final = final & ((changeable & state.key_mask).cumsum(1) == 0)
    return [ids[keep].tolist() for ids, keep in zip(state.input_ids.cpu(), final.cpu(), strict=True)]
