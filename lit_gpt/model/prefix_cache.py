"""Keys and values of texts that are read once and then continued in several ways.

B rows of texts, A rows of continuations, P and T tokens of them, G query groups, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class PrefixCache:
    """Keys and values of some texts, and behind them those of continuations; see `layers.KeyValueCache`.

    Attributes:
        texts: (A,) int64, which text each continuation belongs to; None while the texts themselves are read.
    """

    def __init__(self) -> None:
        self.texts: Tensor | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def total_columns(self, new_tokens: int) -> int:
        """P + T, or P while the texts are read."""
        return new_tokens if self.texts is None else self._layers[0][0].size(2) + new_tokens

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a text's (B, G, P, D), or put a continuation's (A, G, T, D) behind its text's, without keeping it."""
        if self.texts is None:
            self._layers[layer] = k, v
            return k, v
        keys, values = (kept.index_select(0, self.texts) for kept in self._layers[layer])
        return torch.cat((keys, k), 2), torch.cat((values, v), 2)
