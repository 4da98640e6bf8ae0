"""Answer MT-bench's questions with a fine-tuned ARM or MDM; first of gen_judgment.py and show_result.py.

    python eval/gen_model_answer.py --model-id 1028 --model-type arm --model-path models/ar-1028M-100e18-sharegpt.safetensors
    python eval/gen_model_answer.py --model-id 1028 --model-type mdm --model-path models/mdm-1028M-1600e18.safetensors \
        --steps 128 --cfg-scale 0.6 --answer-file data/mt_bench/model_answer/mdm.jsonl
    torchrun --nproc_per_node 8 eval/gen_model_answer.py ...                                        on eight GPUs

Only first turns are answered, by sampling at temperature 1; second turns stay empty. Answers are written as they come:
after Ctrl-C or a kill the same command goes on. The last line is `{answer_file}, inference time: {s} s`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

<<<<<<< HEAD
from lit_gpt.cli import Interrupted, parse, run, warn

if TYPE_CHECKING:
    from lit_gpt.checkpoints.loaded import LoadedModel
    from lit_gpt.evaluation.mt_bench.benchmark_files import MtBenchQuestion
    from lit_gpt.evaluation.result_file import ResultFile
    from lit_gpt.sampling.settings import Sampling

Value = TypeVar("Value")


@dataclass
class Flags:
    """Flags of the answers."""

    model_id: str = ""
    """The model's name in the answers; its size in millions, for checkpoints that do not say."""
    model_type: str = "arm"
    """arm or mdm."""
    model_path: str = ""
    """The checkpoint: an export, a run folder or checkpoint, or a published file."""
    answer_file: str | None = None
    """Where answers go, FILE.jsonl; by default data/BENCH/model_answer/MODEL_ID.jsonl."""
    bench_name: str = "mt_bench"
    """The benchmark's folder in data/."""
    question_begin: int | None = None
    """Number of the first question, counted from 0."""
    question_end: int | None = None
    """Number behind the last question."""
    max_new_token: int = 1024
    """Tokens of question and answer together; never more than the model reads."""
    steps: int = 128
    """MDM: denoising steps of an answer."""
    cfg_scale: float = 0.0
    """MDM: classifier-free guidance; 0 is none."""
    num_choices: int = 1
    """Answers to each question; the seed is an answer's number, from 0. The first one is judged."""
    batch_size: int = 8
    """Questions that are answered at once; changes speed and memory, never an answer."""
    tokenizer: str | None = None
    """A folder or a name on the hub; by default the checkpoint's own."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto is a GPU if there is one."""
    dtype: str = "auto"
    """float32 or bfloat16; auto is float32 on CPUs, bfloat16 on GPUs that have it."""
    existing: str = "continue"
    """What to do with an answer file that is there: continue it, refuse, or overwrite."""
    num_gpus_per_model: int = 1
    """Has no effect: a model is on one device."""
    num_gpus_total: int = 1
    """Has no effect: start the script with torchrun for several GPUs."""
=======
from lit_gpt.cli import parse, run
from lit_gpt.evaluation.settings import MtBenchAnswerFlags
>>>>>>> main


def main(argv: Sequence[str] | None = None) -> None:
    """Answer every question, print where and how fast."""
    flags = parse(MtBenchAnswerFlags, argv, __doc__)

