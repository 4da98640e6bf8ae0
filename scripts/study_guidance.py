r"""What unsupervised guidance is for: does masking the condition make an MDM's answers better that saw no pairs?

    python scripts/study_guidance.py                                            about 20 minutes on two CPU cores with bf16
    python scripts/study_guidance.py --steps 40 --questions 16 --passages 8 --scales "[0,1]" --out quick     a short look

Trains an MDM on plain text by pretrain/train_mdm.py, and asks it at several scales of classifier-free guidance: the bundled
tasks by evaluate_diff.py, and continuations of the validation text with their likelihoods. Writes guidance.md, .png and
.csv to docs/results, or of a short look to --out, where everything else lies. What is finished is not done again; after
Ctrl-C the same command goes on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import below_least, parse, run

if TYPE_CHECKING:
    from lit_gpt.pipeline import Pipeline
    from lit_gpt.studies.trained_models import TrainedModel

ROOT = Path(__file__).resolve().parents[1]
PAGE = "guidance.md"
TASKS = {"next_line": ("lines", "acc", 1.0), "lambada_local": ("words", "perplexity", -1.0)}
"""By task: our name for its results, the harness's, and a factor, so that a log-likelihood becomes nats."""


@dataclass
class Flags:
    """Flags of the study."""

    text: str = str(ROOT / "data" / "tinyshakespeare" / "input.txt")
    """The corpus, one text file; its last tenth is for validation."""
    steps: int = 3000
    """Optimizer steps of the MDM."""
    batch_size: int = 32
    """Sequences of a step."""
    learning_rate: float = 2e-3
    """Peak."""
    block_size: int = 128
    """Tokens of a sequence."""
    vocab_size: int = 512
    """Pieces of the tokenizer."""
    n_layer: int = 4
    """Blocks."""
    n_embd: int = 128
    """Width."""
    seed: int = 1
    """Of the training."""
    scales: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 1.0, 2.0, 4.0])
    """Scales of guidance; 0, none, is the first."""
    questions: int = 384
    """Continuations that are asked for, each with three wrong ones."""
    prefix: int = 64
    """Tokens of a condition."""
    target: int = 16
    """Tokens of a continuation."""
    passages: int = 200
    """LAMBADA's, of 500; next_line has 180 questions."""
    budget: int = 16
    """Forward passes for the likelihood of an answer."""
    out: str = "workdir/study_guidance"
    """Folder for everything that is made on the way."""
    docs: str | None = None
    """Folder for the page, its picture and its CSV; by default docs/results, or --out where a flag makes it another study."""


def main() -> None:
    """Train, ask at every scale, write the page."""
    flags = parse(Flags, None, __doc__)
    check(flags)

    from rich.console import Console

    from lit_gpt.config import Config
    from lit_gpt.pipeline import Pipeline
    from lit_gpt.studies.guidance import write_guidance_page
    from lit_gpt.studies.study_pages import report_folder, typed, written_by

    folder = report_folder(flags, PAGE)
    pipeline = Pipeline(Path(flags.out), Console(highlight=False), is_shown)
    model = train(flags, pipeline)
    found = {scale: ask(flags, pipeline, model, scale) for scale in flags.scales}
    facts = {name: getattr(flags, name) for name in ("prefix", "target", "passages")}
    facts |= {"tokens": model.result["total_tokens"], "val_loss": model.result["val_loss"]}
    facts |= {"written": written_by("scripts/study_guidance.py", flags)}
    facts |= {"parameters": f"{Config.from_dict(model.result['config']).size_in_millions:.3g}"}
    commands = [typed(model.command), *map(typed, harness_commands(flags, model, flags.scales[-1], Path("RESULTS")))]
    table = write_guidance_page(found, folder / PAGE, facts, commands)
    pipeline.console.print(f"\n{table}\n\nreport: {folder / PAGE}", markup=False, soft_wrap=True)


def is_shown(line: str) -> bool:
    """What scripts print, but the harness's log, and its progress bars, which are for terminals."""
    hidden = ("error: ", "bootstrapping", "mdlm (")
    logged = " INFO  " in line or "--limit SHOULD" in line
    return bool(line.strip()) and not line.startswith(hidden) and not logged and "%|" not in line


def check(flags: Flags) -> None:
    """Refuse what cannot be, all of it at once."""
    low = {"steps": 1, "batch_size": 1, "n_layer": 1, "n_embd": 32, "questions": 2, "passages": 2, "budget": 2}
    low |= {"prefix": 1, "target": 1}
    problems = below_least(flags, low)
    if not flags.scales or flags.scales[0] != 0 or min(flags.scales) < 0 or len(set(flags.scales)) < len(flags.scales):
        problems.append(f"--scales {flags.scales}: expected different numbers from 0 up, 0 the first")
    if flags.prefix + flags.target > flags.block_size:
        problems.append(f"--prefix {flags.prefix} --target {flags.target}: together at most --block_size")
    if problems:
        raise ValueError("; ".join(problems))


def train(flags: Flags, pipeline: Pipeline) -> TrainedModel:
    """The MDM."""
    from lit_gpt.studies.text_corpus import packed_text
    from lit_gpt.studies.trained_models import ModelShape, train_model

    packed = packed_text(pipeline, Path(flags.text), flags.vocab_size, flags.block_size, 5)
    values = {
        **ModelShape(flags.block_size, flags.n_layer, flags.n_embd).flags(),
        "max_steps": flags.steps,
        "batch_size": flags.batch_size,
        "learning_rate": flags.learning_rate,
        "min_lr": flags.learning_rate / 10,
        "warmup_steps": min(100, flags.steps),
        "seed": flags.seed,
    }
    return train_model(pipeline, "mdm", "4/5 train an MDM", packed, ("pretrain/train_mdm.py", values))


def harness_commands(flags: Flags, model: TrainedModel, scale: float, folder: Path) -> list[list[Any]]:
    """The evaluations by lm-evaluation-harness at a scale, one for each task."""
    arguments = f"ckpt_path={model.path},nll_type=exact,budget={flags.budget},cfg={scale:g},dtype=float32,device=cpu"
    common = ["--include_path", ROOT / "tasks", "--model", "mdlm", "--model_args", arguments, "--output_path", folder]
    common += ["--log_samples"]
    limits = {"next_line": [], "lambada_local": ["--limit", flags.passages]}
    return [["evaluate_diff.py", "--tasks", task, *common, *limits[task]] for task in TASKS]


def ask(flags: Flags, pipeline: Pipeline, model: TrainedModel, scale: float) -> dict[str, Any]:
    """Continuations and the bundled tasks at one scale."""
    names = ("questions", "prefix", "target", "passages", "budget")
    settings = {"model": model.result, "scale": scale, **{name: getattr(flags, name) for name in names}}
    stage = pipeline.begin(f"scale-{scale:g}", f"5/5 guidance at scale {scale:g}", settings)
    if stage.result is not None:
        return stage.result

    from lit_gpt.studies.guidance import measure_guidance, read_harness_samples

    text = (pipeline.out / "text" / "validation.txt").read_text()
    sizes = (flags.questions, flags.prefix, flags.target)
    found = measure_guidance(model.path, text, scale, sizes, flags.budget)
    commands = harness_commands(flags, model, scale, stage.folder)
    for (task, (name, metric, factor)), command in zip(TASKS.items(), commands, strict=True):
        pipeline.run(command)
        found[name] = [factor * value for value in read_harness_samples(stage.folder, task, metric)]
    return stage.finish(found)


if __name__ == "__main__":
    run(main)
