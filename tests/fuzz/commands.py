"""Command lines and configuration files of every script, damaged, and run in the process that reads them.

A command is the script's real `main` within `cli.run`, on tiny models and data in a folder of its own. It ends early, as
accepted, where long work would begin: at a second training step, a validation of many draws, several processes, a
pipeline's first script, the page's server. What it prints is captured: one line `error: ...` and code 2 are a refusal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import pkgutil
import random
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

import lit_gpt
from lit_gpt import cli, pipeline
from lit_gpt.data.packed_format import PackedDatasetBuilder
from lit_gpt.training import loop
from tests.fuzz import readers
from tests.fuzz.mutations import mutate_bytes, mutate_value
from tests.fuzz.readers import ROOT, FileKind, require
from tests.support.small_models import export_arm_and_mdm

_TRAIN = "--max_steps 1 --batch_size 2 --val_samples 2 --val_draws 2 --out_dir runs --models_dir models --log_dir log"
_SHAPE = "--model 6 --n_layer 1 --n_embd 16 --n_head 2 --n_query_groups 2 --block_size 32 --intermediate_size 32"
_TUNE = "--pretrain_path mdm/tiny.safetensors --bs 2 --workers 1 --cache_dir prepared"
_ASK = "--ckpt_path mdm/tiny.safetensors --steps 4 --batch_size 2 --device cpu"

# Each script with a command line that works, on the files of `make_workplace`.
COMMANDS = {
    "pretrain/train_ar.py": f"{_SHAPE} {_TRAIN} --data_dir packed",
    "pretrain/train_mdm.py": f"{_SHAPE} {_TRAIN} --data_dir packed --skip_steps 7-9 --seed 3 --logger [csv,tensorboard]",
    "pretrain/train_mdm_rl.py": f"{_SHAPE} {_TRAIN} --data_dir packed --ssl_ratio 0.5 --data_weights {{'train_slim':1}}",
    "sft/finetune_ar.py": f"{_TRAIN} {_TUNE} --data_file lines/sharegpt.json".replace("mdm/", "arm/"),
    "sft/finetune_mdm.py": f"{_TRAIN} {_TUNE} --data_file lines/sharegpt.json --cfg 0.1",
    "sft/finetune_mdm_gsm8k.py": f"{_TRAIN} {_TUNE} --data_file lines/gsm8k.txt",
    "sft/finetune_mdm_reverse.py": f"{_TRAIN} {_TUNE} --data_file lines/reverse.jsonl --epoch 1",
    "evaluate_gsm8k.py": f"{_ASK} --data lines/short.jsonl --length 100 --limit 2 --output a.jsonl --cfg1 0.1",
    "evaluate_reverse.py": f"{_ASK} --data_dir june --qs_type ntd --limit 1 --length 60 --output r.jsonl --cfg 0.5",
    "evaluate_fineweb.py": (
        "--ckpt_path mdm/tiny.safetensors --data_dir . --fineweb packed --mc_samples 4 --rows 2 --length 32 --batch_size 4 "
        "--type mdm --cache off --estimator mc"
    ),
    "scripts/chat.py": "--ckpt_path mdm/tiny.safetensors --prompt My_lord --context_length 16 --steps 4 --save a.jsonl",
    "scripts/info.py": "mdm/tiny.safetensors --json",
    "scripts/web.py": "--models mdm arm --port 0",
    "scripts/plan_run.py": "--model 1028 --flops 1600 --gpus 16 --gpu h100 --price_per_gpu_hour 2",
    "scripts/prepare_text.py": (
        "--source_path text.txt lines/texts.jsonl --tokenizer_path tokenizer --destination_path made --prefix train_slim "
        "--chunk_size 64 --num_workers 1 --validation_fraction 0.3"
    ),
    "scripts/prepare_fineweb.py": (
        "--source texts --crawl CC-A --destination crawls --tokenizer tokenizer --tokens 3 --documents 5 --chunk_size 2048"
    ),
    "scripts/train_tokenizer.py": "--source_path text.txt --destination_path trained --vocab_size 340 --document line",
    "scripts/make_next_line.py": "--text plays.txt --out q.jsonl --questions 3 --seed 2",
    "scripts/quickstart.py": "--out quick --text text.txt --steps 2",
    "scripts/study_reverse_curse.py": "--out study --docs study --people 20 --arm_steps 2 --mdm_steps 2",
    "eval/gen_model_answer.py": (
        "--model_id x --model_type mdm --model_path mdm/tiny.safetensors --answer_file x.jsonl --question_end 1 --steps 2 "
        "--max_new_token 64 --device cpu"
    ),
    "eval/gen_judgment.py": "--mode single --judge_model gpt-4 --first_n 1 --dry_run --model_list m --turns first",
    "eval/show_result.py": "--mode single --judge_model gpt-4 --radar off --model_list m",
}
# What people type, or a program writes, where a value should stand.
WILD_WORDS = (
    "",
    " ",
    "0",
    "-1",
    "1",
    "2",
    "3",
    "7",
    "1.5",
    "-0.0",
    "1e-9",
    "1e400",
    "1e300",
    "nan",
    "-inf",
    "2147483648",
    "4294967295",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "1180591620717411303424",
    "9" * 5000,
    "0x10",
    "1_000",
    "\u0663",
    "\u00b2",
    "1,2",
    "1e3",
    "true",
    "false",
    "None",
    "null",
    "~",
    "auto",
    "on",
    "off",
    "cpu",
    "cuda",
    "cuda:99",
    "cpu:1",
    "meta",
    "mps",
    "[]",
    "[1]",
    "[a, b]",
    "{}",
    "{a: 1}",
    "{a: -1}",
    "{train_slim: 1e300}",
    "[[",
    "&a [*a]",
    "2020-01-01",
    "!!python/name:os.system",
    "x" * 3000,
    "a/" * 200,
    "\u00fc\u4e2d\U0001f600",
    "\udcff",
    "\n",
    "a\nb",
    "\x1b[31m",
    "%s",
    "{0}",
    "*",
    "?",
    "-",
    "--",
    "=",
    "../none",
    "none/none",
    ".",
    "text.txt",
    "text.txt/x",
    "packed",
    "run",
    "mdm",
    "tokenizer",
    "mdm/tiny.safetensors",
    "arm/tiny.safetensors",
    "run/iter-000004-ckpt.pth",
    "lines/reverse.jsonl",
    "lines/gsm8k.txt",
    "packed/train_slim_0000000000.bin",
    "pipe",
    "pipe.jsonl",
    "zero",
    "zero.jsonl",
    "zero.txt",
    "full.jsonl",
    "loop",
    "locked",
    "arm",
    "mdl",
    "exact",
    "mc",
    "greddy",
    "threshold",
    "entropy",
    "origin",
    "prefix",
    "dual",
    "fsdp",
    "hybrid",
    "ddp",
    "bf16-true",
    "never",
    "refuse",
    "overwrite",
    "pairwise-all",
    "pairwise-baseline",
    "wandb",
    "tensorboard",
    "dtn",
    "line",
    "5-3",
    "1-9",
)


class Enough(BaseException):
    """The command has passed all checks; what follows is long work."""


def make_workplace(folder: Path) -> None:
    """The files that the commands name."""
    export_arm_and_mdm(folder, block_size=128)
    for name in ("packed", "run", "lines", "june", "texts"):
        (folder / name).mkdir()
    for prefix in ("train_slim", "validation"):
        builder = PackedDatasetBuilder(folder / "packed", prefix, 33 * 8, 1, vocab_size=500)
        builder.add_array(np.arange(33 * 16) % 400 + 3)
        builder.write_reminder()
    readers.make_checkpoint(folder / "run")
    readers.make_lines(folder / "lines")
    (folder / "lines" / "short.jsonl").write_text('{"question": "1 + 1?", "target": "2"}\n' * 2)
    plays = (ROOT / "data" / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    (folder / "plays.txt").write_text(plays[:120_000])
    (folder / "text.txt").write_text(plays[:20_000])
    shutil.copy(folder / "lines" / "texts.jsonl", folder / "texts" / "a.jsonl")
    for name in (
        "d2p_reverse_prompts_test.jsonl",
        "p2d_reverse_prompts_test.jsonl",
        "both_prompts_test.jsonl",
        "d2p_prompts_test.jsonl",
        "p2d_prompts_test.jsonl",
    ):
        shutil.copy(folder / "lines" / "reverse.jsonl", folder / "june" / name)
    bench = folder / "data" / "mt_bench"
    for part, source in (
        ("question.jsonl", "questions"),
        ("model_answer/m.jsonl", "answers"),
        ("reference_answer/gpt-4.jsonl", "answers"),
        ("model_judgment/gpt-4_single.jsonl", "judgments"),
        ("../judge_prompts.jsonl", "prompts"),
    ):
        (bench / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "lines" / f"{source}.jsonl", bench / part)


def make_commands(folder: Path) -> None:
    """`make_workplace`, and a command that is in order."""
    make_workplace(folder)
    name = "scripts/plan_run.py"
    (folder / "command.json").write_text(json.dumps([name, *COMMANDS[name].split()]))


def add_odd_files(folder: Path) -> None:
    """What only looks like a file; it cannot be copied."""
    for name in ("pipe", "pipe.jsonl"):
        os.mkfifo(folder / name)
    for name, target in (("zero", "zero"), ("zero.jsonl", "zero"), ("zero.txt", "zero"), ("full.jsonl", "full")):
        (folder / name).symlink_to(f"/dev/{target}")
    (folder / "loop").symlink_to("loop")


def load_scripts() -> None:
    """Import all scripts and what they import late, so that a forked child need not."""
    for name in COMMANDS:
        script(name)
    for module in pkgutil.walk_packages(lit_gpt.__path__, "lit_gpt."):
        importlib.import_module(module.name)
    for late in (
        "rich.progress",
        "datasets",
        "matplotlib.pyplot",
        "starlette.applications",
        "uvicorn",
        "lightning_fabric",
        "torch.utils.tensorboard",
        "yaml",
        "sentencepiece",
        "tokenizers",
        "nltk.translate.bleu_score",
        "scipy.sparse",
        "charset_normalizer",
        "datatrove.pipeline.readers",
    ):
        importlib.import_module(late)


@cache
def script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"fuzzed_{Path(name).stem}", ROOT / name)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def known_flags(name: str) -> dict[str, str]:
    """The flags of a script and their types: the fields of the dataclass that it hands to `parse`."""
    module = script(name)
    kinds = [value for value in vars(module).values() if isinstance(value, type) and dataclasses.is_dataclass(value)]
    # Its own, or else the one that is the largest.
    flags = max(kinds, key=lambda kind: (kind.__module__ == module.__name__, len(dataclasses.fields(kind))))
    return {field.name: str(field.type) for field in dataclasses.fields(flags)}


# --- damage -----------------------------------------------------------------------------------------------------------


def damage_command(folder: Path, chance: random.Random) -> None:
    """One to three damages to a script's command line."""
    name = chance.choice(sorted(COMMANDS))
    words = COMMANDS[name].split()
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        words = _damaged_words(words, known_flags(name), chance)
    write_command(folder, name, [word.replace("\x00", "") for word in words])