<<<<<<< HEAD
    from lit_gpt.evaluation.mt_bench.benchmark_files import BenchmarkFiles, read_mt_bench_questions
    from lit_gpt.sampling.settings import Sampling

    bench = BenchmarkFiles(flags.bench_name)
    questions = read_mt_bench_questions(bench.questions, flags.question_begin, flags.question_end)
    path = Path(flags.answer_file) if flags.answer_file else bench.answers(flags.model_id)
    sampling = Sampling(flags.max_new_token, steps=flags.steps, cfg_scale=flags.cfg_scale)

    from lit_gpt.devices import join_processes
    from lit_gpt.evaluation.result_file import ResultFile

    rank, processes = join_processes()
    answerer = _load(flags)
    sampling = _fitting(answerer, sampling, questions, rank)
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        answers, todo = None, questions
        if not rank:
            settings = _settings(flags, answerer, sampling)
            answers = ResultFile(path, settings, lambda line: line["question_id"], flags.existing)
            stack.enter_context(answers)
            todo = [question for question in questions if question.question_id not in answers]
        try:
            _answer_all(flags, answerer, sampling, _from_first(todo, processes), answers)
        except KeyboardInterrupt:
            there = sum(answers is not None and question.question_id in answers for question in questions)
            line = f"interrupted: {there} of {len(questions)} answers are in {path}; the same command goes on"
            raise Interrupted(line, signal.SIGINT) from None
        if answers is not None:
            answers.sort(lambda line: line["question_id"])
            print(f"{path}, inference time: {time.perf_counter() - started:.1f} s")


