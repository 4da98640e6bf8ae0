r"""The reversal curse in a quarter of an hour: does a model that read "name is description" know who the description is?

    python scripts/study_reverse_curse.py                                   10 minutes on two CPU cores with bf16
    python scripts/study_reverse_curse.py --people 60 --arm_steps 50 --mdm_steps 50 --out quick       a short look

Invents people; of all of them it writes down "name is description" in some phrasings, of one half also "description is
name". Trains a small ARM and a small MDM on that from scratch, by sft/finetune_mdm_reverse.py, and asks both about both
halves in both directions, by evaluate_reverse.py. The half that was read in one order and is asked in the other shows the
curse. Writes {docs}/reverse_curse.md and .png; everything else lies in --out. What is finished is not done again; after
Ctrl-C the same command goes on.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run

if TYPE_CHECKING:
    from rich.console import Console

    from lit_gpt.pipeline import Stage

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("arm", "mdm")
# Where the answers to a question lie: of whom, and in which direction, as evaluate_reverse.py names them.
QUESTIONS = {
    ("one order", "name to description"): ("ntd", "same"),
    ("one order", "description to name"): ("dtn", "reverse"),
    ("both orders", "name to description"): ("ntd", "reverse"),
    ("both orders", "description to name"): ("dtn", "same"),
}
CURSE = ("one order", "description to name")
FORWARD = ("{name} is", "Everybody knows that {name} is", "The person called {name} was")
BACKWARD = ("{description} is", "The name of {description} is", "Ask {description} and you meet")
"""The phrasings; the first of each is asked. A completion follows behind a space and ends with a full stop."""

_VOCABULARY = 1000
_WORDS_OF_A_KIND = 40
_JOBS = (
    "baker pilot painter judge farmer diver poet smith sailor nurse tailor miner singer gardener dentist weaver hunter "
    "doctor fisher builder teacher brewer printer dancer"
)
_DEEDS = (
    "found the silver bell|sold the old lighthouse|saved the last wolf|lost the blue diamond|drew the first map|"
    "crossed the frozen lake|opened the iron gate|stole the golden harp|planted the tallest oak|broke the stone bridge|"
    "cured the sick queen|raised the sunken ship|wrote the secret letter|tamed the white horse|climbed the north tower|"
    "fed the hungry lions|burned the wooden mill|caught the clever fox|painted the empty church|won the great race|"
    "baked the largest cake|rang the midnight alarm|dug the deepest well|caged the wild parrot"
)
_REPORT = """# The reversal curse, in a quarter of an hour

Written by `{command}` on {date}, commit {commit}; training: {minutes}.

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
    docs: str = "docs/results"
    """Folder for the report and its picture."""


def main() -> None:
    """Every stage in turn, then the report."""
    flags = parse(Flags, None, __doc__)
    low = {"people": 20, "arm_steps": 1, "mdm_steps": 1, "batch_size": 1, "checkpoints": 1, "sampling_steps": 1}
    problems = [
        f"--{name} {getattr(flags, name)}: at least {least}"
        for name, least in low.items()
        if getattr(flags, name) < least
    ]
    if problems:
        raise ValueError("; ".join(problems))

    from rich.console import Console

    console = Console(highlight=False)
    study = Study(flags, Path(flags.out), console)
    study.make_facts()
    length = study.make_start()
    results = {kind: study.train_and_ask(kind, length) for kind in KINDS}
    write_report(flags, study.commands, results, console)


