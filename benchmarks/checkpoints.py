"""Cost of a checkpoint and of a resume against the model's size: a single file against a folder of shards, one process.

    python benchmarks/checkpoints.py
    python benchmarks/checkpoints.py --models [6] --rounds 1          a look, under a minute

For each size a model with AdamW's state is saved and restored as training does it. "blocked" is what training waits for,
"in all" is until the checkpoint is whole on the disk, "resume" is checking its hashes and reading it. Numbers are medians.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import print_table
from lit_gpt.cli import parse, run


@dataclass
class CheckpointsConfig:
    """What can be told to this benchmark."""

    models: list[int] = field(default_factory=lambda: [6, 19, 85, 170])
    """Sizes in millions of parameters."""
    rounds: int = 3
    """Saves and resumes of each form."""
    folder: str | None = None
    """Where to write; by default the system's folder for temporary files."""


def make_state(fabric: Any, size: int) -> dict[str, Any]:
    """A model and its optimizer after a step on made-up gradients."""
    import torch

    from lit_gpt.config import Config
    from lit_gpt.model.bidirectional import TransEncoder

    module = TransEncoder(Config.from_name(size))
    module.init_weights(1)
    model = fabric.setup_module(module)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), fused=True))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer, "hparams": {}, "iter_num": 1, "step_count": 1}


def measure(fabric: Any, state: dict[str, Any], folder: Path, shard_above_gb: float) -> list[float]:
    """Seconds blocked, in all, and of a resume."""
    from lit_gpt.checkpoints import run_files, saving
    from lit_gpt.training.checkpoint_saves import CheckpointSaves

    saves = CheckpointSaves(folder, shard_above_gb, lambda path: None)
    record = {"kind": "mdm", "config": state["model"].module.config.to_dict(), "settings": {}}
    started = time.perf_counter()
    saves.save(fabric, state, record, None)
    blocked = time.perf_counter() - started
    saves.wait(fabric)
    whole = time.perf_counter() - started
    started = time.perf_counter()
    saving.load_checkpoint(fabric, folder, state)
    resumed = time.perf_counter() - started
    run_files.remove_checkpoints(folder)
    return [blocked, whole, resumed]


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    config = parse(CheckpointsConfig, argv, __doc__ or "")
    from lit_gpt.checkpoints import saving
    from lit_gpt.training import strategies

    fabric = strategies.start_fabric("cpu", "1", 1, "auto", "32-true")
    body = []
    for size in config.models:
        state = make_state(fabric, size)
        for form, above in (("file", 1e9), ("shards", 0.0)):
            with tempfile.TemporaryDirectory(dir=config.folder) as folder:
                rounds = [measure(fabric, state, Path(folder), above) for _ in range(config.rounds)]
            numbers = [f"{statistics.median(column):.2f}" for column in zip(*rounds, strict=True)]
            body.append([f"{size}M", f"{saving.state_bytes(state) / 1e9:.2f}", form, *numbers])
    print_table(["model", "GB", "form", "blocked s", "in all s", "resume s"], body)


if __name__ == "__main__":
    run(main)
