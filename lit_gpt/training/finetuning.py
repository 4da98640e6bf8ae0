"""What the four fine-tuning scripts share: the checkpoint to start from, the prepared examples, steps and names.

A script says which data, which objective and which published numbers; this module turns them and the flags into an
`Experiment` and hands it to `training.loop.fit`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_gpt import devices
from lit_gpt.checkpoints import weights
from lit_gpt.checkpoints.export import tokenizer_name
from lit_gpt.checkpoints.tokenizer_lookup import find_tokenizer
from lit_gpt.data import sft_dataset
from lit_gpt.data.sft_dataset import ExamplePreparation, SftDataset
from lit_gpt.data.sft_formats import CHAT_TEMPLATES, SftFormat
from lit_gpt.model.layers import Transformer
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.training import loop, strategies
from lit_gpt.training.experiment import Experiment
from lit_gpt.training.group_sizes import group_size
from lit_gpt.training.objectives import Objective
from lit_gpt.training.settings import FinetuneConfig

# A run may be too short for its recipe's warmup; then it ends in the middle (ours: the published runs are longer).
_LARGEST_WARMUP = 0.5


@dataclass
class FinetuningRecipe:
    """What makes one fine-tuning script different from the next."""

    group_sizes: str
    """The published script whose group sizes it takes (`group_sizes.group_size`)."""
    kind: str | None
    """Of the model: `arm` or `mdm`; None for either."""
    data_format: SftFormat
    """The data's format."""
    max_length: int
    """Tokens of the longest example, unless the model reads fewer."""
    objective: Callable[[Transformer], Objective]
    """Builds what is learnt, from the model."""
    warmup_steps: Callable[[int], int]
    """The run's steps to those of linear warmup."""
    run_name: Callable[[Transformer], str]
    """The name of the run and its folder."""
    suffix: str
    """What the exported model's name ends with."""


def finetune(recipe: FinetuningRecipe, flags: FinetuneConfig) -> dict[str, Any]:
    """Run one fine-tuning from flags to exported model.

    Raises:
        ValueError, FileNotFoundError: anything a user can get wrong, with the remedy.
    """
    _check(flags)
    path = Path(flags.data_file or recipe.data_format.path)
    if not path.is_file():
        # Before a large checkpoint is loaded.
        raise FileNotFoundError(sft_dataset.missing_file_line(recipe.data_format, path))
    model, state, record = weights.read_weights_of_model(flags.pretrain_path, flags.model, recipe.kind)
    tokenizer = find_tokenizer(flags.pretrain_path, model.config, record, flags.tokenizer).reading(flags.special_tokens)
    config = model.config
    row_length = min(recipe.max_length, config.block_size)
    fabric = strategies.start_fabric(
        flags.accelerator, flags.devices, flags.nodes_num, flags.strategy, flags.precision, model.parameter_count
    )
    data = _data(recipe, flags, path, tokenizer, row_length)
    for line in sft_dataset.left_out_lines(data.info, row_length):
        devices.say(fabric, line)
    steps = flags.max_steps or _steps(data, flags)
    warmup = flags.warmup_steps
    if warmup is None:
        warmup = min(recipe.warmup_steps(steps), int(steps * _LARGEST_WARMUP))
    rows = group_size(recipe.group_sizes, config.size_in_millions)
    settings = flags.settings() | {"kind": model.kind, "model": config.to_dict(), "data": data.fingerprint}
    settings |= {"pretrained": weights.state_hash(state, torch.float32), "group_size": rows}
    settings |= {"max_steps": steps, "warmup_steps": warmup, "precision": devices.precision_name(fabric)}
    tokenizer_record = tokenizer_name(tokenizer)
    if tokenizer.special_tokens != "text":  # what older records, without a word on it, mean
        settings["special_tokens"] = tokenizer_record["special_tokens"] = tokenizer.special_tokens
    name, objective = flags.name or recipe.run_name(model), recipe.objective(model)
    experiment = Experiment(
        name=name,
        model=model,
        start_weights=state,
        objective=objective,
        train_data=data,
        val_data=None,
        group_size=rows,
        max_steps=steps,
        warmup_steps=warmup,
        settings=settings,
        record={
            "tokenizer": tokenizer_record,
            "pretrained": str(flags.pretrain_path),
            **_chat_template(recipe.data_format),
        },
        export_name=flags.name or f"{_stem(flags.pretrain_path)}-{recipe.suffix}",
        tokenizer=tokenizer,
        varying_length=objective.lengths_vary,
    )
    return loop.fit(fabric, experiment, flags, Path(flags.out_dir) / name)


def _chat_template(data_format: SftFormat) -> dict[str, str]:
    """The template of the questions, for the record: whoever asks later uses the same."""
    return {"chat_template": CHAT_TEMPLATES[data_format.chat_template]} if data_format.chat_template else {}


def _check(flags: FinetuneConfig) -> None:
    """Collect what is wrong with the flags before anything is opened."""
    problems = flags.problems()
    if not flags.pretrain_path:
        problems.append(
            "--pretrain_path is missing: the checkpoint to start from, such as models/mdm-170M-10e18.safetensors"
        )
    if problems:
        raise ValueError("; ".join(problems))


def _data(
    recipe: FinetuningRecipe, flags: FinetuneConfig, path: Path, tokenizer: Tokenizer, row_length: int
) -> SftDataset:
    """The examples, prepared now or earlier."""
    plan = ExamplePreparation(
        data_format=recipe.data_format,
        path=path,
        tokenizer=tokenizer,
        max_length=row_length,
        max_malformed=flags.max_malformed,
        workers=flags.workers,
        cache=Path(flags.cache_dir) if flags.cache_dir else sft_dataset.DEFAULT_EXAMPLES_CACHE,
    )
    return SftDataset(sft_dataset.prepare_examples(plan), row_length, tokenizer.eos_id, flags.seed)


def _steps(data: SftDataset, flags: FinetuneConfig) -> int:
    """int(examples * epochs / batch size); a batch at an epoch's end goes on into the next one."""
    if len(data) < flags.batch_size:
        raise ValueError(
            f"{data.describe()}: fewer than one batch of {flags.batch_size}: give --bs {len(data)} or less, or more data"
        )
    steps = int(len(data) * flags.epochs / flags.batch_size)
    if not steps:
        raise ValueError(f"--epoch {flags.epochs:g} of {len(data):,} examples is less than one batch: give more")
    return steps


def _stem(path: str) -> str:
    """A checkpoint's name without its ending; a run folder's own, also for a file inside."""
    found = Path(path)
    if found.name.startswith("iter-") and found.suffix == ".pth":
        found = found.parent
    return found.stem if found.suffix in (".safetensors", ".pth") else found.resolve().name
