"""Autoregressive sampling of many prompts in a fixed number of slots: a finished row's place is taken by the next prompt.

Decisions: a row stands in the first columns of its slot, so that rows of different lengths share a forward pass without
padding on the left; its tokens have the random numbers of `autoregressive.extend`, so that neither its slot nor its
neighbours change them. A step waits for the device once, for its tokens.

B slots, T tokens, S columns in use, G query groups, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_gpt.model.causal import GPT
from lit_gpt.randomness import Stream, uniform
from lit_gpt.sampling.categorical import TOKEN, sample_tokens
from lit_gpt.sampling.kv_cache import KVCache, compute_dtype_of
from lit_gpt.sampling.sequence import SampleRequest, check_finite_logits
from lit_gpt.sampling.settings import Sampling


class SlotCache:
    """Keys and values of B rows that each stand in the first columns; see `layers.KeyValueCache`.

    Attributes:
        columns: (B,) int64, where each row's next token is written.
        used: S, columns that any row uses, the next tokens' included.
    """

    def __init__(self, model: GPT, slots: int, capacity: int) -> None:
        config, weight = model.config, model.lm_head.weight
        shape = (slots, config.n_query_groups, capacity, config.head_size)
        dtype = compute_dtype_of(model)
        self.layers = [
            (
                torch.zeros(shape, device=weight.device, dtype=dtype),
                torch.zeros(shape, device=weight.device, dtype=dtype),
            )
            for _ in range(config.n_layer)
        ]
        self.columns, self.used = torch.zeros(slots, dtype=torch.int64, device=weight.device), 1

    def total_columns(self, new_tokens: int) -> int:
        """S."""
        return self.used

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, G, 1, D) at each row's column; returns the columns in use."""
        index = self.columns[:, None, None, None].expand_as(k)
        for kept, new in zip(self.layers[layer], (k, v), strict=True):
            kept.scatter_(2, index, new)
        keys, values = self.layers[layer]
        return keys[:, :, : self.used], values[:, :, : self.used]

    def put(self, slots: Tensor, read: KVCache) -> None:
        """Put the rows that another cache has read into slots (n,)."""
        for own, new in zip(self.layers, read.layers, strict=True):
            for kept, rows in zip(own, new, strict=True):
                kept[slots, :, : read.length] = rows[:, :, : read.length]

    def select(self, slots: Tensor) -> None:
        """Keep some slots alone."""
        self.layers = [(keys[slots], values[slots]) for keys, values in self.layers]
        self.columns = self.columns[slots]


@dataclass
class _Row:
    """A row that is being written."""

    number: int
    """Of its request."""
    request: SampleRequest
    new: list[int] = field(default_factory=list)

    def is_done(self, stop_id: int) -> bool:
        """Whether nothing is to be written behind the last token."""
        decided = self.request.is_decided
        full = len(self.request.prompt) + len(self.new) >= self.request.length
        return full or self.new[-1] == stop_id or (decided is not None and decided(self.new))


def _room(request: SampleRequest) -> int:
    """New tokens for which a request has room."""
    return request.length - len(request.prompt)


