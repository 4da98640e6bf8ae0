"""A small model of either kind, the record of its run, and the run's checkpoint file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from lit_gpt.checkpoints.markers import FORMAT_VERSION
from lit_gpt.config import Config
from lit_gpt.files import file_sha256
from lit_gpt.model.layers import Transformer

TINY = Config("Diff_LLaMA_0.003M", 2, 2, 16, 32, 1, block_size=16, vocab_size=50, rope_table_dtype="float32")


def make_model(kind: type[Transformer], config: Config = TINY, seed: int = 1) -> Transformer:
    """A model with random weights."""
    model = kind(config)
    model.init_weights(seed)
    return model


def run_record(model: Transformer, run_id: str = "run-a") -> dict[str, Any]:
    """What a run writes down about itself into its checkpoints and exports."""
    tokenizer = {"source": "tok", "fingerprint": "00ff"}
    return {"kind": model.kind, "config": model.config.to_dict(), "tokenizer": tokenizer, "run_id": run_id, "name": "n"}


def write_run_checkpoint(folder: Path, model: Transformer, iter_num: int = 4) -> Path:
    """A checkpoint of ours with its marker, as `saving.save_checkpoint` writes it."""
    path = folder / f"iter-{iter_num:06d}-ckpt.pth"
    content = {"model": model.state_dict(), "optimizer": {}, "hparams": {}, "iter_num": iter_num, "step_count": 1}
    torch.save({**content, "record": run_record(model)}, path)
    marker = {"format": FORMAT_VERSION, "step": 1, "iter_num": iter_num, "record": run_record(model)}
    marker |= {"size": path.stat().st_size, "sha256": file_sha256(path)}
    path.with_suffix(".json").write_text(json.dumps(marker))
    return path
