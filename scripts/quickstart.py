"""The main job on one page: tokenizer, packed data, an ARM and an MDM at equal compute, their losses and their text.

    python scripts/quickstart.py                          the whole job on two CPU cores
    python scripts/quickstart.py --steps 60 --out quick   a short look at everything
    python scripts/quickstart.py --recipe best --out best the MDM by the best recipe that is known at this size
    python scripts/quickstart.py --text my.txt --out mine your own text (a few hundred kB or more)

Trains through the scripts that a cluster user runs. Everything lands in --out: losses.png, denoising.png and .gif,
samples.txt, summary.json, and the models. What is finished is not done again; after Ctrl-C the same command goes on.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run, warn

if TYPE_CHECKING:
    from lit_gpt.pipeline import Pipeline, Stage

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"arm": "pretrain/train_ar.py", "mdm": "pretrain/train_mdm.py"}
NAMES = {"arm": "ARM (autoregressive)", "mdm": "MDM (masked diffusion)"}
_SHOWN_STEPS = 6
"""Of the MDM's denoising, where the output is no terminal."""


@dataclass
class Flags:
    """Flags of the quickstart."""

    out: str = "quickstart"
    """Folder for everything that is made."""
    text: str = str(ROOT / "data" / "tinyshakespeare" / "input.txt")
    """The corpus, one text file; its last tenth is for validation."""
    steps: int = 1200
    """Optimizer steps of each model."""
    batch_size: int = 16
    """Sequences of a step."""
    block_size: int = 128
    """Tokens of a sequence."""
    vocab_size: int = 2048
    """Pieces of the tokenizer."""
    n_layer: int = 4
    """Blocks."""
    n_head: int = 4
    """Heads."""
    n_embd: int = 128
    """Width."""
    intermediate_size: int = 512
    """Width of the MLP."""
    recipe: str = "published"
    """How the MDM is trained, at the same FLOPs: published, best, or another of docs/results/mdm_recipes.md."""
    learning_rate: float = 2e-3
    """Peak; small models need more than the big ones' 2e-4 (3e-3 and 600 steps left the MDM at the unigram's loss)."""
    val_draws: int = 4
    """Noise draws per validation sequence for the MDM's bound."""
    prompt: str | None = None
    """How the samples begin; by default the first line of the validation text."""
    sampling_steps: int = 128
    """Denoising steps of the MDM."""
    temperature: float = 0.7
    """Of both models' samples."""
    seed: int = 3407
    """Decides weights, data order, noise and samples."""


def main() -> None:
    """Every stage in turn, then the summary."""
    flags = parse(Flags, None, __doc__)
    if flags.steps < 1 or flags.temperature < 0:
        raise ValueError(
            f"--steps {flags.steps}, --temperature {flags.temperature}: expected at least 1 and at least 0"
        )

    from rich.console import Console

    from lit_gpt.pipeline import Pipeline
    from lit_gpt.studies.mdm_recipes import RECIPES
    from lit_gpt.studies.text_corpus import packed_text

    if flags.recipe not in RECIPES:
        raise ValueError(f"--recipe {flags.recipe}: expected {', '.join(RECIPES)}")
    started = time.monotonic()
    console = Console(highlight=False)
    pipeline = Pipeline(Path(flags.out), console, lambda line: not line.startswith("error: "))
    packed = packed_text(pipeline, Path(flags.text), flags.vocab_size, flags.block_size, 6)
    results = {kind: train(kind, flags, pipeline, packed) for kind in SCRIPTS}
    plot_curves(results, pipeline.out, flags.recipe)
    samples = sample(flags, pipeline, packed, results)
    summarise(flags, pipeline, results, samples, time.monotonic() - started)


# --- training ---------------------------------------------------------------------------------------------------------


