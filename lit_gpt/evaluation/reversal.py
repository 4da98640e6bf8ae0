"""The reversal-curse experiments: their files, and what an answer to one of their questions is worth.

A model was fine-tuned on invented people, each described in one direction only, from name to description or back. `ntd`
asks those taught from name to description, `dtn` the others; each in the taught direction and in the reverse one.
Decisions: the right answer may stand anywhere in what was written; both are compared without case and surrounding white
space, in BLEU too, so that a perfect answer has BLEU 1.

Source: Berglund et al. 2023 (arXiv 2309.12288) and their data; SMDM (arXiv 2410.18514).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lit_gpt.checkpoints.loaded import LoadedModel
from lit_gpt.evaluation.generated_answers import (
    AnswerTask,
    JsonQuestion,
    accuracy,
    accuracy_line,
    checkpoint_name,
    read_json_questions,
)
from lit_gpt.evaluation.settings import BEHIND_END
from lit_gpt.files import file_sha256
from lit_gpt.sampling.settings import Sampling

DIRECTIONS = ("same", "reverse")
FILES: Mapping[str, tuple[str, str]] = {
    "ntd": ("p2d_prompts_test.jsonl", "d2p_reverse_prompts_test.jsonl"),
    "dtn": ("d2p_prompts_test.jsonl", "p2d_reverse_prompts_test.jsonl"),
}
"""Per kind of question, the files of the taught and of the reverse direction."""
DATA_DIR = "data/reverse_experiments/june_version_7921032488"
SOURCE = f"github.com/lukasberglund/reversal_curse, folder {DATA_DIR}"
"""Where the files come from; their licence is not stated, so they are not part of this project."""


def is_right(reference: str, generation: str) -> bool:
    """Whether the reference occurs in what was written."""
    return _plain(reference) in _plain(generation)


def character_bleu(reference: str, generation: str) -> float:
    """Sentence BLEU over characters: up to 4-grams, unsmoothed (Papineni et al. 2002, as nltk computes it).

    Returns:
        In [0, 1]; practically 0 where no four characters in a row are the reference's.
    """
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        # It warns of every sentence without a common 4-gram.
        warnings.simplefilter("ignore")
        return float(sentence_bleu([list(_plain(reference))], list(_plain(generation))))


def _plain(text: str) -> str:
    return text.strip().lower()


# --- asking -----------------------------------------------------------------------------------------------------------


def reversal_task(flags: Any) -> AnswerTask:
    """The evaluation that flags of evaluate_reverse.py describe.

    Raises:
        FileNotFoundError, ValueError: there are no questions, or they cannot be read; the kind of question is unknown.
    """
    if flags.qs_type not in FILES:
        raise ValueError(f"--qs_type {flags.qs_type}: choose ntd (name to description) or dtn (description to name)")
    paths = [Path(flags.data_dir) / name for name in FILES[flags.qs_type]]
    if flags.behind_end not in BEHIND_END:
        raise ValueError(f"--behind_end {flags.behind_end}: choose from {', '.join(BEHIND_END)}")
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"no {' and no '.join(missing)} in {Path(flags.data_dir)}: they come from {SOURCE}; put them there, or name "
            "their folder by --data_dir"
        )
    settings: dict[str, Any] = {"data": [file_sha256(path) for path in paths], "qs_type": flags.qs_type}
    if flags.behind_end != "cut":
        settings["behind_end"] = flags.behind_end
    return AnswerTask(
        questions=[
            {"direction": direction, **question}
            for direction, path in zip(DIRECTIONS, paths, strict=True)
            for question in read_json_questions(path, ("prompt", "completion"))[: flags.limit]
        ],
        output=f"out/reverse/{checkpoint_name(flags.ckpt_path)}-{flags.qs_type}.jsonl",
        settings=settings,
        guidance={"cfg": 0.8},
        prompt=lambda question: str(question["prompt"]),
        answer=partial(answer_reversal_questions, keep_behind_end=flags.behind_end == "keep"),
        key=("direction", "index"),
        verdict=("correct", "bleu"),
    )


def answer_reversal_questions(
    model: LoadedModel,
    samplings: Sequence[Sampling],
    length: int,
    questions: Sequence[JsonQuestion],
    keep_behind_end: bool = False,
) -> list[JsonQuestion]:
    """Ask questions and judge what is written behind them; nothing where there is no room.

    Args:
        model: who is asked.
        samplings: how, in the one round.
        length: tokens of a finished row.
        questions: with `prompt`, `completion`, `direction` and `index`.
        keep_behind_end: judge all of it, not only what stands before the end token.
    """
    prompts = [model.prompt_ids(question["prompt"]) for question in questions]
    rows = [2 * question["index"] + DIRECTIONS.index(question["direction"]) for question in questions]
    finished = model.complete(prompts, rows, samplings[0], length)
    answers = []
    for question, prompt, ids in zip(questions, prompts, finished, strict=True):
        text, reference = model.text_behind(prompt, ids, keep_behind_end), question["completion"]
        verdict = {"correct": is_right(reference, text), "bleu": character_bleu(reference, text)}
        answers.append({**question, "generation": text, **verdict})
    return answers


def accuracy_lines(qs_type: str, answers: Sequence[JsonQuestion]) -> list[str]:
    """Accuracies with their confidence intervals, then the last line, which scripts read."""
    same, reverse = ([one for one in answers if one["direction"] == direction] for direction in DIRECTIONS)
    line = f"qs_type: {qs_type}, accs: {accuracy(same)}, accs_reverse: {accuracy(reverse)}"
    if qs_type == "ntd":
        bleus = [sum(one["bleu"] for one in part) / len(part) for part in (same, reverse)]
        line += f", blue: {bleus[0]}, blues_reverse: {bleus[1]}"
    return [f"same direction: {accuracy_line(same)}", f"reverse: {accuracy_line(reverse)}", line]
