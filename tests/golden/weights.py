"""The models and tokens of the golden cases, from seeds: `model_6M.json` holds what the original computed with them.

Weights are a splitmix64 hash of the element's flat index, offset by a checksum of (seed, parameter name), so any shape can
be rebuilt on any machine and nothing large has to be kept.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lit_gpt.model.layers import Transformer

Model = TypeVar("Model", bound=Transformer)


def golden_cases() -> dict[str, Any]:
    """The contents of model_6M.json."""
    return json.loads((Path(__file__).parent / "model_6M.json").read_text())


def golden_tokens(count: int, seed: int) -> list[int]:
    """`count` token ids in [1, 31999]: the file's rule `tokens`."""
    numbers = np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(seed * 7919)
    return (numbers % np.uint64(31999) + np.uint64(1)).astype(np.int64).tolist()


def golden_state_dict(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """float32 weights by name: vectors in 1 +- 0.2, embeddings in +-1, matrices in +-3 / sqrt(columns)."""
    weights = {}
    for name, shape in shapes.items():
        noise = torch.from_numpy(_symmetric_noise(int(np.prod(shape)), zlib.crc32(f"{seed}:{name}".encode())))
        noise = noise.reshape(shape)
        if len(shape) == 1:
            weights[name] = 1 + 0.2 * noise
        elif name.endswith("wte.weight"):
            weights[name] = noise
        else:
            weights[name] = noise * (3.0 / shape[-1] ** 0.5)
    return weights


def golden_model(kind: type[Model], seed: int, name: str | int = 6) -> Model:
    """A model of a published size with golden weights, in evaluation mode."""
    model = kind.from_name(name)
    model.load_state_dict(
        golden_state_dict({key: tuple(value.shape) for key, value in model.state_dict().items()}, seed)
    )
    return model.eval()


def _symmetric_noise(count: int, key: int) -> np.ndarray:
    """`count` float32 numbers in [-1, 1): the top 24 bits of splitmix64."""
    z = np.arange(count, dtype=np.uint64) + (np.uint64(key) << np.uint64(32)) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)
