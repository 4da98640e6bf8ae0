"""A model's answers to MT-bench's questions, written to an answer file.

Decisions: only first turns are answered, by sampling at temperature 1 in the template of fine-tuning; an answer's number
is its seed and a question's number chooses its random numbers, so that the batch changes nothing.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_gpt.checkpoints.export import SUFFIX, read_record
from lit_gpt.checkpoints.loaded import LoadedModel, load_model
from lit_gpt.cli import Interrupted, warn
from lit_gpt.data.sft_formats import CHAT_TEMPLATE
from lit_gpt.devices import join_processes
from lit_gpt.evaluation.generated_answers import AnswerFile, Asking, JsonQuestion
from lit_gpt.evaluation.mt_bench.benchmark_files import (
    BenchmarkFiles,
    MtBenchQuestion,
    answer_line,
    first_few,
    read_json_lines,
    read_mt_bench_questions,
)
from lit_gpt.evaluation.result_file import EXISTING
from lit_gpt.evaluation.settings import BEHIND_END, MtBenchAnswerFlags
from lit_gpt.evaluation.work import Work, sampling_work, total_work
from lit_gpt.processes import launched_world
from lit_gpt.sampling.settings import Sampling, changed_settings, setting_kind
from lit_gpt.tokenizer import SPECIAL_TOKENS

# Each is as much work as the first, which alone is judged.
_MOST_CHOICES = 1000


def write_answers(flags: MtBenchAnswerFlags) -> tuple[Path, float] | None:
    """Answer the questions that have no answer yet, and sort the file.

    Returns:
        The answer file and the seconds it took; None on other processes than the first, and in a dry run.

    Raises:
        FileNotFoundError, ValueError: anything a user can get wrong, with the remedy.
        Interrupted: by Ctrl-C; the line says how many answers there are.
    """
    check_answer_flags(flags)
    _warn_of_no_effect(flags)
    bench = BenchmarkFiles(flags.bench_name)
    questions = read_mt_bench_questions(bench.questions, flags.question_begin, flags.question_end)
    path = Path(flags.answer_file) if flags.answer_file else bench.answers(flags.model_id)
    # Before the checkpoint, which may take a while, so that a wrong setting shows at once.
    sampling = Sampling.of(flags)
    rank, _ = join_processes()
    model = _open_model(flags)
    length = _context_length(model, flags.max_new_token, questions, rank)
    started = time.perf_counter()

    def work(question: JsonQuestion) -> Work:
        one = sampling_work(model, len(_prompt_ids(model, question["question"])), length, sampling)
        return replace(total_work([one] * flags.num_choices), requests=1)

    asking = Asking(model, work, flags.dry_run)
    settings = _settings(flags, model, length)
    file = AnswerFile(
        path, settings, ("question_id",), flags.existing, flags.batch_size, (), sort_at_end=True, asking=asking
    )

    def answer(batch: list[JsonQuestion]) -> list[JsonQuestion]:
        asked = [one["question"] for one in batch]
        texts = [
            _texts(model, asked, replace(sampling, seed=flags.seed + number), length, flags.behind_end)
            for number in range(flags.num_choices)
        ]
        return [answer_line(one, flags.model_id, own) for one, own in zip(asked, zip(*texts, strict=True), strict=True)]

    try:
        file.collect([{"question_id": one.question_id, "question": one} for one in questions], answer)
    except KeyboardInterrupt:
        line = f"interrupted: {_count(path, questions)} of {len(questions)} answers are in {path}; "
        raise Interrupted(line + "the same command goes on", signal.SIGINT) from None
    return None if rank or flags.dry_run else (path, time.perf_counter() - started)


def check_answer_flags(flags: MtBenchAnswerFlags) -> None:
    """Refuse what is wrong with the flags alone, all of it at once.

    Raises:
        ValueError: names every wrong flag.
    """
    problems = []
    for flag, value, known in (
        ("model-type", flags.model_type, ("arm", "mdm")),
        ("existing", flags.existing, (None, *EXISTING)),
        ("special-tokens", flags.special_tokens, SPECIAL_TOKENS),
        ("behind-end", flags.behind_end, BEHIND_END),
    ):
        if value not in known:
            problems.append(f"--{flag} {value}: choose from {', '.join(filter(None, known))}")
    for name in ("model_id", "model_path"):
        if not getattr(flags, name):
            problems.append(f"--{name.replace('_', '-')} is missing")
    for name in ("max_new_token", "steps", "num_choices", "batch_size"):
        if getattr(flags, name) < 1:
            problems.append(f"--{name.replace('_', '-')} {getattr(flags, name)}: expected at least 1")
    if flags.num_choices > _MOST_CHOICES:
        problems.append(f"--num-choices {flags.num_choices}: at most {_MOST_CHOICES}")
    if flags.model_type == "arm" and flags.cfg_scale:
        problems.append(f"--cfg-scale {flags.cfg_scale} needs an MDM: an ARM cannot read a masked prompt")
    if flags.answer_file is not None and Path(flags.answer_file).suffix != ".jsonl":
        problems.append(f"--answer-file {flags.answer_file}: expected a file that ends in .jsonl")
    if problems:
        raise ValueError("; ".join(problems))


def _warn_of_no_effect(flags: MtBenchAnswerFlags) -> None:
    """Name flags without an effect."""
    if flags.dtype == "float16":
        warn(
            "--dtype float16 is not computed with: taken as auto, which is bfloat16 on GPUs that have it, else float32"
        )
    for name in ("max_gpu_memory", "revision"):
        if getattr(flags, name) not in (None, "main"):
            warn(f"--{name.replace('_', '-')} has no effect: the model is one file, and on one device")
    for name in changed_settings(flags):
        if setting_kind(name) not in (None, flags.model_type):
            warn(f"--{name.replace('_', '-')} has no effect on an {flags.model_type.upper()}")
    if (flags.num_gpus_total > 1 or flags.num_gpus_per_model > 1) and launched_world() is None:
        count = max(1, flags.num_gpus_total // max(1, flags.num_gpus_per_model))
        warn(
            "--num-gpus-total and --num-gpus-per-model have no effect; for several GPUs: "
            f"torchrun --nproc_per_node {count} eval/gen_model_answer.py ..."
        )


def _open_model(flags: MtBenchAnswerFlags) -> LoadedModel:
    """The model; `--model-id` is a size only where the checkpoint says none."""
    path = Path(flags.model_path)
    describes_itself = path.is_dir() or (path.suffix == SUFFIX and path.is_file() and read_record(path) is not None)
    return load_model(
        path,
        model_name=flags.model_id if flags.model_id.isdigit() and not describes_itself else None,
        kind=flags.model_type,
        tokenizer=flags.tokenizer,
        device=flags.device,
        dtype="auto" if flags.dtype == "float16" else flags.dtype,
    ).reading(flags.special_tokens)


def _context_length(model: LoadedModel, wanted: int, questions: Sequence[MtBenchQuestion], rank: int) -> int:
    """A context length that the model can read. Names questions without room for an answer."""
    limit = model.model.config.block_size
    if wanted > limit and not rank:
        warn(f"--max-new-token {wanted}: this model reads {limit} tokens, which is the limit now")
    length = min(wanted, limit)
    long = [one.question_id for one in questions if len(_prompt_ids(model, one)) >= length]
    if long and not rank:
        warn(f"{len(long)} questions leave no room in {length} tokens, their answers stay empty: {first_few(long)}")
    return length


def _prompt_ids(model: LoadedModel, question: MtBenchQuestion) -> list[int]:
    """A question's first turn in the template of fine-tuning."""
    return model.prompt_ids(CHAT_TEMPLATE.format(question=question.turns[0]))


