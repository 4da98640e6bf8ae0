"""What the three pretraining scripts share: opening the packed data, the model's shape, the number of steps, names.

A script says which model and which objective; this module turns that and the flags into an `Experiment` and hands it to
`training.loop.fit`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_gpt import devices
from lit_gpt.checkpoints import names, weights
from lit_gpt.checkpoints.export import tokenizer_name
from lit_gpt.config import Config
from lit_gpt.data import packed_dataset
from lit_gpt.data.packed_files import scan_folder
from lit_gpt.data.packed_format import VALIDATION_PREFIX
from lit_gpt.model.layers import Transformer
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.training import loop, schedule, strategies
from lit_gpt.training.experiment import Experiment
from lit_gpt.training.group_sizes import group_size
from lit_gpt.training.objectives import Objective
from lit_gpt.training.settings import SHAPE_FLAGS, PretrainConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass
class PretrainingRecipe:
    """What makes one pretraining script different from the next."""

    group_sizes: str
    """The published script whose group sizes it takes (`group_sizes.group_size`)."""
    model_class: type[Transformer]
    """GPT or TransEncoder."""
    objective: Callable[[Config], Objective]
    """Builds what is learnt, from the model's config."""
    ssl_ratio: float | None = None
    """Share of groups with a random length; None where the script has none."""


def pretrain(recipe: PretrainingRecipe, flags: PretrainConfig) -> dict[str, Any]:
    """Run one pretraining from flags to exported model.

    Raises:
        ValueError: anything a user can get wrong, with the remedy.
    """
    _check(flags)
    config, tokenizer, record = _shape(flags)
    tokens_per_sample = schedule.mean_random_length(config.block_size, recipe.ssl_ratio or 0.0)
    if flags.max_steps is None:
        assert flags.flops is not None
        steps = schedule.budget_steps(flags.flops, config.size_in_millions, flags.batch_size, tokens_per_sample)
        budget = flags.flops
    else:
        steps = flags.max_steps
        spent = schedule.budget_flops(steps, config.size_in_millions, flags.batch_size, tokens_per_sample)
        budget = float(f"{spent:.3g}")
    with torch.device("meta"):
        model = recipe.model_class(config)
    fabric = strategies.start_fabric(
        flags.accelerator, flags.devices, flags.nodes_num, flags.strategy, flags.precision, model.parameter_count
    )
    data, validation = _open_data(fabric, flags, config)
    if validation is None:
        devices.say(fabric, f"no validation* files in {flags.data_dir}: training without validation")
    kind = recipe.model_class.kind
    start_weights = weights.read_weights_for(model, flags.init_from) if flags.init_from else None
    warmup = schedule.default_warmup(steps) if flags.warmup_steps is None else flags.warmup_steps
    rows = group_size(recipe.group_sizes, config.size_in_millions)
    settings = flags.settings() | {
        "kind": kind,
        "model": config.to_dict(),
        "data": data.fingerprint,
        "init_from": None if start_weights is None else weights.state_hash(start_weights),
    }
    settings |= {"max_steps": steps, "warmup_steps": warmup, "precision": devices.precision_name(fabric)}
    settings |= {"ssl_ratio": recipe.ssl_ratio, "group_size": rows}
    name = flags.name or names.run_name(kind, config, budget, recipe.ssl_ratio)
    experiment = Experiment(
        name=name,
        model=model,
        start_weights=start_weights,
        objective=recipe.objective(config),
        train_data=data,
        val_data=validation,
        group_size=rows,
        max_steps=steps,
        warmup_steps=warmup,
        settings=settings,
        record=record,
        export_name=flags.name or names.export_name(kind, config, budget, recipe.ssl_ratio, flags.batch_size),
        tokenizer=tokenizer,
        token_bytes=None if tokenizer is None else tokenizer.token_bytes(),
    )
    return loop.fit(fabric, experiment, flags, Path(flags.out_dir) / name)


def _check(flags: PretrainConfig) -> None:
    """Collect what is wrong with the flags before anything is opened."""
    problems = flags.problems()
    if not flags.model and None in (flags.n_layer, flags.n_embd):
        problems.append(
            "--model is missing: a size in millions, such as --model 170, or a shape of your own by --n_layer and --n_embd"
        )
    if (flags.flops is None) == (flags.max_steps is None):
        problems.append("give either --flops (in 1e18) or --max_steps, not " + ("both" if flags.flops else "neither"))
    if problems:
        raise ValueError("; ".join(problems))


def _open_data(
    fabric: Fabric, flags: PretrainConfig, config: Config
) -> tuple[packed_dataset.PackedMixture, packed_dataset.PackedSeries | None]:
    """Training and validation data; of all processes only the first looks through the folder."""
    folder, length = Path(flags.data_dir), config.block_size + 1
    prefixes = [prefix for prefix, weight in flags.data_weights.items() if weight > 0]
    prefixes.append(VALIDATION_PREFIX)
    found = devices.on_rank_zero(fabric, lambda: scan_folder(folder, prefixes, length))
    data = packed_dataset.open_mixture(folder, flags.data_weights, length, config.vocab_size, flags.seed, found)
    return data, packed_dataset.open_validation(folder, length, config.vocab_size, found)


def _shape(flags: PretrainConfig) -> tuple[Config, Tokenizer | None, dict[str, Any]]:
    """The model's config, the tokenizer if there is one at hand, and what the checkpoint records of it."""
    folder = Path(flags.data_dir)
    known = packed_dataset.recorded_tokenizer(folder, list(flags.data_weights))
    source = flags.tokenizer or known.get("source")
    tokenizer = Tokenizer(source) if source and (flags.tokenizer or Path(source).exists()) else None
    overrides = {name: value for name in SHAPE_FLAGS if (value := getattr(flags, name)) is not None}
    vocab_size = flags.vocab_size or (tokenizer.vocab_size if tokenizer else known.get("vocab_size"))
    if vocab_size is not None:
        overrides["vocab_size"] = vocab_size
    named = tokenizer_name(tokenizer) if tokenizer else {"source": source, "fingerprint": known.get("fingerprint")}
    record = {"tokenizer": named}
    config = Config.from_name(flags.model, **overrides) if flags.model else Config.from_shape(**overrides)
    return config, tokenizer, record
