"""Keys and values of the tokens that an autoregressive sampler has read, in memory that is allocated once.

B rows, T new tokens, G query groups, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_gpt.config import Config
from lit_gpt.model.causal import GPT


def compute_dtype_of(model: GPT) -> torch.dtype:
    """The dtype of a model's keys and values: autocast's, else the weights'."""
    weight = model.lm_head.weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class KVCache:
    """Keys and values of a batch for up to `capacity` columns; see `layers.KeyValueCache`.

    Attributes:
        length: columns in use; moved on when the last layer has written.
        layers: keys and values of each layer, (B, G, capacity, D).
    """

    def __init__(self, config: Config, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (batch, config.n_query_groups, capacity, config.head_size)
        self.length, self.capacity = 0, capacity
        self.layers = [
            (torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
            for _ in range(config.n_layer)
        ]

    def total_columns(self, new_tokens: int) -> int:
        """Columns in use with so many new tokens."""
        return self.length + new_tokens

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, G, T, D) behind the columns in use; returns all keys and values up to there."""
        end = self.length + k.size(2)
        assert end <= self.capacity
        keys, values = self.layers[layer]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        if layer == len(self.layers) - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end]