def train(kind: str, flags: Flags, pipeline: Pipeline, packed: Stage) -> dict[str, Any]:
    """Train one model with the script of a cluster user; both get the same shape, data and FLOPs."""
    from lit_gpt.files import read_json_object
    from lit_gpt.studies.mdm_recipes import RECIPES, StepBudget
    from lit_gpt.studies.trained_models import run_training, training_command

    recipe = RECIPES[flags.recipe if kind == "mdm" else "published"]
    budget = StepBudget(flags.steps, flags.batch_size, flags.block_size, flags.learning_rate)
    shape = {name: getattr(flags, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "intermediate_size")}
    settings = {
        **recipe.flags(budget),
        "seed": flags.seed,
        "val_draws": flags.val_draws,
        "n_query_groups": flags.n_head,
        **shape,
    }
    title = f"{4 + list(SCRIPTS).index(kind)}/6 train the {NAMES[kind]}"
    stage = pipeline.begin(kind, title, {**packed.settings, "kind": kind, **settings})
    if stage.result is not None:
        return stage.result
    often = {"save_interval": 100, "val_interval": max(1, -(-settings["max_steps"] // 5))}
    command = training_command(stage, packed, SCRIPTS[kind], {**settings, **often})
    run_folder, elapsed_s = run_training(pipeline, stage, command, settings["max_steps"])
    record = read_json_object(run_folder / "run.json")
    # ru_maxrss is the largest of all children so far, in KiB.
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    return stage.finish(
        {
            **record["result"],
            "run": str(run_folder),
            "metrics": record["log_path"],
            "config": record["config"],
            "last_start_s": round(elapsed_s, 1),
            "peak_memory_gb": round(peak_gb, 2),
        }
    )


def plot_curves(results: dict[str, dict[str, Any]], out: Path, recipe: str) -> None:
    """Both models' losses in one plot, if they are newer than it."""
    path = out / "losses.png"
    trained = max((out / kind / "stage.json").stat().st_mtime for kind in SCRIPTS)
    if path.exists() and path.stat().st_mtime > trained:
        return

    from lit_gpt.config import Config
    from lit_gpt.studies.mdm_recipes import RECIPES
    from lit_gpt.ui.plots import LossCurve, format_count, plot_losses

    curves = []
    for kind, result in results.items():
        label = f"{kind.upper()} (upper bound)" if result.get("val_is_bound") else kind.upper()
        curve = LossCurve.from_csv(label, result["metrics"], result["total_tokens"] / result["step"])
        # Another training loss than the bound is no number to compare with the bound.
        bound_is_trained = kind == "arm" or RECIPES[recipe].loss_weight == "elbo"
        curves.append(curve if bound_is_trained else replace(curve, train=[]))
    tokens = format_count(results["arm"]["total_tokens"])
    size = Config.from_dict(results["arm"]["config"]).size_in_millions
    plot_losses(curves, f"An ARM and an MDM of {size:.3g}M parameters (embeddings apart), {tokens} tokens each", path)


# --- samples ----------------------------------------------------------------------------------------------------------


def sample(flags: Flags, pipeline: Pipeline, packed: Stage, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Text from both models; the MDM's is shown as it emerges, and drawn."""
    out, console = pipeline.out, pipeline.console
    settings = {name: getattr(flags, name) for name in ("prompt", "sampling_steps", "temperature", "seed")}
    stage = pipeline.begin("samples", "6/6 sample", {**packed.settings, "models": results, **settings})
    if stage.result is not None:
        return stage.result

    from lit_gpt.checkpoints.loaded import load_model
    from lit_gpt.sampling.sample import sample_states
    from lit_gpt.sampling.settings import Sampling
    from lit_gpt.tokenizer import Tokenizer
    from lit_gpt.ui.trajectory import DenoisingTrajectory, indented, replay_trajectory
    from lit_gpt.ui.trajectory_images import animate_trajectory, draw_trajectory

    tokenizer = Tokenizer(out / "tokenizer")
    validation = (out / "text" / "validation.txt").read_text()
    prompt = validation.lstrip().split("\n", 1)[0] + "\n" if flags.prompt is None else flags.prompt
    ids = tokenizer.encode_ids(prompt)
    sampling = Sampling("origin", flags.sampling_steps, flags.temperature, seed=flags.seed)
    texts, rates = {}, {}
    for kind, result in results.items():
        model = load_model(result["export"], kind=kind, device="cpu", dtype="float32").model
        started = time.perf_counter()
        states = list(sample_states(model, [ids], sampling, flags.block_size, tokenizer.eos_id))
        rates[kind] = (flags.block_size - len(ids)) / (time.perf_counter() - started)
        texts[kind] = tokenizer.decode(states[-1].tokens()[0])
        console.print(f"  a sample of the {NAMES[kind]}, {rates[kind]:,.0f} tokens/s:", style="bold")
        if kind == "mdm":
            trajectory = DenoisingTrajectory.from_states(states, 0, model.config.mask_id, tokenizer)
            replay_trajectory(trajectory, console, _SHOWN_STEPS)
            draw_trajectory(trajectory, "How the MDM wrote its text", out / "denoising.png")
            animate_trajectory(trajectory, out / "denoising.gif")
            (stage.folder / "denoising.json").write_text(json.dumps(trajectory.to_dict()))
        else:
            console.print(indented(texts[kind]), markup=False, soft_wrap=True)
    written = "\n\n".join(f"=== {NAMES[kind]} ===\n{text}" for kind, text in texts.items())
    (out / "samples.txt").write_text(written + "\n")
    return stage.finish({"prompt": prompt, "texts": texts, "sampled_tokens_per_s": rates})


# --- the end ----------------------------------------------------------------------------------------------------------


def summarise(
    flags: Flags, pipeline: Pipeline, results: dict[str, Any], samples: dict[str, Any], elapsed_s: float
) -> None:
    """Print what came out, where it lies and what to type next; the numbers also as JSON."""
    from lit_gpt.files import write_json
    from lit_gpt.ui.loss_table import print_loss_table

    out, console = pipeline.out, pipeline.console
    validated = {NAMES[kind]: result for kind, result in results.items() if "val_loss" in result}
    for _ in range(len(results) - len(validated)):
        warn(f"the validation text is shorter than a block of {flags.block_size} tokens: no validation loss")
    write_json(out / "summary.json", {"elapsed_s": round(elapsed_s, 1), "models": results, "samples": samples})
    console.print()
    print_loss_table(validated, "Validation at equal compute", console)
    mdm = results["mdm"]
    for path, what in (
        (out / "losses.png", "the loss curves"),
        (out / "denoising.png", "the MDM's text by step; denoising.gif shows it moving"),
        (out / "samples.txt", "what both models wrote"),
        (out / "summary.json", "all numbers"),
        (Path(results["arm"]["export"]), "the ARM"),
        (Path(mdm["export"]), "the MDM"),
    ):
        console.print(f"  {path}  {what}", soft_wrap=True)
    console.print("\nNext:", style="bold")
    python = "python" if sys.prefix == sys.base_prefix else str(Path(sys.prefix) / "bin" / "python")
    if Path(python).is_relative_to(ROOT):
        python = str(Path(python).relative_to(ROOT))
    for line in (
        f"{python} scripts/chat.py --ckpt_path {mdm['export']}",
        f"{python} scripts/info.py {mdm['export']}",
        f"{python} scripts/quickstart.py --steps {flags.steps * 4} --out {out}-longer",
        f"{python} scripts/quickstart.py --text YOUR.txt --out {out}-yours",
        f"{python} pretrain/train_mdm.py --help",
    ):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    console.print(f"\ndone in {elapsed_s / 60:.1f} minutes")


if __name__ == "__main__":
    run(main)
