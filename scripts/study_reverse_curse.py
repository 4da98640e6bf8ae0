r"""The reversal curse in a quarter of an hour: does a model that read "name is description" know who the description is?

    python scripts/study_reverse_curse.py                                   10 minutes on two CPU cores with bf16
    python scripts/study_reverse_curse.py --people 60 --arm_steps 50 --mdm_steps 50 --out quick       a short look

Invents people; of all of them it writes down "name is description" in some phrasings, of one half also "description is
name". Trains a small ARM and a small MDM on that from scratch, by sft/finetune_mdm_reverse.py, and asks both about both
halves in both directions, by evaluate_reverse.py. The half that was read in one order and is asked in the other shows the
curse. Writes reverse_curse.md and .png to docs/results, or of a short look to --out, where everything else lies. What is
finished is not done again; after Ctrl-C the same command goes on.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import below_least, parse, run

if TYPE_CHECKING:
    from rich.console import Console

    from lit_gpt.pipeline import Pipeline, Stage

PAGE = "reverse_curse.md"
KINDS = ("arm", "mdm")
# Where the answers to a question lie: of whom, and in which direction, as evaluate_reverse.py names them.
QUESTIONS = {
    ("one order", "name to description"): ("ntd", "same"),
    ("one order", "description to name"): ("dtn", "reverse"),
    ("both orders", "name to description"): ("ntd", "reverse"),
    ("both orders", "description to name"): ("dtn", "same"),
}
CURSE = ("one order", "description to name")
_VOCABULARY = 1000
"""Pieces of the tokenizer: enough for whole words of what is invented."""
_REPORT = """# The reversal curse, in a quarter of an hour

Written by {written}; training: {minutes}.

Of all {people} invented people it is read who they are, name first, in these phrasings: {forward}.
Of {seen} of them it is also read the other way round: {backward}.
Both models have the same shape and start from random weights. The ARM learns to predict the next token of a text, the MDM
every masked token at every masking rate. Then both complete the first phrasing of either direction, taking the likeliest
tokens; an answer is right if the true one occurs in it.

{table}

In brackets: 95 % confidence intervals (Wilson). The first row of those that were read in one order is what was trained,
the second one is the curse: an ARM that knows "NAME is the DESCRIPTION" does not know who the DESCRIPTION is, although
it has learnt to answer that question about other people.

![Right answers by optimizer step](reverse_curse.png)

## The commands

