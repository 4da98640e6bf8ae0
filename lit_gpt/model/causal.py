"""The autoregressive model (ARM): a causal transformer with a key/value cache.

Everything but causality and the cache is in `layers`. May import layers, kernels and config only.

B batch, T new tokens, S cached and new tokens, V padded vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_gpt.config import Config
from lit_gpt.model.layers import LayerCache, Transformer


class KVCache:
    """Keys and values of a batch, allocated once for `capacity` tokens.

    Attributes:
        length: columns in use; `GPT.forward` writes behind them and moves it on.
        layers: one `LayerCache` per block.
    """

    def __init__(self, config: Config, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (batch, config.n_query_groups, capacity, config.head_size)
        self.length, self.capacity = 0, capacity
        self.layers = [
            LayerCache(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
            for _ in range(config.n_layer)
        ]


class GPT(Transformer):
    """Predicts the next token from those before it."""

    kind = "arm"
    causal = True

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        key_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V); position i predicts token i + 1.

        Args:
            input_ids: (B, T) int64.
            positions: (B, T) int64; None means consecutive from 0, or from the cache's length.
            key_mask: (B, S) bool over cached and new tokens, False at padding.
            cache: what was read before; the new tokens are added to it.

        Raises:
            ValueError: more tokens than the block size.
        """
        if cache is None:
            return super().forward(input_ids, positions, key_mask)
        assert cache.length + input_ids.size(1) <= cache.capacity
        hidden = self.hidden_states(input_ids, positions, key_mask, cache.layers, cache.length)
        cache.length += input_ids.size(1)
        return self.lm_head(hidden)