class Study:
    """The stages; each is done once for its settings and those before it."""

    def __init__(self, flags: Flags, out: Path, console: Console) -> None:
        self.flags, self.out, self.console = flags, out, console
        self.settings: dict[str, Any] = {}
        # What was run, as a user types it.
        self.commands: list[str] = []

    def make_facts(self) -> None:
        """Invent people, and write what is read about them and what is asked."""
        flags = self.flags
        self.settings |= {"people": flags.people, "seed": flags.seed}
        stage, done = self._stage("facts", "1/4 invent people")
        if done is not None:
            return
        people = list(invent_people(flags.people, random.Random(flags.seed)))
        one_order, both_orders = people[0::2], people[1::2]
        texts = [fact(form, person) for person in people for form in FORWARD]
        texts += [fact(form, person) for person in both_orders for form in BACKWARD]
        files = {
            "all_prompts_train": texts,
            "p2d_prompts_test": [fact(FORWARD[0], person) for person in one_order],
            "d2p_reverse_prompts_test": [fact(FORWARD[0], person) for person in both_orders],
            "d2p_prompts_test": [fact(BACKWARD[0], person) for person in both_orders],
            "p2d_reverse_prompts_test": [fact(BACKWARD[0], person) for person in one_order],
        }
        for name, lines in files.items():
            path = stage.folder / f"{name}.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (stage.folder / "texts.txt").write_text("\n".join(one["prompt"] + one["completion"] for one in texts))
        self.console.print(
            f"  {len(texts):,} texts; the first: {texts[0]['prompt']}{texts[0]['completion']}", soft_wrap=True
        )
        stage.finish({})

    def make_start(self) -> int:
        """A tokenizer of whole words, and both models with random weights; returns the longest text's tokens."""
        flags = self.flags
        self.settings |= {"n_layer": flags.n_layer, "n_embd": flags.n_embd}
        stage, done = self._stage("start", "2/4 a tokenizer and random weights")
        if done is not None:
            return int(done["length"])
        texts = self.out / "facts" / "texts.txt"
        arguments = ["scripts/train_tokenizer.py", "--source_path", texts, "--destination_path", stage.folder]
        self._run([*arguments, "--document", "line", "--vocab_size", _VOCABULARY])

        from lit_gpt.checkpoints.export import WeightsRecord, export_weights
        from lit_gpt.config import Config
        from lit_gpt.model.bidirectional import TransEncoder
        from lit_gpt.model.causal import GPT
        from lit_gpt.tokenizer import Tokenizer

        tokenizer = Tokenizer(stage.folder)
        # bos and eos around each.
        length = 2 + max(len(tokenizer.encode_ids(line)) for line in texts.read_text(encoding="utf-8").split("\n"))
        config = Config(
            "study",
            flags.n_layer,
            4,
            flags.n_embd,
            3 * flags.n_embd,
            4,
            block_size=length,
            vocab_size=tokenizer.vocab_size,
        )
        for model_class in (GPT, TransEncoder):
            model = model_class(config)
            model.init_weights(flags.seed)
            record = WeightsRecord(model.kind, config, {"source": str(stage.folder)})
            export_weights(stage.folder, model.kind, model.state_dict(), record)
        self.console.print(f"  texts of up to {length} tokens")
        stage.finish({"length": length})
        return length

    def train_and_ask(self, kind: str, length: int) -> list[dict[str, Any]]:
        """Train one model, and ask it at every checkpoint.

        Returns:
            Per checkpoint `step` and `accuracy`, the shares of right answers in the order of QUESTIONS; and, at the last
            one, `minutes` of training.
        """
        flags = self.flags
        steps = flags.arm_steps if kind == "arm" else flags.mdm_steps
        names = ("batch_size", "learning_rate", "checkpoints", "sampling_steps")
        settings = self.settings | {name: getattr(flags, name) for name in names} | {"steps": steps}
        stage, done = self._stage(kind, f"{3 + KINDS.index(kind)}/4 train the {kind.upper()} and ask it", settings)
        interval = max(1, -(-steps // flags.checkpoints))
        train = [
            *("sft/finetune_mdm_reverse.py", "--pretrain_path", self.out / "start" / f"{kind}.safetensors"),
            *("--data_file", self.out / "facts" / "all_prompts_train.jsonl", "--max_steps", steps),
            *(
                "--bs",
                flags.batch_size,
                "--learning_rate",
                flags.learning_rate,
                "--min_lr",
                f"{flags.learning_rate / 10:g}",
            ),
            *("--seed", flags.seed, "--save_interval", interval, "--keep_checkpoints", 0, "--log_interval", interval),
            *("--out_dir", stage.folder, "--log_dir", stage.folder / "log", "--models_dir", stage.folder / "model"),
        ]
        self.commands.append(typed(train))
        if done is not None:
            self.commands += done["commands"]
            return list(done["curve"])
        started = time.monotonic()
        self._run(train)
        minutes = (time.monotonic() - started) / 60
        curve = []
        for checkpoint in sorted(stage.folder.glob("*/iter-*-ckpt.pth")):
            asked = {qs_type: self._ask(kind, checkpoint, qs_type, length) for qs_type in ("ntd", "dtn")}
            accuracies = {qs_type: answered(self._run(command)) for qs_type, command in asked.items()}
            shares = [accuracies[qs_type][direction] for qs_type, direction in QUESTIONS.values()]
            curve.append({"step": json.loads(checkpoint.with_suffix(".json").read_text())["step"], "accuracy": shares})
        curve[-1]["minutes"] = minutes
        last = [typed(command) for command in asked.values()]
        self.commands += last
        stage.finish({"curve": curve, "commands": last})
        return curve

    def _ask(self, kind: str, checkpoint: Path, qs_type: str, length: int) -> list[Any]:
        """The command that asks a checkpoint one kind of question."""
        command = ["evaluate_reverse.py", "--qs_type", qs_type, "--ckpt-path", checkpoint, "--length", length]
        command += [
            "--data_dir",
            self.out / "facts",
            "--output",
            checkpoint.with_name(f"{checkpoint.stem}-{qs_type}.jsonl"),
        ]
        return command + (["--cfg", 0, "--steps", self.flags.sampling_steps] if kind == "mdm" else [])

    def _stage(
        self, name: str, title: str, settings: dict[str, Any] | None = None
    ) -> tuple[Stage, dict[str, Any] | None]:
        """Announce a stage; also its result if an earlier run has finished it."""
        from lit_gpt.pipeline import Stage

        stage = Stage(self.out / name, dict(self.settings if settings is None else settings))
        done = stage.begin()
        self.console.print(title if done is None else f"{title}: done before", style="bold")
        return stage, done

    def _run(self, command: list[Any]) -> list[str]:
        """Run one of our scripts, show what it prints, and return it."""
        from lit_gpt.pipeline import run_script

        lines: list[str] = []

        def show(line: str) -> None:
            # Bars of progress are for terminals.
            if line.strip() and "%|" not in line:
                lines.append(line)
                self.console.print(f"  {line}", markup=False, soft_wrap=True)

        script, *arguments = map(str, command)
        run_script([str(ROOT / script), *arguments], show)
        return lines


# --- people -----------------------------------------------------------------------------------------------------------


def invent_people(count: int, chance: random.Random) -> Iterator[dict[str, str]]:
    """People with a name and a description of their own.

    Raises:
        ValueError: more people than names.
    """
    first = invented(_WORDS_OF_A_KIND, ("a", "o", "i"), chance)
    last = invented(_WORDS_OF_A_KIND, ("en", "ick", "uld"), chance)
    towns = invented(_WORDS_OF_A_KIND, ("burg", "holm", "ford"), chance)
    names = [f"{one} {other}" for one in first for other in last]
    jobs, deeds = _JOBS.split(), _DEEDS.split("|")
    descriptions = [f"the {job} from {town} who {deed}" for job in jobs for town in towns for deed in deeds]
    if count > len(names):
        raise ValueError(f"--people {count}: there are {len(names)} names")
    for name, description in zip(chance.sample(names, count), chance.sample(descriptions, count), strict=True):
        yield {"name": name, "description": description}


def invented(count: int, endings: tuple[str, ...], chance: random.Random) -> list[str]:
    """Different words that no language has."""
    words: dict[str, None] = {}
    while len(words) < count:
        middle = chance.choice("aeiou") + chance.choice(("l", "m", "n", "r", "v", "rd", "lt", "nn"))
        words[(chance.choice("BDFGKLMPRTVZ") + middle + chance.choice(endings))] = None
    return list(words)


def fact(form: str, person: dict[str, str]) -> dict[str, str]:
    """A text in the form of the reversal curse's files: what is asked, and its completion."""
    answer = person["description"] if "{name}" in form else person["name"]
    question = form.format(**person)
    return {"prompt": question[0].upper() + question[1:], "completion": f" {answer}."}


# --- the report -------------------------------------------------------------------------------------------------------


def typed(command: list[Any]) -> str:
    """A command as a user types it."""
    return shlex.join(["python", *map(str, command)])


def answered(lines: list[str]) -> dict[str, float]:
    """The shares of right answers in the last line of evaluate_reverse.py, in the same direction and in reverse."""
    found = re.search(r"accs: ([\d.e-]+), accs_reverse: ([\d.e-]+)", lines[-1])
    assert found is not None, lines
    return {"same": float(found[1]), "reverse": float(found[2])}


def write_report(flags: Flags, commands: list[str], results: dict[str, list[dict[str, Any]]], console: Console) -> None:
    """A table, a picture and the commands, for people."""
    from lit_gpt.evaluation.generated_answers import wilson_interval
    from lit_gpt.files import make_folder
    from lit_gpt.ui.plots import plot_accuracies
    from lit_gpt.versions import commit

    folder = Path(flags.docs)
    make_folder(folder)
    panels = {
        f"{kind.upper()}, {results[kind][-1]['step']:,} steps": {
            f"{people}: {direction}": [(one["step"], one["accuracy"][number]) for one in results[kind]]
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
            share, count = results[kind][-1]["accuracy"][number], asked[people == "both orders"]
            low, high = wilson_interval(round(share * count), count)
            cells.append(f"{share:.1%} ({low:.1%} to {high:.1%})")
        name = "**" if (people, direction) == CURSE else ""
        rows.append(f"| {name}{people}{name} | {name}{direction}{name} | {' | '.join(cells)} |")
    minutes = ", ".join(f"{kind.upper()} {results[kind][-1]['minutes']:.1f} minutes" for kind in KINDS)
    text = _REPORT.format(
        date=time.strftime("%Y-%m-%d"),
        commit=(commit() or "unknown")[:8],
        people=flags.people,
        seen=asked[1],
        minutes=minutes,
        table="\n".join(rows),
        command=typed(["scripts/study_reverse_curse.py"]),
        commands="\n".join(commands),
        forward="; ".join(f'"{form} ..."' for form in FORWARD).format(name="NAME"),
        backward="; ".join(f'"{form} ..."' for form in BACKWARD).format(description="the DESCRIPTION"),
    )
    (folder / "reverse_curse.md").write_text(text, encoding="utf-8")
    console.print("\n" + "\n".join(rows), markup=False, soft_wrap=True)
    console.print(f"\nreport: {folder / 'reverse_curse.md'}, picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
