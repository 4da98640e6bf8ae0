"""The speedrun: bits per byte of a fixed held-out text at a fixed budget of FLOPs, or of time on this machine.

An entry is a training script with flags. What it costs is counted from what it read (6 N D), and what it reaches is its own
validation on whole rows; both come from the run's record, so any script that trains through `training.loop` can enter.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.config import Config
from lit_gpt.data.batching import largest_group
from lit_gpt.evaluation.versions import commit
from lit_gpt.files import parse_json, read_json_object, write_file
from lit_gpt.pipeline import Pipeline, Stage
from lit_gpt.studies.mdm_recipes import RECIPES, StepBudget
from lit_gpt.studies.study_pages import markdown_table, processor_name, with_error
from lit_gpt.studies.trained_models import ModelShape, TrainedModel, train_model
from lit_gpt.training import schedule
from lit_gpt.training.group_sizes import group_size
from lit_gpt.training.objectives import MaskedDiffusion

BATCH_SIZE, VOCAB_SIZE, DRAWS, HELD_OUT_ROWS = 16, 2048, 4, 512
"""Of the registered entries; the noise draws of a bound's validation, and at most how many rows: the quickstart's."""
_RULED = (
    *("seed", "block_size", "vocab_size", "tokenizer", "data_dir", "data_weights", "val_samples", "val_draws"),
    *("init_from", "resume", "name", "model", "out_dir", "log_dir", "models_dir"),
)
"""Flags of the training scripts that are the speedrun's own: data, start and validation are the same for all."""
_RATE = 2e-3
# Steps by which the speed of an entry is measured before a run of fixed time, and the share of that time that is planned
# with: the rest is for what a short run does not show.
_CALIBRATION_STEPS, _PLANNED_SHARE = 40, 0.9
# Tokens of a held-out row in the table.
_TABLE_ROW = 128
_TABLE_START, _TABLE_END = "<!-- table -->\n", "\n<!-- end of table -->"


