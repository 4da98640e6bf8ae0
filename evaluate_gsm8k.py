"""Accuracy on GSM8K, grade-school word problems, of a model fine-tuned for them (sft/finetune_mdm_gsm8k.py).

    python evaluate_gsm8k.py --ckpt_path models/mdm-1028M-3300e18-rsl-gsm8k.safetensors
    torchrun --nproc_per_node 8 evaluate_gsm8k.py --ckpt_path models/mdm-1028M-3300e18-rsl-gsm8k.safetensors
    python evaluate_gsm8k.py --ckpt_path workdir/finetune/mdm-gsm8k-6M --limit 16 --steps 64              a look, on a CPU

A question is answered in two rounds: from `Question: ...` the model writes its thought, and from the text of both the
answer, behind `####`; --length counts everything, the question too. An ARM gets a second round where the first, which
ends with its end token, gave no answer. The last answer in the text counts; it is right if it equals the target as a
number.

Every answer is kept with its verdict in out/gsm8k/{checkpoint}.jsonl as it comes: a killed evaluation goes on where it
stood. The last line is `Acc: {x}`, a fraction.
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

_CFG = 0.1  # published, for both rounds


@dataclass
class Flags(AnswerFlags):
    """Flags of the GSM8K evaluation."""

    data: str = "data/gsm8k/test.jsonl"
    """The questions: JSON lines with question and target."""
    cfg1: float | None = None
    """MDM: guidance in the first round; 0.1 unless given."""
    cfg2: float | None = None
    """MDM: guidance in the second round; 0.1 unless given."""
    temperature: float = 0.1
    """0 takes the likeliest token; 1 samples from the model's distribution."""


def main(argv: Sequence[str] | None = None) -> None:
    """Load, ask every question, print."""
    flags = parse(Flags, argv, __doc__)

    from dataclasses import replace

    from lit_gpt.devices import join_processes
    from lit_gpt.evaluation.generated_answers import (
        AnswerFile,
        accuracy,
        accuracy_line,
        check_flags,
        checkpoint_name,
        guidance,
        open_model,
        read_questions,
        warn_of_flags,
    )
    from lit_gpt.files import file_sha256

    check_flags(flags, ("steps", "length", "batch_size", "limit"))
    # Before the checkpoint, which may take a while, so that a wrong setting shows at once.
    rounds = [samplings(flags, cfg or 0.0) for cfg in (flags.cfg1, flags.cfg2)]
    data = Path(flags.data)
    if not data.is_file():
        raise FileNotFoundError(
            f"no questions {data}: GSM8K's are data/gsm8k/test.jsonl in this project (start from its folder, or restore "
            "the file with git); others are named by --data"
        )
    questions = read_questions(data, ("question", "target"))[: flags.limit]
    rank, _ = join_processes()
    answerer = open_model(flags)
    scales = [guidance(name, getattr(flags, name), answerer.kind, _CFG) for name in ("cfg1", "cfg2")]
    eos_id = answerer.tokenizer.eos_id
    rounds = [replace(how, cfg_scale=cfg, stop_id=eos_id) for how, cfg in zip(rounds, scales, strict=True)]
    if not rank:
        warn_of_flags(answerer, flags, [prompt(question) for question in questions])
    settings = {
        **answerer.identity(),
        "data": file_sha256(data),
        **{name: getattr(flags, name) for name in ("steps", "length", "temperature", "seed")},
        **{"algorithm": rounds[0].algorithm, "cfg1": scales[0], "cfg2": scales[1]},
    }
    path = Path(flags.output or f"out/gsm8k/{checkpoint_name(flags.ckpt_path)}.jsonl")
    file = AnswerFile(path, settings, ("index",), flags.existing, flags.batch_size)
    answers = file.collect(questions, lambda batch: answer(answerer, rounds, batch))
    if answers:
        print(f"answers: {path}\n{accuracy_line(answers)}\nAcc: {accuracy(answers)}")


def samplings(flags: Flags, cfg_scale: float) -> Sampling:
    """How a round is sampled; the end token is the tokenizer's, and comes with it."""
    from lit_gpt.sampling.settings import Sampling

    return Sampling(flags.length, flags.algorithm, flags.steps, flags.temperature, cfg_scale, flags.seed)


def prompt(question: Question) -> str:
    """A question as in fine-tuning."""
    return f"Question: {question['question']}"


def answer(answerer: LoadedModel, rounds: list[Sampling], questions: list[Question]) -> list[dict[str, Any]]:
    """Ask questions in both rounds, and judge what was written.

    A question that leaves no room has the empty text. A first text that, tokenized again, leaves none stands as it is.
    """
    from lit_gpt.evaluation.gsm8k import extract_answer, same_answer

    decode = answerer.tokenizer.decode
    # Each round has a random stream of its own.
    first_rows = [2 * question["index"] for question in questions]
    first = answerer.complete([answerer.prompt_ids(prompt(one)) for one in questions], first_rows, rounds[0])
    texts = [decode(ids or []) for ids in first]
    asked = [
        number
        for number, ids in enumerate(first)
        if ids is not None and (answerer.kind == "mdm" or extract_answer(texts[number]) is None)
    ]
    prompts = [answerer.prompt_ids(texts[number]) for number in asked]
    second = answerer.complete(prompts, [first_rows[number] + 1 for number in asked], rounds[1])
    for number, ids in zip(asked, second, strict=True):
        texts[number] = texts[number] if ids is None else decode(ids)
    found = [extract_answer(text) for text in texts]
    return [
        {**one, "text": text, "answer": given, "correct": given is not None and same_answer(given, one["target"])}
        for one, text, given in zip(questions, texts, found, strict=True)
    ]


if __name__ == "__main__":
    run(main)