class SlotSampler:
    """An ARM that writes rows in slots.

    Args:
        model: the ARM.
        sampling: how.
        stop_id: the end token.
        slots: rows at once.
        capacity: tokens of the longest row.
    """

    def __init__(self, model: GPT, sampling: Sampling, stop_id: int, slots: int, capacity: int) -> None:
        self._model, self._sampling, self._stop_id = model, sampling, stop_id
        self._cache = SlotCache(model, slots, capacity)
        self._rows: list[_Row | None] = [None] * slots

    @torch.no_grad()
    def write(self, requests: Sequence[tuple[int, SampleRequest]]) -> Iterator[tuple[int, list[int]]]:
        """Write rows, in any order of finishing.

        Args:
            requests: (number, request), in the order in which they get a slot.

        Yields:
            (number, new tokens).
        """
        yield from ((number, []) for number, request in requests if not _room(request))
        waiting = [one for one in reversed(requests) if _room(one[1])]
        while waiting or any(self._rows):
            free = [slot for slot, row in enumerate(self._rows) if row is None]
            if waiting and free:
                taken = [(slot, _Row(*waiting.pop())) for slot in free if waiting]
                yield from self._keep(taken, self._begin(taken))
            elif not waiting and 2 * len(free) >= len(self._rows):
                self._shrink()
            active = [(slot, row) for slot, row in enumerate(self._rows) if row is not None]
            if active:
                yield from self._keep(active, self._step(active))

    def _keep(self, rows: Sequence[tuple[int, _Row]], tokens: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Append a token to each row; those that are done leave their slots."""
        finished = []
        for (slot, row), token in zip(rows, tokens, strict=True):
            row.new.append(token)
            self._rows[slot] = row
            if row.is_done(self._stop_id):
                self._rows[slot] = None
                finished.append((row.number, row.new))
        yield from finished

    def _begin(self, rows: Sequence[tuple[int, _Row]]) -> list[int]:
        """Read the prompts of rows into their slots; returns each one's first new token."""
        device = self._cache.columns.device
        prompts = [torch.as_tensor(row.request.prompt, dtype=torch.int64) for _, row in rows]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)
        read = KVCache(self._model.config, len(rows), ids.size(1), device, compute_dtype_of(self._model))
        positions = torch.arange(ids.size(1), device=device).expand_as(ids)
        # What pads a row stands behind it, where a causal model does not look.
        hidden = self._model.hidden_states(ids, positions, self._model.visibility, read)
        self._cache.put(torch.tensor([slot for slot, _ in rows], device=device), read)
        return self._sampled(hidden[torch.arange(len(rows), device=device), lengths - 1], rows)

    def _step(self, rows: Sequence[tuple[int, _Row]]) -> list[int]:
        """The next token of each row, from its last one; empty slots are computed along."""
        device, slots = self._cache.columns.device, len(self._rows)
        last, columns = torch.zeros(slots, dtype=torch.int64), torch.zeros(slots, dtype=torch.int64)
        for slot, row in rows:
            last[slot], columns[slot] = row.new[-1], len(row.request.prompt) + len(row.new) - 1
        self._cache.used = int(columns.max()) + 1
        self._cache.columns = columns.to(device)
        key_mask = torch.arange(self._cache.used, device=device) <= self._cache.columns[:, None]
        visibility = self._model.visibility.padded(key_mask)
        positions = self._cache.columns[:, None]
        hidden = self._model.hidden_states(last[:, None].to(device), positions, visibility, self._cache)
        return self._sampled(hidden[torch.tensor([slot for slot, _ in rows], device=device), 0], rows)

    def _sampled(self, hidden: Tensor, rows: Sequence[tuple[int, _Row]]) -> list[int]:
        """A token behind each row, from its last hidden state (n, C)."""
        sampling, device = self._sampling, hidden.device
        uniforms = None
        if sampling.temperature:
            numbers = torch.tensor([row.request.row for _, row in rows], device=device)
            places = torch.tensor([len(row.request.prompt) + len(row.new) for _, row in rows], device=device)
            uniforms = uniform(sampling.seed, int(Stream.SAMPLER), 0, numbers, places, TOKEN)
        early = torch.tensor([len(row.new) < sampling.min_new_tokens for _, row in rows], device=device)
        logits = self._model.lm_head(hidden)
        vocabulary = self._model.config.vocab_size
        found = sample_tokens(iter([logits]), uniforms, sampling, vocabulary, (early, self._stop_id))
        # Together, so that a pass waits for the device once.
        *tokens, finite = torch.cat((found.token_ids, found.finite[None].long())).tolist()
        if not finite:
            check_finite_logits(found.finite)
        return tokens

    def _shrink(self) -> None:
        """Give up the empty slots, now that no prompt waits."""
        kept = [slot for slot, row in enumerate(self._rows) if row is not None]
        if kept:
            self._cache.select(torch.tensor(kept, device=self._cache.columns.device))
            self._rows = [self._rows[slot] for slot in kept]
