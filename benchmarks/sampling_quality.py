r"""What speed costs in quality: every sampler of an MDM beside an ARM of equal loss, judged by an ARM that wrote none of it.

    python benchmarks/sampling_quality.py                                       about an hour on two CPU cores with bf16
    python benchmarks/sampling_quality.py --steps 40 --judge_steps 5 --most_arms 2 --rows 4 --out quick    a short look

Trains an MDM by a recipe of docs/results/mdm_recipes.md, then ARMs of the same shape with different numbers of steps until
one has the MDM's loss, and a larger ARM as the judge; then writes texts by every sampler and measures the judge's loss,
diversity and speed. Writes sampling_quality.md, .png and .csv to docs/results, or of a short look to --out, where
everything else lies. What is finished is not done again; after Ctrl-C the same command goes on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import below_least, parse, run

if TYPE_CHECKING:
    from lit_gpt.pipeline import Pipeline, Stage
    from lit_gpt.studies.trained_models import ModelShape, TrainedModel

ROOT = Path(__file__).resolve().parents[1]
PAGE = "sampling_quality.md"


@dataclass
class Flags:
    """Flags of the study."""

    text: str = str(ROOT / "data" / "tinyshakespeare" / "input.txt")
    """The corpus, one text file; its last tenth is for validation."""
    steps: int = 9000
    """The MDM's budget, in optimizer steps of the published recipe."""
    recipe: str = "best"
    """How the MDM is trained, as the quickstart's --recipe."""
    batch_size: int = 32
    """Sequences of a step of the published recipe."""
    learning_rate: float = 2e-3
    """Peak of the published recipe."""
    block_size: int = 128
    """Tokens of a sequence, and of a text that is written."""
    vocab_size: int = 512
    """Pieces of the tokenizer: few, so that small models learn much of the text."""
    n_layer: int = 4
    """Blocks of MDM and ARM."""
    n_embd: int = 128
    """Width of MDM and ARM."""
    first_arm: float = 16.0
    """The first ARM gets the MDM's compute divided by this; the paper's factor."""
    most_arms: int = 7
    """ARMs that are tried at most."""
    tolerance: float = 0.02
    """Nats within which an ARM's loss is the MDM's."""
    judge_steps: int = 1200
    """Optimizer steps of the judge, whose width is half as large again."""
    rows: int = 64
    """Texts of each sampler."""
    seed: int = 1
    """Of the trainings; the judge has the next one."""
    out: str = "workdir/sampling_quality"
    """Folder for everything that is made on the way."""
    docs: str | None = None
    """Folder for the page, its picture and its CSV; by default docs/results, or --out where a flag makes it another study."""


def main() -> None:
    """Train, match, sample, write the page."""
    flags = parse(Flags, None, __doc__)
    check(flags)

    from rich.console import Console

    from lit_gpt.pipeline import Pipeline
    from lit_gpt.studies.sampler_quality import SamplerPoint, sampler_settings
    from lit_gpt.studies.sampling_quality_page import QualityStudy, write_quality_page
    from lit_gpt.studies.study_pages import processor_name, report_folder, typed, written_by
    from lit_gpt.studies.text_corpus import packed_text

    folder = report_folder(flags, PAGE)
    pipeline = Pipeline(Path(flags.out), Console(highlight=False))
    packed = packed_text(pipeline, Path(flags.text), flags.vocab_size, flags.block_size, 7)
    models, arm_runs = train_all(flags, pipeline, packed)
    points = [
        SamplerPoint(**values)
        for family in ("real text", *sampler_settings())
        for values in measure(flags, pipeline, models, family)
    ]
    caches = measure(flags, pipeline, models, "caches")
    study = QualityStudy(models, arm_runs, flags.tolerance, points, caches, (flags.rows, flags.block_size))
    commands = [typed(model.command) for model in models.values()]
    machine = f"{processor_name()}, {threads()} threads"
    table = write_quality_page(
        study, folder / PAGE, written_by("benchmarks/sampling_quality.py", flags), machine, commands
    )
    pipeline.console.print(f"\n{table}\n\nreport: {folder / PAGE}", markup=False, soft_wrap=True)