@dataclass(frozen=True)
class SpeedrunEntry:
    """A way to train."""

    name: str
    script: str
    """Path of the training script, below the repository or absolute."""
    recipe: str = "published"
    """Of `mdm_recipes.RECIPES`: how the budget becomes steps, and the flags of them."""
    extra: tuple[tuple[str, Any], ...] = ()
    """More flags; they win."""
    ssl_ratio: float = 0.0
    """Share of rows that are cut to a random length, so cost less."""

    def __post_init__(self) -> None:
        if ruled := [name for name, _ in self.extra if name in _RULED]:
            raise ValueError(
                f"{self.name}: {', '.join(ruled)} cannot be an entry's own; see the rules in docs/speedrun.md "
                "(--block_size and --seed are flags of the speedrun)"
            )

    def flags(self, steps: int, shape: ModelShape, seed: int) -> dict[str, Any]:
        """Of a run that reads as many tokens as `steps` of 16 rows."""
        budget = StepBudget(steps, BATCH_SIZE, shape.block_size, _RATE)
        flags = {**shape.flags(), "seed": seed, "val_samples": HELD_OUT_ROWS, "val_draws": DRAWS}
        flags |= RECIPES[self.recipe].flags(budget) | dict(self.extra)
        if "batch_size" in dict(self.extra) and "max_steps" not in dict(self.extra):
            flags["max_steps"] = max(1, steps * BATCH_SIZE // int(flags["batch_size"]))
        return flags


ENTRIES = {
    entry.name: entry
    for entry in (
        SpeedrunEntry("arm", "pretrain/train_ar.py"),
        SpeedrunEntry("mdm", "pretrain/train_mdm.py"),
        SpeedrunEntry("mdm-random-lengths", "pretrain/train_mdm_rl.py", extra=(("ssl_ratio", 0.01),), ssl_ratio=0.01),
        *(
            SpeedrunEntry(f"mdm-{name.replace('_', '-')}", "pretrain/train_mdm.py", name)
            for name in RECIPES
            if name != "published"
        ),
    )
}
"""The registered entries: every kind of pretraining, and every recipe of an MDM."""


@dataclass(frozen=True)
class SpeedrunBudget:
    """What an entry may use: one of the two is given."""

    flops: float | None
    """FLOPs of training, 6 N D."""
    minutes: float | None
    """Training time on this machine, without validation and saving."""


def run_entry(
    pipeline: Pipeline, packed: Stage, entry: SpeedrunEntry, budget: SpeedrunBudget, model: tuple[ModelShape, int]
) -> dict[str, Any]:
    """Train an entry once for its settings; returns its line.

    Args:
        pipeline: whose stages the run and its calibration are.
        packed: the text.
        entry: what is trained.
        budget: how much.
        model: its shape, and the seed.

    Raises:
        ValueError: the budget does not pay for one step, or for what was read; the script validated in another way than
            the rules say; the script's own message.
    """
    shape, seed = model
    # An entry of one's own may have a shape of its own.
    named = {name: value for name, value in entry.flags(1, shape, seed).items() if name in shape.flags()}
    config = Config.from_name(6, **named, vocab_size=VOCAB_SIZE)
    if budget.flops is not None:
        steps = _steps_of_flops(budget.flops, config, entry, seed)
        name = f"{entry.name}-{budget.flops:g}-{seed}"
    else:
        assert budget.minutes is not None
        steps = _steps_of_minutes(pipeline, packed, entry, budget.minutes, model)
        name = f"{entry.name}-{budget.minutes:g}min-{seed}"
    flags = entry.flags(steps, shape, seed)
    trained = train_model(pipeline, name, f"{entry.name}, seed {seed}", packed, (entry.script, flags))
    if "val_bits_per_byte" not in trained.result:
        raise ValueError(f"{entry.name}: the run has no validation loss; the held-out text is shorter than a row")
    _check_validation(entry.name, trained.result, shape)
    # Of the model that was trained: a script may have a shape of its own, whatever its flags say.
    config = Config.from_dict(trained.result["config"])
    spent = 6 * config.non_embedding_params * trained.result["total_tokens"]
    if budget.flops is not None and spent > budget.flops:
        raise ValueError(
            f"{entry.name}: took {spent:.4g} FLOPs of a budget of {budget.flops:.4g} with {config.non_embedding_params:,} "
            "parameters: name the shape, or fewer max_steps, in --script_flags"
        )
    described = {"script": entry.script, **flags, "text": packed.settings["text"], "vocab_size": VOCAB_SIZE}
    result = trained.result
    return {
        "name": entry.name,
        "bits_per_byte": result["val_bits_per_byte"],
        "bits_per_byte_se": result["val_bits_per_byte_se"],
        "is_bound": result["val_is_bound"],
        "nats_per_token": result["val_loss"],
        "budget": {"flops": budget.flops} if budget.flops is not None else {"minutes": budget.minutes},
        "flops": spent,
        "train_s": round(_train_seconds(pipeline.out / name), 1),
        "tokens": result["total_tokens"],
        "non_embedding_params": config.non_embedding_params,
        "settings": described,
        "hash": hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16],
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, {processor_name()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def _check_validation(name: str, result: Mapping[str, Any], shape: ModelShape) -> None:
    """Refuse a run of a script that did not validate as its flags said."""
    rows, draws = result["config"]["block_size"], result["val_draws"]
    if rows != shape.block_size or (result["val_is_bound"] and draws != DRAWS):
        raise ValueError(
            f"{name}: validated on rows of {rows} tokens, {draws} draws; expected {shape.block_size} tokens, {DRAWS} draws"
        )


def _steps_of_flops(flops: float, config: Config, entry: SpeedrunEntry, seed: int) -> int:
    """The most steps of 16 rows that the budget pays for; of random lengths those that this seed's run will read."""
    steps = schedule.budget_steps(flops / 1e18, config.size_in_millions, BATCH_SIZE, config.block_size)
    if not entry.ssl_ratio:
        return steps
    objective = MaskedDiffusion(config.block_size, config.mask_id, seed, BATCH_SIZE, entry.ssl_ratio)
    rows = largest_group(BATCH_SIZE, group_size("train_mdm_rl", config.size_in_millions))

    def tokens(step: int) -> int:
        return rows * sum(objective.group(step, group, []).length for group in range(BATCH_SIZE // rows))

    per_token = 6 * config.non_embedding_params
    read = sum(map(tokens, range(steps)))
    while per_token * (read := read + tokens(steps)) <= flops:
        steps += 1
    return steps


def _steps_of_minutes(
    pipeline: Pipeline, packed: Stage, entry: SpeedrunEntry, minutes: float, model: tuple[ModelShape, int]
) -> int:
    """Steps of 16 rows that the time pays for, by the speed of a short run of the same flags."""
    shape, seed = model
    flags = {**entry.flags(_CALIBRATION_STEPS, shape, seed), "val_samples": 0}
    name = f"{entry.name}-calibration-{seed}"
    trained: TrainedModel = train_model(
        pipeline, name, f"{entry.name}: {_CALIBRATION_STEPS} steps for the speed", packed, (entry.script, flags)
    )
    read = trained.result["total_tokens"] / (BATCH_SIZE * shape.block_size)
    return max(1, int(_PLANNED_SHARE * minutes * 60 * read / _train_seconds(pipeline.out / name)))


def _train_seconds(folder: Path) -> float:
    """Training time from a run's log, over all its starts: validation and saving not counted."""
    (record,) = folder.glob("run/*/run.json")
    # A run that was killed before its first checkpoint began anew, with a log of its own.
    version = Path(read_json_object(record)["log_path"]).parent.name
    (path,) = folder.glob(f"log/*/{version}/metrics.csv")
    with path.open(newline="") as file:
        times = [float(row["time/train"]) for row in csv.DictReader(file) if row["time/train"]]
    # The clock begins anew when an interrupted run goes on.
    return sum(now for now, following in zip(times, [*times[1:], 0.0], strict=True) if following < now)


def add_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put entries' lines into a file of JSON lines; one of the same hash, budget and machine is replaced.

    Returns:
        All lines of the file.
    """
    found = [parse_json(line) for line in path.read_text().splitlines()] if path.exists() else []

    def key(line: Mapping[str, Any]) -> tuple[Any, ...]:
        return line["name"], line["hash"], json.dumps(line["budget"]), line["machine"]

    merged = {key(line): dict(line) for line in [*found, *lines]}
    text = "".join(json.dumps(line) + "\n" for line in merged.values())
    write_file(path, lambda file: file.write(text.encode()))
    return list(merged.values())


def speedrun_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Entries by budget, the best first; one that took longer than its time, or of other rows, is left out; words for none."""
    rows = []
    counted = [
        line
        for line in lines
        if line["train_s"] <= 60 * line["budget"].get("minutes", float("inf"))
        and line["settings"].get("block_size", _TABLE_ROW) == _TABLE_ROW
    ]
    for line in sorted(counted, key=lambda line: (json.dumps(line["budget"]), line["bits_per_byte"])):
        ((unit, amount),) = line["budget"].items()
        bound = "<= " if line["is_bound"] else ""
        error = line["bits_per_byte_se"] or float("nan")
        rows.append([
            f"{amount:g} {'FLOPs' if unit == 'flops' else unit}", f"`{line['name']}`",
            bound + with_error(line["bits_per_byte"], error), f"{bound}{line['nats_per_token']:.3f}",
            f"{line['flops']:.3g}", f"{line['train_s'] / 60:.1f}", f"`{line['hash']}`", f"`{(line['commit'] or '')[:8]}`",
            str(line["settings"].get("seed", "")), line["date"],
        ])  # fmt: skip
    if not rows:
        return "Not yet measured."
    heads = ["budget", "entry", "bits per byte", "nats per token", "FLOPs", "minutes", "hash", "commit", "seed", "date"]
    return markdown_table(heads, rows)


def write_table(page: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Replace the table of a page, between its two marks.

    Raises:
        ValueError: the page has no such marks.
    """
    text = page.read_text()
    before, start, rest = text.partition(_TABLE_START)
    _, end, after = rest.partition(_TABLE_END)
    if not (start and end):
        raise ValueError(f"{page}: no place for the table (expected a line {_TABLE_START.strip()})")
    changed = before + start + "\n" + speedrun_table(lines) + "\n" + end + after
    write_file(page, lambda file: file.write(changed.encode()))