def damage_config(folder: Path, chance: random.Random) -> None:
    """A script's flags in a file, damaged as a document or as bytes."""
    name = chance.choice(sorted(name for name in COMMANDS if name != "scripts/info.py"))
    document = _as_document(COMMANDS[name].split())
    kind, flags = chance.randrange(5), known_flags(name)
    flag = chance.choice(sorted(flags))
    if kind == 0:
        wild = chance.choice(WILD_WORDS)
        content = f"{json.dumps(document)[1:-1].replace(', ', chr(10))}\n{flag}: {wild}\n".encode(
            "utf-8", "surrogateescape"
        )
    elif kind == 1:
        content = mutate_bytes("".join(f"{key}: {value}\n" for key, value in document.items()).encode(), chance)
    elif kind == 2:
        content = mutate_bytes(json.dumps(document).encode(), chance)
    else:
        document[flag] = _wild_value(flags[flag], chance)
        content = json.dumps(mutate_value(document, chance) if kind == 3 else document).encode()
    (folder / "flags.yaml").write_bytes(content)
    write_command(folder, name, ["--config", "flags.yaml"])


def write_command(folder: Path, name: str, words: list[str]) -> None:
    """What `run_command` finds."""
    add_odd_files(folder)
    (folder / "command.json").write_text(json.dumps([name, *words]))