def _check(flags: Flags) -> None:
    """Refuse what is wrong with the flags alone, all of it at once; name those without an effect."""
    from lit_gpt.evaluation.result_file import EXISTING

    problems = []
    for flag, value, known in (
        ("model-type", flags.model_type, ("arm", "mdm")),
        ("existing", flags.existing, EXISTING),
    ):
        if value not in known:
            problems.append(f"--{flag} {value}: choose from {', '.join(known)}")
    for name in ("model_id", "model_path"):
        if not getattr(flags, name):
            problems.append(f"--{name.replace('_', '-')} is missing")
    for name in ("max_new_token", "steps", "num_choices", "batch_size"):
        if getattr(flags, name) < 1:
            problems.append(f"--{name.replace('_', '-')} {getattr(flags, name)}: expected at least 1")
    if flags.model_type == "arm" and flags.cfg_scale:
        problems.append(f"--cfg-scale {flags.cfg_scale} needs an MDM: an ARM cannot read a masked prompt")
    if flags.answer_file is not None and Path(flags.answer_file).suffix != ".jsonl":
        problems.append(f"--answer-file {flags.answer_file}: expected a file that ends in .jsonl")
    if problems:
        raise ValueError("; ".join(problems))
    if flags.model_type == "arm" and flags.steps != Flags.steps:
        warn("--steps has no effect on an ARM")
    if (flags.num_gpus_total > 1 or flags.num_gpus_per_model > 1) and "WORLD_SIZE" not in os.environ:
        count = max(1, flags.num_gpus_total // max(1, flags.num_gpus_per_model))
        warn(
            "--num-gpus-total and --num-gpus-per-model have no effect; for several GPUs: "
            f"torchrun --nproc_per_node {count} eval/gen_model_answer.py ..."
        )


def _load(flags: Flags) -> LoadedModel:
    """The model and its tokenizer; `--model-id` is a size only where the checkpoint says none."""
    from lit_gpt.checkpoints.export import SUFFIX, read_record
    from lit_gpt.checkpoints.loaded import load_model

    path = Path(flags.model_path)
    describes_itself = path.is_dir() or (path.suffix == SUFFIX and path.is_file() and read_record(path) is not None)
    size = flags.model_id if flags.model_id.isdigit() and not describes_itself else None
    return load_model(
        path,
        model_name=size,
        kind=flags.model_type,
        tokenizer=flags.tokenizer,
        device=flags.device,
        dtype=flags.dtype,
    )


def _fitting(answerer: LoadedModel, sampling: Sampling, questions: Sequence[MtBenchQuestion], rank: int) -> Sampling:
    """Settings that the model can follow: no context longer than it reads. Names questions without room for an answer."""
    from lit_gpt.evaluation.mt_bench.benchmark_files import first_few

    limit, wanted = answerer.model.config.block_size, sampling.context_length
    assert isinstance(wanted, int)
    if wanted > limit and not rank:
        warn(f"--max-new-token {wanted}: this model reads {limit} tokens, which is the limit now")
    length = min(wanted, limit)
    sampling = replace(sampling, context_length=length, stop_id=answerer.tokenizer.eos_id)
    long = [one.question_id for one in questions if len(_prompt(answerer, one, sampling)) >= length]
    if long and not rank:
        warn(f"{len(long)} questions leave no room in {length} tokens, their answers stay empty: {first_few(long)}")
    return sampling


def _prompt(answerer: LoadedModel, question: MtBenchQuestion, sampling: Sampling) -> list[int]:
    """A question's first turn in the template of fine-tuning."""
    from lit_gpt.data.sft_formats import CHAT_TEMPLATE

    return answerer.prompt_ids(CHAT_TEMPLATE.format(question=question.turns[0]))


def _settings(flags: Flags, answerer: LoadedModel, sampling: Sampling) -> dict[str, Any]:
    """Everything that changes an answer."""
    how: dict[str, Any] = {"context_length": sampling.context_length, "choices": flags.num_choices}
    if answerer.kind == "mdm":
        how |= {"steps": sampling.steps, "cfg_scale": sampling.cfg_scale}
    return {"model_id": flags.model_id, **answerer.identity(), **how}


def _answer_all(
    flags: Flags, answerer: LoadedModel, sampling: Sampling, todo: Sequence[MtBenchQuestion], answers: ResultFile | None
) -> None:
    """Answer a batch in each process, gather, write, until all is done; `answers` is the first process's."""
    from tqdm import tqdm

    from lit_gpt.devices import join_processes
    from lit_gpt.evaluation.mt_bench.benchmark_files import answer_line

    rank, processes = join_processes()
    # Where the bar is no terminal's, a line of it every half minute will do.
    pause_s = 0.1 if sys.stderr.isatty() else 30
    with tqdm(total=len(todo), desc="questions", disable=rank > 0, mininterval=pause_s) as bar:
        for batch in _rounds(todo, flags.batch_size, rank, processes):
            choices = [_answers(answerer, batch, replace(sampling, seed=seed)) for seed in range(flags.num_choices)]
            texts = zip(*choices, strict=True)
            lines = [answer_line(question, flags.model_id, own) for question, own in zip(batch, texts, strict=True)]
            for line in _to_first(lines, rank, processes):
                assert answers is not None
                answers.add(line)
                bar.update()


def _rounds(todo: Sequence[Value], batch_size: int, rank: int, processes: int) -> Iterator[Sequence[Value]]:
    """This process's batch of each round; the last one may be empty."""
    for start in range(0, len(todo), batch_size * processes):
        own = start + rank * batch_size
        yield todo[own : own + batch_size]


def _answers(answerer: LoadedModel, questions: Sequence[MtBenchQuestion], sampling: Sampling) -> list[str]:
    """One answer to each first turn, up to the end token; empty where there is no room for one."""
    prompts = [_prompt(answerer, question, sampling) for question in questions]
    # A row's number decides its random stream: the question's own, so that the batch does not matter.
    rows = [question.question_id for question in questions]
    finished = answerer.complete(prompts, rows, sampling)
    return [answerer.text_behind(prompt, ids).strip() for prompt, ids in zip(prompts, finished, strict=True)]


def _from_first(todo: list[MtBenchQuestion], processes: int) -> list[MtBenchQuestion]:
    """What the first process has, in every process."""
    import torch

    if processes > 1:
        shared: list[Any] = [todo]
        torch.distributed.broadcast_object_list(shared)
        todo = shared[0]
    return todo


def _to_first(lines: list[dict[str, Any]], rank: int, processes: int) -> list[dict[str, Any]]:
    """The lines of all processes, in the first; none elsewhere."""
    import torch

    if processes == 1:
        return lines
    parts: list[Any] | None = None if rank else [None] * processes
    torch.distributed.gather_object(lines, parts)
    return [line for part in parts or [] for line in part]
=======
    from lit_gpt.evaluation.mt_bench.answers import write_answers

    if written := write_answers(flags):
        path, elapsed_s = written
        print(f"{path}, inference time: {elapsed_s:.1f} s")
>>>>>>> main


if __name__ == "__main__":
    run(main)