def check(flags: Flags) -> None:
    """Refuse what cannot be, all of it at once."""
    from lit_gpt.studies.mdm_recipes import RECIPES
    from lit_gpt.studies.sampler_quality import PROMPT

    low = {"steps": 1, "batch_size": 1, "n_layer": 1, "n_embd": 32, "most_arms": 1, "judge_steps": 1, "rows": 2}
    low |= {"block_size": PROMPT + 16, "first_arm": 1, "tolerance": 0}
    problems = below_least(flags, low)
    if flags.recipe not in RECIPES:
        problems.append(f"--recipe {flags.recipe}: expected {', '.join(RECIPES)}")
    if problems:
        raise ValueError("; ".join(problems))


def threads() -> int:
    """Of the arithmetic."""
    import torch

    return torch.get_num_threads()


def train_all(flags: Flags, pipeline: Pipeline, packed: Stage) -> tuple[dict[str, TrainedModel], dict[int, float]]:
    """The ARM, the MDM and the judge by name, and the losses of all ARMs that were tried."""
    from lit_gpt.studies.equal_loss import match_loss
    from lit_gpt.studies.mdm_recipes import RECIPES, StepBudget
    from lit_gpt.studies.trained_models import ModelShape, train_model

    shape = ModelShape(flags.block_size, flags.n_layer, flags.n_embd)

    def train(name: str, title: str, steps: int, own: ModelShape, recipe: str, seed: int) -> TrainedModel:
        budget = StepBudget(steps, flags.batch_size, flags.block_size, flags.learning_rate)
        values = {**own.flags(), **RECIPES[recipe].flags(budget), "seed": seed, "val_draws": 16}
        script = "pretrain/train_mdm.py" if name == "mdm" else "pretrain/train_ar.py"
        return train_model(pipeline, name, title, packed, (script, values))

    mdm = train("mdm", "4/7 train the MDM", flags.steps, shape, flags.recipe, flags.seed)
    arms: dict[int, TrainedModel] = {}

    def arm_loss(steps: int) -> float:
        title = f"5/7 train an ARM of {steps} steps"
        arms[steps] = train(f"arm-{steps}", title, steps, shape, "published", flags.seed)
        return float(arms[steps].result["val_loss"])

    target, start = mdm.result["val_loss"], max(1, round(flags.steps / flags.first_arm))
    losses = match_loss(arm_loss, target, start, flags.tolerance, flags.most_arms)
    larger = ModelShape(flags.block_size, flags.n_layer, flags.n_embd // 2 * 3 // 32 * 32 or 32)
    judge = train("judge", "6/7 train the judge", flags.judge_steps, larger, "published", flags.seed + 1)
    return {"ARM": arms[next(iter(losses))], "MDM": mdm, "judge": judge}, losses


def measure(flags: Flags, pipeline: Pipeline, models: dict[str, TrainedModel], family: str) -> list[dict[str, Any]]:
    """What one family of samplers writes, or what the caches change."""
    settings = {"models": {name: model.result for name, model in models.items()}, "rows": flags.rows}
    stage = pipeline.begin(f"texts/{family.replace(', ', '-').replace(' ', '_')}", f"7/7 texts: {family}", settings)
    if stage.result is not None:
        return stage.result["points"]  # type: ignore[no-any-return]

    from lit_gpt.studies.sampler_quality import cache_divergence, measure_family

    text = (pipeline.out / "text" / "validation.txt").read_text()
    judge, sizes = models["judge"].path, (flags.rows, flags.block_size)
    if family == "caches":
        points = cache_divergence(models["MDM"].path, judge, text, sizes)
    else:
        points = measure_family(family, models["ARM" if family == "ARM" else "MDM"].path, judge, text, sizes)
    return stage.finish({"points": points})["points"]  # type: ignore[no-any-return]


if __name__ == "__main__":
    run(main)