def _damaged_words(words: list[str], flags: dict[str, str], chance: random.Random) -> list[str]:
    """A command line with another word, one more, one less, or one twice."""
    words, kind = list(words), chance.randrange(10)
    flag, wild = chance.choice(sorted(flags)), chance.choice(WILD_WORDS)
    if kind <= 5:
        return [*words, f"--{flag}", *([_wild_value(flags[flag], chance)] if chance.random() < 0.95 else [])]
    at = chance.randrange(len(words))
    if kind == 6:
        words[at] = wild
    elif kind == 7:
        del words[at]
    elif kind == 8:
        words[at] = mutate_bytes(words[at].encode("utf-8", "surrogateescape"), chance).decode(
            "utf-8", "surrogateescape"
        )
    else:
        odd = (f"--{flag}={wild}", wild, "--unknown", "-h", f"---{flag}", f"--{wild}")
        words[at:at] = chance.choice((["--config", wild], *([one] for one in odd)))
    return words


def _wild_value(kind: str, chance: random.Random) -> str:
    """A value for a flag, mostly one of its type."""
    if chance.random() < 0.8 and ("int" in kind or "float" in kind) and "dict" not in kind:
        return chance.choice(WILD_WORDS[2:32])
    return chance.choice(("true", "false")) if kind == "bool" else chance.choice(WILD_WORDS)