```
{commands}
```
"""


@dataclass
class Flags:
    """Flags of the study."""

    people: int = 600
    """How many are invented; of every second one both orders are read."""
    arm_steps: int = 500
    """Optimizer steps of the ARM."""
    mdm_steps: int = 14000
    """Optimizer steps of the MDM, which learns from fewer tokens of a text at a time."""
    batch_size: int = 128
    """Texts of a step."""
    learning_rate: float = 2e-3
    """Peak, of both models."""
    n_layer: int = 2
    """Blocks."""
    n_embd: int = 128
    """Width."""
    checkpoints: int = 5
    """How often each model is asked, the end included."""
    sampling_steps: int = 16
    """Denoising steps of an answer."""
    seed: int = 1234
    """Decides people, weights, data order and noise."""
    out: str = "workdir/study_reverse_curse"
    """Folder for everything that is made on the way."""
    docs: str | None = None
    """Folder for the report and its picture; by default docs/results, or --out where a flag makes it another study."""


def main() -> None:
    """Every stage in turn, then the report."""
    flags = parse(Flags, None, __doc__)
    low = {"people": 20, "arm_steps": 1, "mdm_steps": 1, "batch_size": 1, "checkpoints": 1, "sampling_steps": 1}
    problems = below_least(flags, low)
    if problems:
        raise ValueError("; ".join(problems))
    from lit_gpt.studies.study_pages import report_folder

    docs = report_folder(flags, PAGE)

    from rich.console import Console

    from lit_gpt.pipeline import Pipeline

    console = Console(highlight=False)
    # Progress bars are for terminals.
    pipeline = Pipeline(Path(flags.out), console, lambda line: bool(line.strip()) and "%|" not in line)
    facts = make_facts(flags, pipeline)
    start = make_start(flags, pipeline, facts)
    results = {kind: train_and_ask(kind, flags, pipeline, facts, start) for kind in KINDS}
    write_report(flags, docs, results, console)


# --- the stages -------------------------------------------------------------------------------------------------------


def make_facts(flags: Flags, pipeline: Pipeline) -> Stage:
    """Invent people, and write what is read about them and what is asked."""
    from lit_gpt.evaluation.invented_people import asked_facts, invent_people, training_facts

    stage = pipeline.begin("facts", "1/4 invent people", {"people": flags.people, "seed": flags.seed})
    if stage.result is not None:
        return stage
    people = invent_people(flags.people, random.Random(flags.seed))
    facts = training_facts(people)
    for name, lines in {"all_prompts_train.jsonl": facts, **asked_facts(people)}.items():
        (stage.folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    texts = [fact["prompt"] + fact["completion"] for fact in facts]
    (stage.folder / "texts.txt").write_text("\n".join(texts))
    pipeline.console.print(f"  {len(texts):,} texts; the first: {texts[0]}", soft_wrap=True)
    stage.finish({})
    return stage


def make_start(flags: Flags, pipeline: Pipeline, facts: Stage) -> Stage:
    """A tokenizer of whole words, and both models with random weights; the result has the longest text's `length`."""
    settings = {**facts.settings, "n_layer": flags.n_layer, "n_embd": flags.n_embd}
    stage = pipeline.begin("start", "2/4 a tokenizer and random weights", settings)
    if stage.result is not None:
        return stage
    texts = facts.folder / "texts.txt"
    command = ["scripts/train_tokenizer.py", "--source_path", texts, "--destination_path", stage.folder]
    pipeline.run([*command, "--document", "line", "--vocab_size", _VOCABULARY])

    from lit_gpt.checkpoints.export import WeightsRecord, export_weights
    from lit_gpt.config import Config
    from lit_gpt.model.bidirectional import TransEncoder
    from lit_gpt.model.causal import GPT
    from lit_gpt.tokenizer import Tokenizer

    tokenizer = Tokenizer(stage.folder)
    # bos and eos around each.
    length = 2 + max(len(tokenizer.encode_ids(line)) for line in texts.read_text(encoding="utf-8").split("\n"))
    width = flags.n_embd
    config = Config("study", flags.n_layer, 4, width, 3 * width, 4, block_size=length, vocab_size=tokenizer.vocab_size)
    for model_class in (GPT, TransEncoder):
        model = model_class(config)
        model.init_weights(flags.seed)
        record = WeightsRecord(model.kind, config)
        export_weights(stage.folder, model.kind, model.state_dict(), record, tokenizer=tokenizer)
    pipeline.console.print(f"  texts of up to {length} tokens")
    stage.finish({"length": length})
    return stage


def train_and_ask(kind: str, flags: Flags, pipeline: Pipeline, facts: Stage, start: Stage) -> dict[str, Any]:
    """Train one model, and ask it at every checkpoint.

    Returns:
        `curve`: per checkpoint `step` and `accuracy`, the shares of right answers in the order of QUESTIONS, and, at the
        last one, `minutes` of training; `commands`: the training and the last questions as a user types them.
    """
    from lit_gpt.studies.study_pages import typed

    steps = flags.arm_steps if kind == "arm" else flags.mdm_steps
    names = ("batch_size", "learning_rate", "checkpoints", "sampling_steps")
    settings = {**start.settings, **{name: getattr(flags, name) for name in names}, "steps": steps}
    stage = pipeline.begin(kind, f"{3 + KINDS.index(kind)}/4 train the {kind.upper()} and ask it", settings)
    train = training_command(flags, steps, start.folder / f"{kind}.safetensors", facts.folder, stage.folder)
    if stage.result is not None:
        return {"curve": stage.result["curve"], "commands": [typed(train), *stage.result["commands"]]}
    assert start.result is not None
    started = time.monotonic()
    pipeline.run(train)
    minutes = (time.monotonic() - started) / 60
    curve: list[dict[str, Any]] = []
    for checkpoint in sorted(stage.folder.glob("*/iter-*-ckpt.pth")):
        asked: dict[str, list[Any]] = {}
        for qs_type in ("ntd", "dtn"):
            asked[qs_type] = ["evaluate_reverse.py", "--qs_type", qs_type, "--ckpt-path", checkpoint]
            asked[qs_type] += ["--length", start.result["length"], "--data_dir", facts.folder]
            asked[qs_type] += ["--output", checkpoint.with_name(f"{checkpoint.stem}-{qs_type}.jsonl")]
            asked[qs_type] += ["--cfg", 0, "--steps", flags.sampling_steps] if kind == "mdm" else []
        accuracies = {qs_type: read_accuracies(pipeline.run(command)) for qs_type, command in asked.items()}
        shares = [accuracies[qs_type][direction] for qs_type, direction in QUESTIONS.values()]
        curve.append({"step": json.loads(checkpoint.with_suffix(".json").read_text())["step"], "accuracy": shares})
    curve[-1]["minutes"] = minutes
    commands = [typed(command) for command in asked.values()]
    stage.finish({"curve": curve, "commands": commands})
    return {"curve": curve, "commands": [typed(train), *commands]}


