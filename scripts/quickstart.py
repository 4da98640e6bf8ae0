"""The main job on one page: tokenizer, packed data, an ARM and an MDM at equal compute, their losses and their text.

    python scripts/quickstart.py                          the whole job on two CPU cores
    python scripts/quickstart.py --steps 60 --out quick   a short look at everything
    python scripts/quickstart.py --text my.txt --out mine your own text (a few hundred kB or more)

Trains through the scripts that a cluster user runs. Everything lands in --out: losses.png, denoising.png and .gif,
samples.txt, summary.json, and the models. What is finished is not done again; after Ctrl-C the same command goes on.
"""

from __future__ import annotations

import csv
import hashlib
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run, warn

if TYPE_CHECKING:
    from rich.console import Console

    from lit_gpt.pipeline import Stage
    from lit_gpt.ui.plots import LossCurve

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"arm": "train_ar.py", "mdm": "train_mdm.py"}
NAMES = {"arm": "ARM (autoregressive)", "mdm": "MDM (masked diffusion)"}
_SNAPSHOTS = 6


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

    started = time.monotonic()
    console = Console(highlight=False)
    out = Path(flags.out)
    settings: dict[str, Any] = {}
    split_text(flags, out, settings, console)
    make_tokenizer(flags, out, settings, console)
    pack(flags, out, settings, console)
    results = {kind: train(kind, flags, out, dict(settings), console) for kind in KINDS}
    draw_losses(results, out)
    samples = sample(flags, out, {**settings, "models": results}, console)
    summarise(flags, out, results, samples, console, time.monotonic() - started)


# --- data -------------------------------------------------------------------------------------------------------------


def split_text(flags: Flags, out: Path, settings: dict[str, Any], console: Console) -> None:
    """Cut the corpus by position: the last tenth, from the start of a paragraph, is for validation."""
    path = Path(flags.text)
    if not path.is_file():
        raise FileNotFoundError(f"--text {path}: no such file; give a text file")
    text = path.read_bytes().decode("utf-8", errors="replace")
    settings["text"] = hashlib.sha256(text.encode()).hexdigest()
    stage, done = _stage(out, "text", settings, console, "1/6 split the text")
    if done is not None:
        return
    tenth = len(text) * 9 // 10
    paragraph = text.find("\n\n", tenth)
    cut = paragraph + 2 if paragraph >= 0 else tenth
    if not text[:cut].strip() or not text[cut:].strip():
        raise ValueError(f"--text {path}: too short to split into training and validation text")
    for name, part in (("train.txt", text[:cut]), ("validation.txt", text[cut:])):
        (stage.folder / name).write_bytes(part.encode())
    console.print(f"  {cut:,} characters to train on, {len(text) - cut:,} to validate on")
    stage.finish({})


def make_tokenizer(flags: Flags, out: Path, settings: dict[str, Any], console: Console) -> None:
    """Learn pieces from the training text only."""
    settings["vocab_size"] = flags.vocab_size
    stage, done = _stage(out, "tokenizer", settings, console, "2/6 train a tokenizer")
    if done is None:
        arguments = ("--source_path", out / "text" / "train.txt", "--destination_path", stage.folder)
        _script("scripts/train_tokenizer.py", *arguments, "--vocab_size", flags.vocab_size, console=console)
        stage.finish({})


def pack(flags: Flags, out: Path, settings: dict[str, Any], console: Console) -> None:
    """Write both texts as token files."""
    settings["block_size"] = flags.block_size
    stage, done = _stage(out, "packed", settings, console, "3/6 pack the tokens")
    if done is not None:
        return
    for name, prefix in (("train", "train_slim"), ("validation", "validation")):
        _script(
            *("scripts/prepare_text.py", "--source_path", out / "text" / f"{name}.txt", "--prefix", prefix),
            *("--destination_path", stage.folder, "--tokenizer_path", out / "tokenizer"),
            *("--chunk_size", 1024 * (flags.block_size + 1)),
            console=console,
        )
    stage.finish({})


# --- training ---------------------------------------------------------------------------------------------------------