def _as_document(words: list[str]) -> dict[str, Any]:
    """A command line as a mapping of flags."""
    document: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, document[word[2:]] = word[2:], True
        else:
            document[name] = word if document[name] is True else f"[{document[name]}, {word}]"
    return document


# --- running ----------------------------------------------------------------------------------------------------------


def run_command(folder: Path) -> None:
    """Run the command of a folder in this process, to its end or to long work.

    Raises:
        ValueError: it was refused in one line, which is the text.
        AssertionError: it ended otherwise.
    """
    name, *words = json.loads((folder / "command.json").read_text())
    os.chdir(folder)
    os.environ.update(HOME=str(folder.resolve()), COLUMNS="100")
    sys.argv = [str(ROOT / name), *words]
    _stop_before_long_work()
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), contextlib.suppress(Enough):
        try:
            cli.run(script(name).main)
        except SystemExit as end:
            code = int(end.code or 0)
    if code:
        # The harness's own parser shows its usage before its line.
        starts = ("error: ", "lm-eval run: error: ")
        lines = [line for line in errors.getvalue().splitlines() if line.startswith(starts)]
        last = (errors.getvalue().splitlines() or [""])[-1]
        require(code == cli.USER_ERROR_CODE and lines == [last], f"code {code} with: {errors.getvalue()[-500:]}")
        raise ValueError(last if last.startswith("error: ") else last[:500])
    if name.startswith("evaluate_"):
        require(not re.search(r"\b(nan|inf)\b", output.getvalue()), output.getvalue()[-300:])


def _stop_before_long_work() -> None:
    """Let long work begin with `Enough`; this process is not used any further."""
    from lightning_fabric import Fabric

    from lit_gpt.ui import page_server

    launch, train_step, validate = Fabric.launch, loop._Trainer._train_step, loop._Trainer._validate
    announce = loop._Trainer._announce

    def launch_one(fabric: Any, *rest: Any) -> Any:
        return launch(fabric, *rest) if fabric.world_size == 1 else enough()

    def announce_small(trainer: Any) -> None:
        announce(trainer)
        if trainer.config.batch_size > 64:
            enough()

    def first_step(trainer: Any, step: int, batches: Any) -> None:
        return train_step(trainer, step, batches) if step == 0 else enough()

    def short_validation(trainer: Any, signals: Any) -> int:
        return validate(trainer, signals) if trainer.config.val_draws <= 64 else enough()

    loop._Trainer._train_step = first_step  # type: ignore[method-assign]
    loop._Trainer._validate = short_validation  # type: ignore[method-assign,assignment]
    loop._Trainer._announce = announce_small  # type: ignore[method-assign]
    Fabric.launch = launch_one  # type: ignore[method-assign]
    pipeline.Pipeline.run = enough  # type: ignore[method-assign,assignment]
    pipeline.run_script = enough
    page_server.serve = enough


def enough(*_: Any, **__: Any) -> NoReturn:
    """End the command as accepted."""
    raise Enough


COMMAND_KINDS = {
    "commands": FileKind(make_commands, damage_command, run_command, load_scripts),
    "configs": FileKind(make_commands, damage_config, run_command, load_scripts),
}