def training_command(flags: Flags, steps: int, weights: Path, facts: Path, folder: Path) -> list[Any]:
    """The fine-tuning script and its arguments."""
    interval = max(1, -(-steps // flags.checkpoints))
    return [
        *("sft/finetune_mdm_reverse.py", "--pretrain_path", weights),
        *("--data_file", facts / "all_prompts_train.jsonl", "--max_steps", steps, "--bs", flags.batch_size),
        *("--learning_rate", flags.learning_rate, "--min_lr", f"{flags.learning_rate / 10:g}", "--seed", flags.seed),
        *("--save_interval", interval, "--keep_checkpoints", 0, "--log_interval", interval),
        *("--out_dir", folder, "--log_dir", folder / "log", "--models_dir", folder / "model"),
    ]


# --- the report -------------------------------------------------------------------------------------------------------


def read_accuracies(lines: list[str]) -> dict[str, float]:
    """The shares of right answers in the last line of evaluate_reverse.py, in the same direction and in reverse."""
    found = re.search(r"accs: ([\d.e-]+), accs_reverse: ([\d.e-]+)", lines[-1])
    assert found is not None, lines
    return {"same": float(found[1]), "reverse": float(found[2])}


def write_report(flags: Flags, folder: Path, results: dict[str, dict[str, Any]], console: Console) -> None:
    """A table, a picture and the commands, for people, in a folder."""
    from lit_gpt.evaluation.generated_answers import wilson_interval
    from lit_gpt.evaluation.invented_people import DESCRIPTION_FIRST, NAME_FIRST
    from lit_gpt.files import make_folder
    from lit_gpt.studies.study_pages import written_by
    from lit_gpt.ui.plots import plot_accuracies

    curves = {kind: result["curve"] for kind, result in results.items()}
    make_folder(folder)
    panels = {
        f"{kind.upper()}, {curves[kind][-1]['step']:,} steps": {
            f"{people}: {direction}": [(one["step"], one["accuracy"][number]) for one in curves[kind]]
            for number, (people, direction) in enumerate(QUESTIONS)
        }
        for kind in KINDS
    }
    picture = folder / "reverse_curse.png"
    plot_accuracies(panels, "Who was described? Right answers by optimizer step", picture)
    asked = (flags.people + 1) // 2, flags.people // 2
    rows = ["| read in | asked for | ARM | MDM |", "| --- | --- | --- | --- |"]
    for number, (people, direction) in enumerate(QUESTIONS):
        cells = []
        for kind in KINDS:
            share, count = curves[kind][-1]["accuracy"][number], asked[people == "both orders"]
            low, high = wilson_interval(round(share * count), count)
            cells.append(f"{share:.1%} ({low:.1%} to {high:.1%})")
        name = "**" if (people, direction) == CURSE else ""
        rows.append(f"| {name}{people}{name} | {name}{direction}{name} | {' | '.join(cells)} |")
    minutes = ", ".join(f"{kind.upper()} {curves[kind][-1]['minutes']:.1f} minutes" for kind in KINDS)
    text = _REPORT.format(
        written=written_by("scripts/study_reverse_curse.py", flags),
        people=flags.people,
        seen=asked[1],
        minutes=minutes,
        table="\n".join(rows),
        commands="\n".join(command for kind in KINDS for command in results[kind]["commands"]),
        forward="; ".join(f'"{form} ..."' for form in NAME_FIRST).format(name="NAME"),
        backward="; ".join(f'"{form} ..."' for form in DESCRIPTION_FIRST).format(description="the DESCRIPTION"),
    )
    (folder / PAGE).write_text(text, encoding="utf-8")
    console.print("\n" + "\n".join(rows), markup=False, soft_wrap=True)
    console.print(f"\nreport: {folder / PAGE}, picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
