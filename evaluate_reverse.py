"""Whether a model answers in the direction in which it was not taught (the reversal curse), after sft/finetune_mdm_reverse.py.

    python evaluate_reverse.py --qs_type ntd --model 1028 --ckpt-path models/mdm-1028M-1600e18-reverse.safetensors
    python evaluate_reverse.py --qs_type dtn --model 1028 --ckpt-path models/mdm-1028M-1600e18-reverse.safetensors

ntd asks about people that were taught from name to description, dtn about those taught from description to name; both in
the same direction and in reverse. The questions are those of github.com/lukasberglund/reversal_curse: put its folder
data/reverse_experiments/june_version_7921032488 into data/reverse_experiments, or name it by --data_dir.

The likeliest tokens are taken (temperature 0). An answer is right if the reference occurs in it. Every answer is kept
with its verdict in out/reverse/{checkpoint}-{qs_type}.jsonl as it comes: a killed evaluation goes on where it stood. The
last line is `qs_type: ntd, accs: ..., accs_reverse: ..., blue: ..., blues_reverse: ...`, for dtn without the last two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.cli import parse, run
from lit_gpt.evaluation.settings import AnswerFlags

if TYPE_CHECKING:
    from lit_gpt.checkpoints.loaded import LoadedModel
    from lit_gpt.evaluation.generated_answers import Question
    from lit_gpt.sampling.settings import Sampling

_CFG = 0.8  # published


@dataclass
class Flags(AnswerFlags):
    """Flags of the reversal evaluation."""

    qs_type: str = "ntd"
    """ntd (taught from name to description) or dtn (from description to name)."""
    data_dir: str = "data/reverse_experiments/june_version_7921032488"
    """The folder with the questions."""
    steps: int = 32
    """MDM: denoising steps."""
    length: int = 52
    """Tokens of question and answer together."""
    cfg: float | None = None
    """MDM: guidance; 0.8 unless given."""


def main(argv: Sequence[str] | None = None) -> None:
    """Load, ask in both directions, print."""
    flags = parse(Flags, argv, __doc__)

    from dataclasses import replace

    from lit_gpt.devices import join_processes
    from lit_gpt.evaluation.generated_answers import (
        AnswerFile,
        check_flags,
        checkpoint_name,
        guidance,
        open_model,
        warn_of_flags,
    )
    from lit_gpt.evaluation.reversal import FILES
    from lit_gpt.files import file_sha256
    from lit_gpt.sampling.settings import Sampling

    if flags.qs_type not in FILES:
        raise ValueError(f"--qs_type {flags.qs_type}: choose ntd (name to description) or dtn (description to name)")
    check_flags(flags, ("steps", "length", "batch_size", "limit"))
    # Before the checkpoint, which may take a while, so that a wrong setting shows at once.
    how = Sampling(flags.length, flags.algorithm, flags.steps, 0.0, flags.cfg or 0.0, flags.seed)
    paths = question_files(Path(flags.data_dir), flags.qs_type)
    questions = read_both(paths, flags.limit)
    rank, _ = join_processes()
    answerer = open_model(flags)
    cfg_scale = guidance("cfg", flags.cfg, answerer.kind, _CFG)
    how = replace(how, cfg_scale=cfg_scale, stop_id=answerer.tokenizer.eos_id)
    if not rank:
        warn_of_flags(answerer, flags, [question["prompt"] for question in questions])
    settings = {
        **answerer.identity(),
        "data": [file_sha256(path) for path in paths],
        **{name: getattr(flags, name) for name in ("qs_type", "steps", "length", "seed")},
        **{"algorithm": how.algorithm, "cfg": cfg_scale},
    }
    path = Path(flags.output or f"out/reverse/{checkpoint_name(flags.ckpt_path)}-{flags.qs_type}.jsonl")
    verdict = ("correct", "bleu")
    file = AnswerFile(path, settings, ("direction", "index"), flags.existing, flags.batch_size, verdict)
    answers = file.collect(questions, lambda batch: answer(answerer, how, batch))
    if answers:
        print(f"answers: {path}")
        report(flags.qs_type, answers)


def question_files(folder: Path, qs_type: str) -> tuple[Path, Path]:
    """The files of both directions.

    Raises:
        FileNotFoundError: they are not there; the line says where they come from.
    """
    from lit_gpt.evaluation.reversal import FILES, SOURCE

    paths = [folder / name for name in FILES[qs_type]]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"no {' and no '.join(missing)} in {folder}: they come from {SOURCE}; put them there, or name their folder "
            "by --data_dir"
        )
    return paths[0], paths[1]


def read_both(paths: tuple[Path, Path], limit: int | None) -> list[Question]:
    """The questions of both directions, each with its `direction`."""
    from lit_gpt.evaluation.generated_answers import read_questions
    from lit_gpt.evaluation.reversal import DIRECTIONS

    return [
        {"direction": direction, **question}
        for direction, path in zip(DIRECTIONS, paths, strict=True)
        for question in read_questions(path, ("prompt", "completion"))[:limit]
    ]


def answer(answerer: LoadedModel, how: Sampling, questions: list[Question]) -> list[dict[str, Any]]:
    """Ask questions and judge what is written behind them, up to the end token; nothing where there is no room."""
    from lit_gpt.evaluation.reversal import DIRECTIONS, character_bleu, is_right

    prompts = [answerer.prompt_ids(question["prompt"]) for question in questions]
    rows = [2 * question["index"] + DIRECTIONS.index(question["direction"]) for question in questions]
    answers = []
    for question, prompt, ids in zip(questions, prompts, answerer.complete(prompts, rows, how), strict=True):
        text, reference = answerer.text_behind(prompt, ids), question["completion"]
        verdict = {"correct": is_right(reference, text), "bleu": character_bleu(reference, text)}
        answers.append({**question, "generation": text, **verdict})
    return answers


def report(qs_type: str, answers: list[dict[str, Any]]) -> None:
    """Accuracies with their confidence intervals, then the last line."""
    from lit_gpt.evaluation.generated_answers import accuracy, accuracy_line
    from lit_gpt.evaluation.reversal import DIRECTIONS

    same, reverse = ([one for one in answers if one["direction"] == direction] for direction in DIRECTIONS)
    print(f"same direction: {accuracy_line(same)}\nreverse: {accuracy_line(reverse)}")
    line = f"qs_type: {qs_type}, accs: {accuracy(same)}, accs_reverse: {accuracy(reverse)}"
    if qs_type == "ntd":
        bleus = [sum(one["bleu"] for one in part) / len(part) for part in (same, reverse)]
        line += f", blue: {bleus[0]}, blues_reverse: {bleus[1]}"
    print(line)


if __name__ == "__main__":
    run(main)
