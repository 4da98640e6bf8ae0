"""Let a model judge MT-bench answers; gen_model_answer.py comes before, show_result.py after.

    python eval/gen_judgment.py --judge-model gpt-4o-2024-05-13 --dry_run                      what it would send, and how much
    OPENAI_API_KEY=... python eval/gen_judgment.py --parallel 10 --judge-model gpt-4o-2024-05-13
    OPENAI_API_KEY=... python eval/gen_judgment.py --mode pairwise-all --model-list arm mdm --judge-model gpt-4o-2024-05-13
    ANTHROPIC_API_KEY=... python eval/gen_judgment.py --judge-model claude-... --reference-file FILE.jsonl
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python eval/gen_judgment.py --judge-model NAME

It says first how many matches, requests and tokens it is about, and at a terminal asks. Judgments are written as they
come: after Ctrl-C, a kill or a failure the same command judges what is left, and anew what has changed since.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import Interrupted, parse, run, warn

if TYPE_CHECKING:
    from lit_gpt.evaluation.mt_bench.benchmark_files import BenchmarkFiles, MtBenchQuestion, Turns
    from lit_gpt.evaluation.mt_bench.judge_client import Judge, JudgeError
    from lit_gpt.evaluation.mt_bench.judging import JudgePrompt, Match
    from lit_gpt.evaluation.result_file import ResultFile

# So many failures in a row, or one of each thread, and the server is taken for gone.
_FAILURES_IN_A_ROW = 3


@dataclass
class Flags:
    """Flags of the judgments."""

    bench_name: str = "mt_bench"
    """The benchmark's folder in data/."""
    judge_file: str = "data/judge_prompts.jsonl"
    """The judge's prompts."""
    judge_model: str = "gpt-4"
    """Who judges: claude-... by Anthropic's API, any other by OpenAI's or a compatible server's."""
    reference_file: str | None = None
    """Right answers to math, reasoning and coding; by default data/BENCH/reference_answer/JUDGE.jsonl."""
    baseline_model: str = "gpt-3.5-turbo"
    """Whom pairwise-baseline compares with."""
    mode: str = "single"
    """single (rate each answer), pairwise-baseline or pairwise-all (compare two, in both orders)."""
    model_list: list[str] | None = None
    """Models to judge, by the names of their answer files; by default all that there are."""
    turns: str = "auto"
    """first, both, or auto: second turns of models that answered any."""
    parallel: int = 1
    """Requests at once."""
    first_n: int | None = None
    """Judge only the first so many questions."""
    max_tokens: int = 2048
    """Tokens of a judgment; a judge that thinks before it writes needs more."""
    existing: str = "continue"
    """What to do with a judgment file that is there: continue it, refuse, or overwrite it (all models in it)."""
    dry_run: bool = False
    """Say what would be sent, and stop."""
    yes: bool = False
    """Do not ask at a terminal."""


def main() -> None:
    """Make the matches, say what they cost, ask the judge, write."""
    flags = parse(Flags, None, __doc__)
    _check(flags)

    from lit_gpt.evaluation.mt_bench.benchmark_files import BenchmarkFiles
    from lit_gpt.evaluation.mt_bench.judging import line_key, read_judgments, system_prompts_hash, unjudged_matches
    from lit_gpt.evaluation.result_file import ResultFile

    bench = BenchmarkFiles(flags.bench_name)
    matches, prompts = _matches(flags, bench)
    path = bench.judgments(flags.judge_model, flags.mode)
    there = read_judgments(path, flags.mode) if path.exists() and flags.existing != "overwrite" else []
    todo = unjudged_matches(matches, there)
    _say_cost(flags, matches, todo)
    if not todo:
        print(f"all of them are in {path}")
        return
    if flags.dry_run:
        return

    from lit_gpt.evaluation.mt_bench.judge_client import Judge

    judge = Judge(flags.judge_model, flags.max_tokens)
    if sys.stdin.isatty() and not flags.yes:
        _ask()
    settings = {
        "judge": flags.judge_model,
        "max_tokens": flags.max_tokens,
        "temperature": 0,
        "system_prompts": system_prompts_hash(prompts),
    }
    with ResultFile(path, settings, line_key, flags.existing) as judgments:
        _judge_all(flags, judge, unjudged_matches(matches, judgments.results), judgments)
        judgments.sort(lambda line: (*line_key(line)[1:-1], line["question_id"], line["turn"]))


