"""The models of a study: each is one run of a pretraining script, done once for its settings, and its record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.config import Config
from lit_gpt.files import read_json_object
from lit_gpt.pipeline import Pipeline, Stage

_SAVED_EVERY = 200
"""Steps between two checkpoints: what a kill costs, some 30 seconds of two cores."""


@dataclass(frozen=True)
class ModelShape:
    """The shape of a study's small models, as the training scripts' flags."""

    block_size: int
    n_layer: int
    n_embd: int

    def flags(self) -> dict[str, int]:
        """Heads of 32 columns, and an MLP of four times the width."""
        heads = max(1, self.n_embd // 32)
        return {
            "block_size": self.block_size,
            "n_layer": self.n_layer,
            "n_head": heads,
            "n_embd": self.n_embd,
            "intermediate_size": 4 * self.n_embd,
            "n_query_groups": heads,
        }


@dataclass(frozen=True)
class TrainedModel:
    """What came out of a run."""

    result: dict[str, Any]
    """The run's: `export` (the file), `config`, `step`, `total_tokens`, `val_loss` and the rest of the validation's."""
    minutes: float
    """From its last start to its end."""
    command: list[str]
    """As it was run."""

    @property
    def path(self) -> Path:
        """The exported model."""
        return Path(self.result["export"])

    @property
    def flops(self) -> float:
        """6 ND of its training, N without the embeddings, in units of 1."""
        millions = Config.from_dict(self.result["config"]).size_in_millions
        return 6e6 * millions * self.result["total_tokens"]


def stage_settings(packed: Mapping[str, Any], command: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a model's stage records: the settings of the packed data, the script and its flags."""
    script, flags = command
    return {**packed, "script": script, **flags}


def train_model(
    pipeline: Pipeline, name: str, title: str, packed: Stage, command: tuple[str, Mapping[str, Any]]
) -> TrainedModel:
    """Run a pretraining script in a stage of its own, or take what it gave before.

    Args:
        pipeline: whose stage this is.
        name: of the stage, its folder.
        title: of the stage.
        packed: the data.
        command: the script, and its flags without the places where things lie.

    Raises:
        ValueError, Interrupted: as `Pipeline.run`.
    """
    stage = pipeline.begin(name, title, stage_settings(packed.settings, command))
    script, flags = command
    words = training_command(stage, packed, script, {**flags, "save_interval": _SAVED_EVERY})
    if stage.result is None:
        # A budget's steps are the script's to count.
        run_folder, elapsed_s = run_training(pipeline, stage, words, flags.get("max_steps"))
        record = read_json_object(run_folder / "run.json")
        stage.finish({**record["result"], "config": record["config"], "minutes": elapsed_s / 60})
    assert stage.result is not None
    return TrainedModel(stage.result, stage.result["minutes"], words)


def training_command(stage: Stage, packed: Stage, script: str, flags: Mapping[str, Any]) -> list[str]:
    """A pretraining script with its flags, and with its run, log and model in the stage's folder."""
    places = {
        "model": 6,
        "data_dir": packed.folder,
        "out_dir": stage.folder / "run",
        "log_dir": stage.folder / "log",
        "models_dir": stage.folder / "model",
        "keep_checkpoints": 1,
    }
    return [script, *(f"--{name}={value}" for name, value in {**flags, **places}.items())]


def run_training(pipeline: Pipeline, stage: Stage, command: list[str], steps: int | None) -> tuple[Path, float]:
    """Train by a `training_command`, with the progress of its steps: the run's folder, and seconds."""
    from lit_gpt.ui.training_progress import TrainingProgress

    started = time.monotonic()
    with TrainingProgress(pipeline.console, steps) as progress:
        pipeline.run(command, progress)
    (record_path,) = (stage.folder / "run").glob("*/run.json")
    return record_path.parent, time.monotonic() - started
