"""Models small enough for any test: random weights that make context matter, and checkpoints of both kinds."""

from __future__ import annotations

from pathlib import Path

import torch

from lit_gpt.checkpoints.export import WeightsRecord, export_weights
from lit_gpt.config import Config
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.model.layers import Transformer
from lit_gpt.tokenizer import Tokenizer
from tests.support.small_tokenizers import train_small_tokenizer


def scaled_model(kind: type[Transformer], config: Config, seed: int = 5) -> Transformer:
    """A model whose weights are large enough that its distributions differ from position to position."""
    model = kind(config)
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def export_arm_and_mdm(folder: Path, block_size: int = 128, embedding_scale: float = 1.0) -> dict[str, Path]:
    """An ARM and an MDM with random weights, their tokenizer inside, and the tokenizer's folder, by kind."""
    paths = {"tokenizer": train_small_tokenizer(folder / "tokenizer")}
    for kind, model_class in (("arm", GPT), ("mdm", TransEncoder)):
        model = model_class(Config("tiny", 2, 2, 32, 64, 2, block_size=block_size, vocab_size=500))
        model.init_weights(3)
        with torch.no_grad():
            model.transformer.wte.weight.mul_(embedding_scale)
        record, tokenizer = WeightsRecord(kind, model.config), Tokenizer(paths["tokenizer"])
        paths[kind] = export_weights(folder / kind, "tiny", model.state_dict(), record, tokenizer=tokenizer)
    return paths