def _settings(flags: MtBenchAnswerFlags, model: LoadedModel, length: int) -> dict[str, Any]:
    """Everything that changes an answer."""
    settings: dict[str, Any] = {"context_length": length, "choices": flags.num_choices}
    if flags.behind_end != "cut":
        settings["behind_end"] = flags.behind_end
    if model.kind == "mdm":
        settings |= {"steps": flags.steps, "cfg_scale": flags.cfg_scale}
    more = changed_settings(flags, ("steps", "cfg_scale"))
    return {"model_id": flags.model_id, **model.identity(), **settings, **more}


def _texts(
    model: LoadedModel, questions: Sequence[MtBenchQuestion], sampling: Sampling, length: int, behind_end: str
) -> list[str]:
    """One answer to each first turn; empty where there is no room for one."""
    prompts = [_prompt_ids(model, question) for question in questions]
    finished = model.complete(prompts, [question.question_id for question in questions], sampling, length)
    keep = behind_end == "keep"
    return [model.text_behind(prompt, ids, keep).strip() for prompt, ids in zip(prompts, finished, strict=True)]


def _count(path: Path, questions: Sequence[MtBenchQuestion]) -> int:
    """How many of the questions have an answer in the file."""
    if not path.is_file():
        return 0
    answered = set(read_json_lines(path, "answer", lambda line: line["question_id"], may_be_torn=True))
    return sum(question.question_id in answered for question in questions)
