r"""What stochastic lengths are for: does an MDM that was trained on long rows read short ones as well as it could?

    python scripts/study_stochastic_lengths.py                                  about 15 minutes on two CPU cores with bf16
    python scripts/study_stochastic_lengths.py --flops 1e-6 --seeds 1 --blocks 8 --positions 64 --out quick   a short look

Trains MDMs on rows of one length by pretrain/train_mdm.py, and others at the same compute by pretrain/train_mdm_rl.py, which
cuts a share of the steps to a random length; then measures all of them on shorter rows of the same validation text: the
loss, and how often the next token is right. Writes stochastic_lengths.md, .png and .csv to docs/results, or of a short
look to --out, where everything else lies. What is finished is not done again; after Ctrl-C the same command goes on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import below_least, parse, run

if TYPE_CHECKING:
    from lit_gpt.pipeline import Pipeline, Stage
    from lit_gpt.studies.trained_models import TrainedModel

ROOT = Path(__file__).resolve().parents[1]
PAGE = "stochastic_lengths.md"
PLAIN = "one length"
PADDED = "one length, filled up with [MASK]"


@dataclass
class Flags:
    """Flags of the study."""

    text: str = str(ROOT / "data" / "tinyshakespeare" / "input.txt")
    """The corpus, one text file; its last tenth is for validation."""
    flops: float = 1.6e-5
    """Compute of each model, in units of 1e18 FLOPs."""
    ssl_ratios: list[float] = field(default_factory=lambda: [0.01, 0.1])
    """Shares of random lengths that are tried; the paper's is 0.01."""
    seeds: int = 2
    """Models of each kind."""
    lengths: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    """Tokens of a row in the measurement; the last is the one of training, which the others divide."""
    vocab_size: int = 512
    """Pieces of the tokenizer."""
    n_layer: int = 4
    """Blocks."""
    n_embd: int = 128
    """Width."""
    batch_size: int = 16
    """Sequences of a step."""
    learning_rate: float = 2e-3
    """Peak."""
    blocks: int = 128
    """Rows of validation text, each read whole and in pieces."""
    budget: int = 16
    """Forward passes for the loss of a piece."""
    positions: int = 2048
    """Next tokens that are predicted."""
    out: str = "workdir/study_stochastic_lengths"
    """Folder for everything that is made on the way."""
    docs: str | None = None
    """Folder for the page, its picture and its CSV; by default docs/results, or --out where a flag makes it another study."""


def main() -> None:
    """Train, measure, write the page."""
    flags = parse(Flags, None, __doc__)
    check(flags)

    from rich.console import Console

    from lit_gpt.pipeline import Pipeline
    from lit_gpt.studies.stochastic_lengths import LengthStudy, write_length_page
    from lit_gpt.studies.study_pages import report_folder, typed, written_by
    from lit_gpt.studies.text_corpus import packed_text

    folder = report_folder(flags, PAGE)
    pipeline = Pipeline(Path(flags.out), Console(highlight=False))
    kinds = {PLAIN: None, **{f"{ratio:.3g} random lengths": ratio for ratio in flags.ssl_ratios}}
    packed = packed_text(pipeline, Path(flags.text), flags.vocab_size, flags.lengths[-1], 5)
    trained: dict[str, list[TrainedModel]] = {name: [] for name in kinds}
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in [*kinds, PADDED]}
    for seed in range(1, flags.seeds + 1):
        for name, ratio in kinds.items():
            model = train(flags, pipeline, packed, ratio, seed)
            trained[name].append(model)
            found = measure(flags, pipeline, model, f"{ratio or 0:g}-{seed}", name == PLAIN)
            measured[name].append(found["as it is"])
            if name == PLAIN:
                measured[PADDED].append(found["padded"])
    study = LengthStudy(flags.lengths, trained, measured, PLAIN, PADDED)
    commands = [typed(models[0].command) for models in trained.values()]
    table = write_length_page(study, folder / PAGE, written_by("scripts/study_stochastic_lengths.py", flags), commands)
    pipeline.console.print(f"\n{table}\n\nreport: {folder / PAGE}", markup=False, soft_wrap=True)


def check(flags: Flags) -> None:
    """Refuse what cannot be, all of it at once."""
    low = {"seeds": 1, "blocks": 2, "budget": 2, "positions": 2, "batch_size": 1, "n_layer": 1, "n_embd": 32}
    problems = below_least(flags, low)
    if not all(0 < ratio <= 1 for ratio in flags.ssl_ratios) or not flags.ssl_ratios:
        problems.append(f"--ssl_ratios {flags.ssl_ratios}: expected shares above 0, at most 1")
    if not flags.lengths or any(length < 1 or flags.lengths[-1] % length for length in flags.lengths):
        problems.append(f"--lengths {flags.lengths}: expected lengths that divide the last one")
    if problems:
        raise ValueError("; ".join(problems))


def train(flags: Flags, pipeline: Pipeline, packed: Stage, ratio: float | None, seed: int) -> TrainedModel:
    """One model, by the script for its kind."""
    from lit_gpt.studies.trained_models import ModelShape, train_model

    script = "pretrain/train_mdm.py" if ratio is None else "pretrain/train_mdm_rl.py"
    values = {
        **ModelShape(flags.lengths[-1], flags.n_layer, flags.n_embd).flags(),
        "flops": flags.flops,
        "batch_size": flags.batch_size,
        "learning_rate": flags.learning_rate,
        "min_lr": flags.learning_rate / 10,
        "warmup_steps": 100,
        "seed": seed,
        # A compiled model and one that is not round differently, and rows of many lengths are not compiled.
        "compile": "off",
        **({} if ratio is None else {"ssl_ratio": ratio}),
    }
    title = f"4/5 train an MDM, {'rows of one length' if ratio is None else f'{ratio:g} random lengths'}, seed {seed}"
    return train_model(pipeline, f"mdm-{ratio or 0:g}-{seed}", title, packed, (script, values))


def measure(flags: Flags, pipeline: Pipeline, model: TrainedModel, name: str, padded: bool) -> dict[str, Any]:
    """By way of reading and length: the blocks' losses, and the next tokens' losses and hits."""
    names = ("lengths", "blocks", "budget", "positions")
    settings = {"model": model.result, **{name: getattr(flags, name) for name in names}, "padded": padded}
    stage = pipeline.begin(f"measured-{name}", f"5/5 measure model {name}", settings)
    if stage.result is not None:
        return stage.result

    from lit_gpt.studies.stochastic_lengths import measure_lengths

    text = (pipeline.out / "text" / "validation.txt").read_text()
    sizes = (flags.blocks, flags.budget, flags.positions)
    return stage.finish(measure_lengths(model.path, text, flags.lengths, sizes, padded))


if __name__ == "__main__":
    run(main)
