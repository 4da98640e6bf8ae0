"""Questions from a file to answers in a file: what evaluations by generated text share.

Decisions: every answer is on the disk with its verdict as soon as it is there, and what is there is not asked again
(`result_file`); a question's number decides its random stream, so neither the batch nor the number of processes changes
an answer; of several processes each answers its share of a batch, and the first one writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lit_gpt.checkpoints.export import SUFFIX
from lit_gpt.checkpoints.loaded import LoadedModel, load_model
from lit_gpt.cli import warn
from lit_gpt.devices import join_processes
from lit_gpt.evaluation.progress import WorkBar, end_dry_run, tell_work
from lit_gpt.evaluation.result_file import EXISTING, ResultFile
from lit_gpt.evaluation.settings import AnswerFlags
from lit_gpt.evaluation.work import Work, sampling_work, total_work
from lit_gpt.files import open_regular, parse_json
from lit_gpt.sampling.settings import Sampling, changed_settings, sampling_values, setting_kind
from lit_gpt.tokenizer import SPECIAL_TOKENS, valid_text

JsonQuestion = dict[str, Any]
"""A question's JSON values; an answer is its question with more of them, among these perhaps `correct`, a bool."""


@dataclass(frozen=True)
class AnswerTask:
    """An evaluation by written answers: what is asked, and what an answer is worth."""

    questions: Sequence[JsonQuestion]
    """In the order in which they are asked."""
    output: str
    """The default file of the answers."""
    settings: dict[str, Any]
    """What changes an answer besides the model and the flags that all tasks have, as JSON values."""
    guidance: Mapping[str, float]
    """Flags of classifier-free guidance, one for each round of asking, with their published scales."""
    prompt: Callable[[JsonQuestion], str]
    """What the model reads first."""
    answer: Callable[[LoadedModel, Sequence[Sampling], int, Sequence[JsonQuestion]], list[JsonQuestion]]
    """The answers to a batch of questions: (model, the sampling of each round, tokens of a finished row, questions)."""
    key: tuple[str, ...] = ("index",)
    """Fields that tell a question from the others."""
    verdict: tuple[str, ...] = ("correct",)
    """Fields that every answer has besides."""


def generate_answers(flags: AnswerFlags, task: AnswerTask) -> list[JsonQuestion]:
    """Ask a checkpoint every question of a task that has no answer yet.

    Returns:
        The answers to all questions, in their order; nothing on other processes than the first.

    Raises:
        FileNotFoundError, ValueError: anything a user can get wrong, with the remedy.
    """
    # Before the checkpoint, which may take a while, so that a wrong setting shows at once.
    values = sampling_values(flags)
    samplings = [Sampling(**values, cfg_scale=getattr(flags, name) or 0.0) for name in task.guidance]
    rank, _ = join_processes()
    model = open_model(flags)
    scales = {name: guidance(name, getattr(flags, name), model.kind, scale) for name, scale in task.guidance.items()}
    samplings = [replace(one, cfg_scale=scale) for one, scale in zip(samplings, scales.values(), strict=True)]
    if not rank:
        warn_of_flags(model, flags, [task.prompt(question) for question in task.questions])
    settings = {
        **model.identity(),
        **task.settings,
        **{name: getattr(flags, name) for name in ("steps", "length", "seed")},
        "algorithm": samplings[0].algorithm,
        **changed_settings(flags, ("steps", "seed", "algorithm")),
        **scales,
    }

    def work(question: JsonQuestion) -> Work:
        prompt = len(model.prompt_ids(task.prompt(question)))
        rounds = total_work([sampling_work(model, prompt, flags.length, one) for one in samplings])
        return replace(rounds, requests=1)

    path = Path(flags.output or task.output)
    asking = Asking(model, work, flags.dry_run)
    file = AnswerFile(path, settings, task.key, flags.existing, flags.batch_size, task.verdict, asking=asking)
    answers = file.collect(task.questions, lambda batch: task.answer(model, samplings, flags.length, batch))
    if answers:
        print(f"answers: {path}")
    return answers


