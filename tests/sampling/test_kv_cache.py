"""The key/value cache: reading a row in pieces gives what reading it whole gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_gpt.config import Config
from lit_gpt.model.causal import GPT
from lit_gpt.sampling.kv_cache import KVCache
from tests.support.small_models import scaled_model

TINY = Config("tiny", 3, 4, 32, 64, 4, block_size=64, vocab_size=100)
GROUPED = Config("grouped", 2, 4, 32, 48, 2, block_size=64, vocab_size=100)


def tokens(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 100, (rows, columns), generator=torch.Generator().manual_seed(seed))


def assert_same(one: Tensor, other: Tensor) -> None:
    """Equal up to float32 rounding."""
    assert one.shape == other.shape
    assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def read(model: GPT, cache: KVCache, ids: Tensor, positions: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Logits of tokens that stand behind those of the cache."""
    return model.lm_head(model.hidden_states(ids, positions, model.visibility.padded(key_mask), cache))


@pytest.mark.parametrize("config", [TINY, GROUPED], ids=lambda config: config.name)
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 4, 2]], ids=str)
@torch.no_grad()
def test_cache_changes_nothing(config: Config, pieces: list[int]):
    model, ids = scaled_model(GPT, config, 5), tokens(3, 12)
    cache = KVCache(config, batch=3, capacity=20, device=torch.device("cpu"), dtype=torch.float32)
    positions = torch.arange(12).expand(3, -1)
    parts = [
        read(model, cache, piece, at)
        for piece, at in zip(ids.split(pieces, dim=1), positions.split(pieces, dim=1), strict=True)
    ]
    assert cache.length == 12
    assert_same(torch.cat(parts, dim=1), model(ids))


@torch.no_grad()
def test_cache_with_left_padding_changes_nothing():
    model = scaled_model(GPT, TINY, 5)
    rows = [tokens(1, 9, seed=1)[0], tokens(1, 5, seed=2)[0]]
    padded = torch.stack([torch.cat((torch.zeros(9 - len(row), dtype=torch.int64), row)) for row in rows])
    positions = torch.stack([(torch.arange(9) - (9 - len(row))).clamp(min=0) for row in rows])
    key_mask = torch.stack([torch.arange(9) >= 9 - len(row) for row in rows])
    cache = KVCache(TINY, batch=2, capacity=9, device=torch.device("cpu"), dtype=torch.float32)
    first = read(model, cache, padded[:, :7], positions[:, :7], key_mask[:, :7])
    rest = read(model, cache, padded[:, 7:], positions[:, 7:], key_mask)
    together = torch.cat((first, rest), dim=1)
    for index, row in enumerate(rows):
        assert_same(together[index, 9 - len(row) :], model(row[None])[0])