def train(kind: str, flags: Flags, out: Path, settings: dict[str, Any], console: Console) -> dict[str, Any]:
    """Train one model with the script of a cluster user; both get the same shape, data, steps and batch."""
    shape = {name: getattr(flags, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "intermediate_size")}
    numbers = {"batch_size": flags.batch_size, "learning_rate": flags.learning_rate, "seed": flags.seed}
    numbers |= {
        "max_steps": flags.steps,
        "val_draws": flags.val_draws,
        "warmup_steps": max(1, min(100, flags.steps // 10)),
    }
    numbers |= {"min_lr": flags.learning_rate / 10, "n_query_groups": flags.n_head, **shape}
    settings |= {"kind": kind, **numbers}
    number = 4 + list(KINDS).index(kind)
    stage, done = _stage(out, kind, settings, console, f"{number}/6 train the {NAMES[kind]}")
    if done is not None:
        return done
    from lit_gpt.ui.training_progress import TrainingProgress

    folder = stage.folder
    flag_values = {
        **numbers,
        "model": 6,
        "data_dir": out / "packed",
        "out_dir": folder / "run",
        "log_dir": folder / "log",
        "models_dir": folder / "model",
        "save_interval": 100,
        "keep_checkpoints": 1,
        "val_interval": max(1, -(-flags.steps // 5)),
    }
    started = time.monotonic()
    with TrainingProgress(console, flags.steps) as watch:
        _script(f"pretrain/{KINDS[kind]}", *(f"--{name}={value}" for name, value in flag_values.items()), watch=watch)
    elapsed_s = time.monotonic() - started
    (record_path,) = (folder / "run").glob("*/run.json")
    record = json.loads(record_path.read_text())
    # ru_maxrss is the largest of all children so far, in KiB.
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    return stage.finish(
        {
            **record["result"],
            "run": str(record_path.parent),
            "metrics": record["log_path"],
            "config": record["config"],
            "last_start_s": round(elapsed_s, 1),
            "peak_memory_gb": round(peak_gb, 2),
        }
    )


def loss_curve(kind: str, result: dict[str, Any]) -> LossCurve:
    """The losses in a run's CSV."""
    from lit_gpt.ui.plots import LossCurve

    with open(result["metrics"], newline="") as file:
        rows = list(csv.DictReader(file))
    tokens_per_step = result["total_tokens"] / result["step"]
    train_losses, val_losses = (
        [(int(int(row["step"]) * tokens_per_step), float(row[name])) for row in rows if row.get(name)]
        for name in ("metric/train_loss", "metric/val_loss")
    )
    label = f"{kind.upper()} (upper bound)" if result.get("val_is_bound") else kind.upper()
    return LossCurve(label, train_losses, val_losses)


def draw_losses(results: dict[str, dict[str, Any]], out: Path) -> None:
    """Both models' curves in one picture, if they are newer than it."""
    path = out / "losses.png"
    trained = max((out / kind / "stage.json").stat().st_mtime for kind in KINDS)
    if path.exists() and path.stat().st_mtime > trained:
        return

    from lit_gpt.config import Config
    from lit_gpt.ui.plots import format_count, plot_losses

    tokens = format_count(results["arm"]["total_tokens"])
    size = Config.from_dict(results["arm"]["config"]).size_in_millions
    title = f"An ARM and an MDM of {size:.3g}M parameters (embeddings apart), {tokens} tokens each"
    plot_losses([loss_curve(kind, result) for kind, result in results.items()], title, path)


# --- samples ----------------------------------------------------------------------------------------------------------


def sample(flags: Flags, out: Path, settings: dict[str, Any], console: Console) -> dict[str, Any]:
    """Text from both models; the MDM's is shown as it emerges, and drawn."""
    settings |= {name: getattr(flags, name) for name in ("prompt", "sampling_steps", "temperature", "seed")}
    stage, done = _stage(out, "samples", settings, console, "6/6 sample")
    if done is not None:
        return done

    from lit_gpt.checkpoints.weights import load_model
    from lit_gpt.sampling.sample import sample_states
    from lit_gpt.sampling.settings import Sampling
    from lit_gpt.tokenizer import Tokenizer
    from lit_gpt.ui.trajectory import DenoisingTrajectory, indented
    from lit_gpt.ui.trajectory_images import animate_trajectory, draw_trajectory

    tokenizer = Tokenizer(out / "tokenizer")
    validation = (out / "text" / "validation.txt").read_text()
    prompt = validation.lstrip().split("\n", 1)[0] + "\n" if flags.prompt is None else flags.prompt
    ids = tokenizer.encode_ids(prompt)
    how = Sampling("origin", flags.sampling_steps, flags.temperature, seed=flags.seed)
    texts, rates = {}, {}
    for kind in KINDS:
        model, _ = load_model(settings["models"][kind]["export"], kind=kind)
        started = time.perf_counter()
        states = list(sample_states(model, [ids], how, flags.block_size, tokenizer.eos_id))
        rates[kind] = (flags.block_size - len(ids)) / (time.perf_counter() - started)
        texts[kind] = tokenizer.decode(states[-1].tokens()[0])
        console.print(f"  a sample of the {NAMES[kind]}, {rates[kind]:,.0f} tokens/s:", style="bold")
        if kind == "mdm":
            trajectory = DenoisingTrajectory.from_states(states, 0, model.config.mask_id, tokenizer)
            show_denoising(trajectory, console)
            draw_trajectory(trajectory, "How the MDM wrote its text", out / "denoising.png")
            animate_trajectory(trajectory, out / "denoising.gif")
            (stage.folder / "denoising.json").write_text(json.dumps(trajectory.to_dict()))
        else:
            console.print(indented(texts[kind]), markup=False, soft_wrap=True)
    written = "\n\n".join(f"=== {NAMES[kind]} ===\n{text}" for kind, text in texts.items())
    (out / "samples.txt").write_text(written + "\n")
    return stage.finish({"prompt": prompt, "texts": texts, "sampled_tokens_per_s": rates})


def show_denoising(denoising: Any, console: Console) -> None:
    """Text emerging from masks: moving on a terminal, some snapshots elsewhere."""
    from lit_gpt.ui.trajectory import print_trajectory

    if not console.is_terminal:
        print_trajectory(denoising, console, _SNAPSHOTS)
        return

    from rich.live import Live
    from rich.padding import Padding

    with Live(console=console, auto_refresh=False) as live:
        for step in denoising.select_steps(denoising.steps):
            live.update(Padding(denoising.styled_text(step), (0, 0, 0, 2)), refresh=True)
            time.sleep(4 / denoising.steps)


# --- the end ----------------------------------------------------------------------------------------------------------


def summarise(
    flags: Flags, out: Path, results: dict[str, Any], samples: dict[str, Any], console: Console, elapsed_s: float
) -> None:
    """Say what came out, where it lies and what to type next; the same as JSON."""
    from rich.table import Table

    from lit_gpt.files import write_json

    table = Table(title="Validation at equal compute")
    for column in ("", "loss, nats/token", "perplexity/token", "bits per byte"):
        table.add_column(column, justify="right" if column else "left")
    for kind, result in results.items():
        if "val_loss" not in result:
            warn(f"the validation text is shorter than a block of {flags.block_size} tokens: no validation loss")
            continue
        bound = "<= " if result["val_is_bound"] else ""
        cells = (result["val_loss"], result["val_ppl"], result["val_bits_per_byte"])
        table.add_row(NAMES[kind], *(f"{bound}{cell:.3f}" for cell in cells))
    write_json(out / "summary.json", {"elapsed_s": round(elapsed_s, 1), "models": results, "samples": samples})
    console.print()
    console.print(table)
    console.print("<= marks an upper bound: an MDM's likelihood is not known exactly.\n")
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


# --- stages -----------------------------------------------------------------------------------------------------------


def _stage(
    out: Path, name: str, settings: dict[str, Any], console: Console, title: str
) -> tuple[Stage, dict[str, Any] | None]:
    """Announce a stage; also its result if an earlier run has finished it."""
    from lit_gpt.pipeline import Stage

    stage = Stage(out / name, dict(settings))
    done = stage.begin()
    console.print(title if done is None else f"{title}: done before", style="bold")
    return stage, done


def _script(script: str, *arguments: object, console: Console | None = None, watch: Any = None) -> None:
    """Run one of our scripts and show what it prints."""
    from lit_gpt.pipeline import run_script

    def show(line: str) -> None:
        if console is not None and not line.startswith(("error: ", "train with: ")):
            console.print(f"  {line}", markup=False, soft_wrap=True)

    run_script([str(ROOT / script), *map(str, arguments)], watch or show)


if __name__ == "__main__":
    run(main)
