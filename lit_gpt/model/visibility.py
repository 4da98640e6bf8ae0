"""Which tokens each token may attend to: causal, full, padding, blocks, or any rule about two columns.

A model has a visibility of its own (`Transformer.visibility`); a batch may bring another. It is turned into the arguments
of the attention kernel once for a forward pass, and it is what FLOPs and memory of attention are counted from.

B rows, T queries, S keys, W chosen queries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

PairRule = Callable[[Tensor, Tensor], Tensor]
"""(query column, key column), int64 tensors that broadcast against each other, to bool: may this query attend to this key?"""


class Visibility(NamedTuple):
    """The keys that a query may attend to: those that meet every condition that is set, and all of them without one.

    Blocks of 4 tokens that see themselves and the blocks before them, for example, are
    `Visibility(rule=lambda query, key: key // 4 <= query // 4)`. A NamedTuple, because Fabric refuses frozen dataclasses
    among the arguments of a forward method.
    """

    causal: bool = False
    """A query attends to its own column and those before it."""
    key_mask: Tensor | None = None
    """(B, S) bool, False where a key is padding; None where none is."""
    rule: PairRule | None = None
    """Any other condition. Make it once and not for every batch: what is counted from it is kept under this function."""

    def padded(self, key_mask: Tensor | None) -> Visibility:
        """The same without the keys where a mask (B, S) is False; None leaves out no key."""
        return self if key_mask is None else self._replace(key_mask=key_mask)

    def attention_arguments(
        self, queries: int | Tensor, keys: int, device: torch.device | None = None
    ) -> tuple[bool, Tensor | None]:
        """`is_causal` and `mask` of `kernels.attention`.

        Args:
            queries: how many of the last columns, or which columns (B, W) int64, the queries stand in.
            keys: S.
            device: of the mask.

        Returns:
            Whether the kernel's own causal mask says everything (T = S); and else the mask, which broadcasts to
            (B, H, T, S), or None where every query attends to every key.
        """
        causal = self.causal
        if isinstance(queries, int):
            # A single query in the last column has no key behind it.
            causal = causal and queries > 1
            if causal and queries == keys and self.key_mask is None and self.rule is None:
                return True, None
        conditions = [] if self.key_mask is None else [self.key_mask[:, None, None, :]]
        if causal or self.rule is not None:
            columns = torch.arange(keys - queries, keys, device=device)[None] if isinstance(queries, int) else queries
            query, key = columns[:, None, :, None], torch.arange(keys, device=device)
            conditions += [key <= query] if causal else []
            conditions += [self.rule(query, key)] if self.rule is not None else []
        return False, functools.reduce(torch.logical_and, conditions) if conditions else None

    def pairs(self, length: int) -> int:
        """Visible (query, key) pairs in a row of `length` tokens; padding counts, since it is computed like any token."""
        if self.rule is not None:
            return _pairs_of_rule(self.rule, self.causal, length)
        return length * (length + 1) // 2 if self.causal else length * length

    def mask_elements(self, length: int) -> int:
        """Elements per row of the mask that attention needs among `length` tokens; 0 where fast kernels know the pattern."""
        return length * length if self.rule is not None or (self.causal and self.key_mask is not None) else 0


@functools.lru_cache(maxsize=64)
def _pairs_of_rule(rule: PairRule, causal: bool, length: int) -> int:
    _, mask = Visibility(causal, rule=rule).attention_arguments(length, length)
    assert mask is not None
    return int(mask.expand(1, 1, length, length).sum())
