"""What is trained, as one value: model, objective, data, steps, names. A script describes it, the training loop runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lit_gpt.data.batching import Dataset, ValidationData
from lit_gpt.model.layers import Transformer
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.training.objectives import Objective


@dataclass
class Experiment:
    """What is trained."""

    name: str
    """Of the run, its folder and its loggers."""
    model: Transformer
    """On the meta device: kind, config, names and shapes, without numbers."""
    start_weights: dict[str, Tensor] | None
    """What every parameter starts from, on the host; emptied as the model takes it over. None: drawn from the seed."""
    objective: Objective
    """What is learnt."""
    train_data: Dataset
    """Sample k is a pure function of k."""
    val_data: ValidationData | None
    """Validation sequences, or None."""
    group_size: int
    """Rows that share a length and a denominator (the published micro batch, `training.group_sizes`)."""
    max_steps: int
    """The last optimizer step."""
    warmup_steps: int
    """Steps of linear warmup."""
    settings: dict[str, Any]
    """Every setting that changes numbers; a checkpoint holds them and resuming with others is refused."""
    record: dict[str, Any]
    """What the exported model says of itself besides its config: tokenizer and the like."""
    export_name: str
    """File name of the exported model, without its ending."""
    tokenizer: Tokenizer | None = None
    """Goes into the exported model; None where it is not at hand."""
    token_bytes: Any = None
    """(V,) bytes of text that each token stands for, for bits per byte; None if unknown."""
    varying_length: bool = False
    """Whether most groups are cut to a length of their own."""
