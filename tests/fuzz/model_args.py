"""Command lines of lm-evaluation-harness with our models, above all `--model_args`, damaged.

The harness's own command line parses them and builds the model; instead of tasks, which take seconds to find, the model
then answers one request of each kind.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from tests.fuzz import commands
from tests.fuzz.commands import WILD_WORDS, enough, make_workplace, run_command, write_command
from tests.fuzz.mutations import mutate_bytes
from tests.fuzz.readers import FileKind, require

# More passes than these are long work.
_MOST_PASSES = 2000
_ARGUMENTS = {
    "evaluate_diff.py": {
        "ckpt_path": "mdm/tiny.safetensors",
        "nll_type": "mc",
        "mc_num": "4",
        "budget": "4",
        "cfg": "0.5",
        "greddy": "True",
        "padding": "False",
        "steps": "4",
        "alg": "greedy",
        "seed": "3",
        "max_length": "64",
        "temperature": "0.5",
    },
    "evaluate_ar.py": {"ckpt_path": "arm/tiny.safetensors", "seed": "3", "max_length": "64", "dtype": "float32"},
}
_NAMES = (
    "model_name",
    "tokenizer",
    "max_length",
    "batch_size",
    "device",
    "dtype",
    "seed",
    "temperature",
    "nll_type",
    "mc_num",
    "budget",
    "cfg",
    "greedy",
    "greddy",
    "padding",
    "mask_id",
    "steps",
    "alg",
    "ckpt_path",
    "pretrained",
    "",
    "self",
)
_FLAGS = (
    "batch_size",
    "device",
    "limit",
    "use_cache",
    "num_fewshot",
    "seed",
    "gen_kwargs",
    "max_batch_size",
    "samples",
    "metadata",
    "config",
    "verbosity",
    "model",
    "include_path",
    "output_path",
    "fewshot_as_multiturn",
)


def make_harness_command(folder: Path) -> None:
    """The workplace, and a command that is in order."""
    make_workplace(folder)
    (folder / "command.json").write_text(json.dumps(_words("evaluate_diff.py", _ARGUMENTS["evaluate_diff.py"])))


def _words(name: str, arguments: dict[str, str]) -> list[str]:
    """Script and flags."""
    text = ",".join(f"{key}={value}" for key, value in arguments.items())
    return [name, "--tasks", "lambada_local", "--use_cache", "off", "--model_args", text]


def damage_harness_command(folder: Path, chance: random.Random) -> None:
    """Other arguments of the model, another text of them, or other flags of the harness."""
    name = chance.choice(sorted(_ARGUMENTS))
    arguments = dict(_ARGUMENTS[name])
    kind = chance.randrange(8)
    if kind <= 4:
        arguments[chance.choice(_NAMES)] = chance.choice(WILD_WORDS)
        if chance.random() < 0.3:
            del arguments[chance.choice(sorted(arguments))]
    _, *words = _words(name, arguments)
    if kind == 5:
        words[-1] = mutate_bytes(words[-1].encode("utf-8", "surrogateescape"), chance).decode(
            "utf-8", "surrogateescape"
        )
    elif kind == 6:
        words[-1] = chance.choice((json.dumps(arguments), *WILD_WORDS))
    elif kind == 7:
        words += [f"--{chance.choice(_FLAGS)}", chance.choice(WILD_WORDS)]
    write_command(folder, name, [word.replace("\x00", "") for word in words])


def run_harness_command(folder: Path) -> None:
    """Run it; see `commands.run_command`."""
    _answer_two_requests()
    run_command(folder)


def load_harness() -> None:
    """Import what the harness needs."""
    commands.load_scripts()
    for name in _ARGUMENTS:
        commands.script(name)
    import lm_eval.__main__
    import lm_eval.evaluator  # noqa: F401


def _answer_two_requests() -> None:
    """Let the harness ask a model for one likelihood and one text, instead of whole tasks."""
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from lm_eval.config.evaluate_config import EvaluatorConfig

    def ask(model: str, model_args: Any, batch_size: Any, max_batch_size: Any, device: Any, **_: Any) -> None:
        if model not in ("ar", "mdlm"):
            enough()
        flags = {"batch_size": batch_size, "max_batch_size": max_batch_size, "device": device}
        asked: Any = get_model(model).create_from_arg_obj(model_args, flags)
        if max(asked.arguments.mc_num, asked.arguments.budget) > _MOST_PASSES:
            enough()
        likelihood = Instance("loglikelihood", {}, ("To be", " or not"), 0)
        ((value, greedy),) = asked.loglikelihood([likelihood], disable_tqdm=True)
        require(math.isfinite(value) and isinstance(greedy, bool), f"log-likelihood {value}")
        settings = {"until": ["\n"], "max_gen_toks": 6}
        (text,) = asked.generate_until([Instance("generate_until", {}, ("To be", settings), 0)], disable_tqdm=True)
        require(isinstance(text, str), f"generated {text}")

    EvaluatorConfig.process_tasks = lambda *_: None  # type: ignore[method-assign,assignment]
    lm_eval.simple_evaluate = ask  # type: ignore[assignment]
    lm_eval.evaluator.simple_evaluate = ask  # type: ignore[assignment]


MODEL_ARGS_KINDS = {
    "model_args": FileKind(make_harness_command, damage_harness_command, run_harness_command, load_harness),
}