def _check(flags: Flags) -> None:
    """Refuse what is wrong with the flags alone, all of it at once."""
    from lit_gpt.evaluation.mt_bench.benchmark_files import MODES
    from lit_gpt.evaluation.mt_bench.judging import TURNS
    from lit_gpt.evaluation.result_file import EXISTING

    problems = []
    for name, known in (("mode", MODES), ("turns", TURNS), ("existing", EXISTING)):
        if getattr(flags, name) not in known:
            problems.append(f"--{name} {getattr(flags, name)}: choose from {', '.join(known)}")
    for name in ("parallel", "first_n", "max_tokens"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            problems.append(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if not flags.judge_model:
        problems.append("--judge-model is missing: name the judge")
    if problems:
        raise ValueError("; ".join(problems))


def _matches(flags: Flags, bench: BenchmarkFiles) -> tuple[list[Match], dict[str, JudgePrompt]]:
    """All that is to be judged, whether it has been or not; and the judge's prompts."""
    from lit_gpt.evaluation.mt_bench.benchmark_files import read_answers, read_mt_bench_questions
    from lit_gpt.evaluation.mt_bench.judging import JudgingInputs, make_matches, model_groups, read_judge_prompts

    questions = read_mt_bench_questions(bench.questions)[: flags.first_n]
    models = bench.models(flags.model_list)
    grouped = model_groups(flags.mode, models, flags.baseline_model)
    names = bench.models(list(dict.fromkeys(name for group in grouped for name in group)))
    answers = {name: read_answers(bench.answers(name)) for name in names}
    for name, own in answers.items():
        _check_answers(bench.answers(name), own, questions)
    prompts = read_judge_prompts(Path(flags.judge_file))
    inputs = JudgingInputs(questions, answers, prompts, _references(flags, bench, questions), flags.turns)
    without = [name for name in names if not inputs.has_second_turns(name)]
    if flags.turns == "auto" and without:
        print(f"second turns are left out of {', '.join(without)}: no question's second turn is answered")
    return make_matches(inputs, grouped), prompts


def _check_answers(path: Path, answers: dict[int, Turns], questions: Sequence[MtBenchQuestion]) -> None:
    """Refuse an answer file that lacks some of the questions."""
    from lit_gpt.evaluation.mt_bench.benchmark_files import first_few

    missing = [question.question_id for question in questions if question.question_id not in answers]
    if missing:
        raise ValueError(
            f"{path} lacks answers to {len(missing)} of {len(questions)} questions ({first_few(missing)}): run "
            "eval/gen_model_answer.py again, which goes on where it stood, or judge only the --first-n"
        )


def _references(flags: Flags, bench: BenchmarkFiles, questions: Sequence[MtBenchQuestion]) -> dict[int, Turns]:
    """The reference answers, where a question needs one."""
    from lit_gpt.evaluation.mt_bench.benchmark_files import first_few, read_answers
    from lit_gpt.evaluation.mt_bench.judging import WITH_REFERENCE

    path = Path(flags.reference_file) if flags.reference_file else bench.references(flags.judge_model)
    needed = [question.question_id for question in questions if question.category in WITH_REFERENCE]
    if not needed:
        return {}
    if not path.is_file():
        there = ", ".join(str(other) for other in sorted(path.parent.glob("*.jsonl"))) or "none"
        raise FileNotFoundError(
            f"no reference answers {path}, which {', '.join(WITH_REFERENCE)} need: copy another judge's there, or name "
            f"them with --reference-file (there are {there})"
        )
    references = read_answers(path)
    if missing := [number for number in needed if number not in references]:
        raise ValueError(f"{path} lacks {len(missing)} of {len(needed)} reference answers ({first_few(missing)})")
    return references


def _say_cost(flags: Flags, matches: Sequence[Match], todo: Sequence[Match]) -> None:
    """What is to be judged, and what it takes."""
    from lit_gpt.evaluation.mt_bench.judging import CHARACTERS_PER_TOKEN, estimate_cost

    requests, tokens_in, tokens_out = estimate_cost(todo, flags.max_tokens)
    print(
        f"{flags.judge_model}, {flags.mode}: {len(todo)} of {len(matches)} matches to judge, {requests} requests, about "
        f"{tokens_in:,} tokens to send ({CHARACTERS_PER_TOKEN} characters each), at most {tokens_out:,} to get",
        flush=True,
    )


def _ask() -> None:
    """Wait for Enter."""
    try:
        input("Enter goes on, Ctrl-C stops: ")
    except EOFError:
        raise KeyboardInterrupt from None


def _judge_all(flags: Flags, judge: Judge, todo: Sequence[Match], judgments: ResultFile) -> None:
    """Ask the judge about every match and write what it says.

    Raises:
        ValueError: some matches could not be judged; the line counts them and has the first reason.
        Interrupted: by Ctrl-C.
    """
    from tqdm import tqdm

    from lit_gpt.evaluation.mt_bench.judge_client import JudgeError, JudgeRefused, JudgeReply, in_threads
    from lit_gpt.evaluation.mt_bench.judging import judgment_line

    def work(match: Match) -> list[JudgeReply]:
        return [judge(match.prompt.system, text) for text in match.user_prompts]

    failed: list[tuple[Match, JudgeError]] = []
    cut: list[Match] = []
    done = in_a_row = 0
    # Where the bar is no terminal's, a line of it every half minute will do.
    pause_s = 0.1 if sys.stderr.isatty() else 30
    where = f"judgments are in {judgments.path}; the same command goes on"
    try:
        with tqdm(total=len(todo), desc="matches", mininterval=pause_s) as bar:
            for match, outcome in in_threads(work, todo, flags.parallel):
                bar.update()
                if isinstance(outcome, JudgeError):
                    failed.append((match, outcome))
                    in_a_row += 1
                    if in_a_row >= max(_FAILURES_IN_A_ROW, flags.parallel):
                        break
                    continue
                judgments.add(judgment_line(match, flags.judge_model, [reply.text for reply in outcome]))
                done, in_a_row = done + 1, 0
                cut += [match] * any(reply.is_cut for reply in outcome)
    except JudgeRefused as refusal:
        raise ValueError(f"{refusal} ({done} of {len(todo)} {where})") from None
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: {done} of {len(todo)} {where}", signal.SIGINT) from None
    _warn_of_gaps(todo, judgments, cut)
    if failed:
        match, reason = failed[0]
        tried = "" if done + len(failed) == len(todo) else f", {len(todo) - done - len(failed)} were not tried"
        raise ValueError(
            f"{len(failed)} matches could not be judged{tried}; {match}: {reason} ({done} of {len(todo)} {where})"
        )


def _warn_of_gaps(todo: Sequence[Match], judgments: ResultFile, cut: Sequence[Match]) -> None:
    """Name judgments that hold no rating, and those that the limit of tokens cut."""
    from lit_gpt.evaluation.mt_bench.judging import is_unrated, line_key

    keys = {match.key: match for match in todo}
    unrated = [line for line in judgments.results if line_key(line) in keys and is_unrated(line)]
    if unrated:
        first = keys[line_key(unrated[0])]
        warn(f"{len(unrated)} judgments hold no rating (the first: {first}); show_result.py leaves them out")
    if cut:
        warn(f"{len(cut)} judgments were cut by --max-tokens (the first: {cut[0]})")


if __name__ == "__main__":
    run(main)