def read_json_questions(path: Path, fields: Sequence[str]) -> list[JsonQuestion]:
    """Questions from JSON lines: the named fields of each, and its `index` in the file, from 0.

    Args:
        path: the file, which must exist.
        fields: what every line must have, as text that is not blank.

    Raises:
        ValueError: a line is no such object (file and line), or there is none.
    """
    expected = "expected {" + ", ".join(f'"{field}": text' for field in fields) + "}"
    questions: list[JsonQuestion] = []
    with open_regular(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON ({error}): {expected}") from error
            if not isinstance(value, dict):
                raise ValueError(f"{path}:{number} holds a JSON {type(value).__name__}: {expected}")
            for field in fields:
                if not isinstance(value.get(field), str) or not value[field].strip():
                    found = json.dumps(value[field]) if field in value else f"only {', '.join(value) or 'nothing'}"
                    raise ValueError(f"{path}:{number} has no text in {field} (found {found[:60]}): {expected}")
            questions.append({"index": len(questions), **{field: valid_text(value[field]) for field in fields}})
    if not questions:
        raise ValueError(f"{path} holds no question: {expected} on each line")
    return questions


def check_flags(flags: AnswerFlags) -> None:
    """Refuse what is wrong with the shared flags alone, all of it at once.

    Raises:
        ValueError: names every wrong flag.
    """
    problems = [] if flags.ckpt_path else ["--ckpt_path is missing: name the checkpoint"]
    for name in ("steps", "length", "batch_size", "limit"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value}: expected at least 1")
    if flags.existing not in (None, *EXISTING):
        problems.append(f"--existing {flags.existing}: choose from {', '.join(EXISTING)}")
    if flags.special_tokens not in SPECIAL_TOKENS:
        problems.append(f"--special_tokens {flags.special_tokens}: choose from {', '.join(SPECIAL_TOKENS)}")
    if flags.output is not None and Path(flags.output).suffix != ".jsonl":
        problems.append(f"--output {flags.output}: expected a file that ends in .jsonl")
    if problems:
        raise ValueError("; ".join(problems))


def checkpoint_name(ckpt_path: str) -> str:
    """A checkpoint's name without its suffix, for the file of its answers; a run's has the run's name before it."""
    # Absolute, so that `.` and a file in the current folder have names, too.
    path = Path(os.path.abspath(ckpt_path))
    name = path.name.removesuffix(SUFFIX).removesuffix(".pth")
    return f"{path.parent.name}-{name}" if name.startswith("iter-") else name


def guidance(flag: str, given: float | None, kind: str, default: float) -> float:
    """The scale of guidance: as given; by default the published one for an MDM, none for an ARM.

    Raises:
        ValueError: it was given to an ARM.
    """
    if given is None:
        return default if kind == "mdm" else 0.0
    if given and kind == "arm":
        raise ValueError(f"--{flag} {given:g} needs an MDM, and this checkpoint is an ARM: leave it out")
    return given


def open_model(flags: AnswerFlags) -> LoadedModel:
    """The model that the flags name, for texts of `length`.

    Raises:
        FileNotFoundError, ValueError: as `load_model`; the model cannot read so long a text.
    """
    model = load_model(
        flags.ckpt_path,
        model_name=flags.model,
        tokenizer=flags.tokenizer,
        device=flags.device,
        dtype=flags.dtype,
    ).reading(flags.special_tokens)
    limit = model.model.config.block_size
    if flags.length > limit:
        raise ValueError(f"--length {flags.length}: this model reads at most {limit} tokens, prompt included; lower it")
    return model


def warn_of_flags(model: LoadedModel, flags: AnswerFlags, prompts: Sequence[str]) -> None:
    """Name flags that this kind of model has no use for, and say how many prompts `length` is too short for."""
    for name in changed_settings(flags):
        if setting_kind(name) not in (None, model.kind):
            warn(f"--{name} has no effect: this checkpoint is an {model.kind.upper()}")
    long = sum(len(model.prompt_ids(prompt)) >= flags.length for prompt in prompts)
    if long:
        warn(f"{long} of {len(prompts)} questions leave no room in --length {flags.length}: they count as wrong")


@dataclass(frozen=True)
class Asking:
    """Who is asked, and what it costs."""

    model: LoadedModel
    work: Callable[[JsonQuestion], Work]
    """The cost of an answer to a question."""
    dry_run: bool = False
    """Only tell what it costs."""


@dataclass(frozen=True)
class AnswerFile:
    """Where the answers go, and how."""

    path: Path
    """Ends in `.jsonl`."""
    settings: dict[str, Any]
    """Everything that changes an answer, as JSON values."""
    key: tuple[str, ...]
    """Fields that tell a question from the others."""
    existing: str | None
    """One of `result_file.EXISTING`, or None."""
    batch_size: int
    """Questions that a process answers at once."""
    verdict: tuple[str, ...] = ("correct",)
    """Fields that every answer has besides."""
    sort_at_end: bool = False
    """Whether the finished file is put into the order of its keys."""
    asking: Asking | None = None
    """None tells no cost and shows no progress."""

    def collect(
        self, questions: Sequence[JsonQuestion], answer: Callable[[list[JsonQuestion]], list[JsonQuestion]]
    ) -> list[JsonQuestion]:
        """Answer all questions that have no answer yet.

        Args:
            questions: in the order in which they are asked.
            answer: a batch of questions (perhaps none) to their answers.

        Returns:
            The answers to all questions, in their order; nothing on other processes than the first, and in a dry run.

        Raises:
            ValueError, SaveError: as `ResultFile`; on every process.
        """
        rank, processes = join_processes()
        dry_run = self.asking is not None and self.asking.dry_run
        asked = {self._key(question): question for question in questions}
        with contextlib.ExitStack() as stack:
            file: ResultFile | None = None
            outcome: list[Any] = [[], None]
            if rank == 0:
                try:
                    opened = ResultFile(
                        self.path,
                        self.settings,
                        lambda one: self._key_of(one, asked),
                        self.existing,
                        writes=not dry_run,
                    )
                    file = stack.enter_context(opened)
                    outcome[0] = [n for n, question in enumerate(questions) if self._key(question) not in file]
                except (ValueError, OSError) as error:
                    outcome[1] = error
            if processes > 1:
                torch.distributed.broadcast_object_list(outcome)
            todo, failure = outcome
            if failure is not None:
                raise failure
            works = {self._key(questions[n]): self.asking.work(questions[n]) for n in todo} if self.asking else {}
            if self.asking is not None:
                tell_work("answers", total_work(list(works.values())), len(questions) - len(todo), everywhere=True)
            if dry_run:
                end_dry_run()
                return []
            at_once = self.batch_size * processes
            batches = ([questions[n] for n in todo[at : at + at_once]] for at in range(0, len(todo), at_once))
            answers = (_everyones(answer(batch[rank::processes]), processes) for batch in batches)
            if file is not None:
                return self._keep(file, questions, answers, works)
            for _ in answers:
                pass
            return []

    def _keep(
        self,
        file: ResultFile,
        questions: Sequence[JsonQuestion],
        answers: Iterator[list[JsonQuestion]],
        works: Mapping[tuple[Any, ...], Work],
    ) -> list[JsonQuestion]:
        """Put answers on the disk as they come, with progress; returns those to all questions."""
        place = {self._key(question): number for number, question in enumerate(questions)}
        found = {place[self._key(one)]: one for one in file.results if self._key(one) in place}
        judged = "correct" in self.verdict
        if found and judged:
            print(f"{len(found)} of {len(questions)} questions were answered already: {self.path}", flush=True)
        with contextlib.ExitStack() as stack:
            bar = None
            if self.asking is not None:
                total = total_work(list(works.values()))
                bar = stack.enter_context(WorkBar(self.asking.model.model, total, "answers"))
            for batch in answers:
                for one in sorted(batch, key=lambda one: place[self._key(one)]):
                    file.add(one)
                    found[place[self._key(one)]] = one
                if bar is not None:
                    done = total_work([works[self._key(one)] for one in batch])
                    bar.finish(done, f"accuracy {accuracy(list(found.values())):.1%}" if judged else "")
        if self.sort_at_end:
            file.sort(self._key)
        return [found[number] for number in range(len(questions))]

    def _key(self, question: JsonQuestion) -> tuple[Any, ...]:
        return tuple(question[name] for name in self.key)

    def _key_of(self, answer: JsonQuestion, asked: Mapping[tuple[Any, ...], JsonQuestion]) -> tuple[Any, ...]:
        """The key of an answer; what a line that was read lacks is `ResultFile`'s to report.

        Raises:
            KeyError, TypeError: it is no answer.
            ValueError: a verdict is none, or the answer is to another question than is asked under its key.
        """
        key = self._key(answer)
        if not all(type(part) in (int, str) for part in key):
            raise ValueError(f"{', '.join(self.key)} {key}: expected numbers or texts")
        for name in self.verdict:
            value = answer[name]
            share = type(value) in (int, float) and 0 <= value <= 1
            if not isinstance(value, bool) and (name == "correct" or not share):
                raise ValueError(f"{name} is {str(value)[:40]}, expected {_VERDICTS.get(name, 'a share from 0 to 1')}")
        if other := [name for name, value in asked.get(key, {}).items() if name in answer and answer[name] != value]:
            raise ValueError(f"its {other[0]} is not that of the question")
        return key


_VERDICTS = {"correct": "true or false"}


def _everyones(own: list[JsonQuestion], processes: int) -> list[JsonQuestion]:
    """The answers of all processes."""
    if processes == 1:
        return own
    parts: list[Any] = [None] * processes
    torch.distributed.all_gather_object(parts, own)
    return [answer for part in parts for answer in part]


def accuracy(answers: Sequence[JsonQuestion]) -> float:
    """Share of the answers that are right."""
    return sum(answer["correct"] for answer in answers) / len(answers)


def accuracy_line(answers: Sequence[JsonQuestion]) -> str:
    """How many answers are right, their share, and how sure that is."""
    right = sum(answer["correct"] for answer in answers)
    low, high = wilson_interval(right, len(answers))
    return (
        f"{right} of {len(answers)} right: {right / len(answers):.1%}, 95 % confidence interval {low:.1%} to {high:.1%}"
    )


def wilson_interval(right: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share: (p + z²/2n ± z sqrt(p (1 - p)/n + z²/4n²)) / (1 + z²/n).

    Unlike p ± z sqrt(p (1 - p)/n), it stays within [0, 1] and has a width at 0 and 1.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference"; z is the normal
    distribution's 97.5 % quantile.
    """
    z, share = 1.959963984540054, right / count
    middle = share + z**2 / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)
