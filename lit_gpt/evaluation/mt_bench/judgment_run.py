"""Judgments of MT-bench's answers, from the files of answers to the file of judgments.

Decisions: what is to be judged and what it costs is said before anything is sent, and at a terminal asked; judgments are
written as they come, so that the same command judges what is left; so many failures in a row end the work.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lit_gpt.cli import Interrupted, warn
from lit_gpt.evaluation.mt_bench.benchmark_files import (
    MODES,
    BenchmarkFiles,
    MtBenchQuestion,
    Turns,
    first_few,
    read_answers,
    read_mt_bench_questions,
)
from lit_gpt.evaluation.mt_bench.judge_client import (
    Judge,
    JudgeError,
    JudgeRefused,
    JudgeReply,
    in_threads,
    is_claude,
)
from lit_gpt.evaluation.mt_bench.judging import (
    CHARACTERS_PER_TOKEN,
    TURNS,
    WITH_REFERENCE,
    JudgePrompt,
    JudgingInputs,
    Match,
    claude_match,
    estimate_cost,
    is_unrated,
    judgment_line,
    line_key,
    make_matches,
    model_groups,
    read_judge_prompts,
    read_judgments,
    system_prompts_hash,
    unjudged_matches,
)
from lit_gpt.evaluation.mt_bench.settings import MtBenchJudgmentFlags
from lit_gpt.evaluation.result_file import EXISTING, ResultFile

# So many failures in a row, or one of each thread, and the server is taken for gone.
_FAILURES_IN_A_ROW = 3
# FastChat's cap for Anthropic's models; OpenAI's have 2048.
_PUBLISHED_CLAUDE_TOKENS = 1024


def write_judgments(flags: MtBenchJudgmentFlags) -> None:
    """Make the matches, say what they cost, ask the judge, write.

    Raises:
        FileNotFoundError, ValueError: anything a user can get wrong, with the remedy; some matches could not be judged.
        Interrupted: by Ctrl-C; the line says how many judgments there are.
    """
    flags = _checked(flags)
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


def _checked(flags: MtBenchJudgmentFlags) -> MtBenchJudgmentFlags:
    """The flags, with the tokens that they come to. Refuses what is wrong with them alone, all of it at once."""
    problems = []
    for name, known in (("mode", MODES), ("turns", TURNS), ("existing", (None, *EXISTING))):
        if getattr(flags, name) not in known:
            problems.append(f"--{name} {getattr(flags, name)}: choose from {', '.join(filter(None, known))}")
    for name in ("parallel", "first_n", "max_tokens"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            problems.append(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if not flags.judge_model:
        problems.append("--judge-model is missing: name the judge")
    if problems:
        raise ValueError("; ".join(problems))
    if not flags.published_claude:
        return flags
    if not is_claude(flags.judge_model):
        warn(f"--published-claude has no effect: {flags.judge_model} is not asked by Anthropic's interface")
        return replace(flags, published_claude=False)
    return replace(flags, max_tokens=_PUBLISHED_CLAUDE_TOKENS)


def _matches(flags: MtBenchJudgmentFlags, bench: BenchmarkFiles) -> tuple[list[Match], dict[str, JudgePrompt]]:
    """All that is to be judged, whether it has been or not; and the judge's prompts."""
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
    matches = make_matches(inputs, grouped)
    return [claude_match(match) for match in matches] if flags.published_claude else matches, prompts


def _check_answers(path: Path, answers: dict[int, Turns], questions: Sequence[MtBenchQuestion]) -> None:
    """Refuse an answer file that lacks some of the questions."""
    missing = [question.question_id for question in questions if question.question_id not in answers]
    if missing:
        raise ValueError(
            f"{path} lacks answers to {len(missing)} of {len(questions)} questions ({first_few(missing)}): run "
            "eval/gen_model_answer.py again, which goes on where it stood, or judge only the --first-n"
        )


def _references(
    flags: MtBenchJudgmentFlags, bench: BenchmarkFiles, questions: Sequence[MtBenchQuestion]
) -> dict[int, Turns]:
    """The reference answers, where a question needs one."""
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


def _say_cost(flags: MtBenchJudgmentFlags, matches: Sequence[Match], todo: Sequence[Match]) -> None:
    """What is to be judged, and what it takes."""
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


def _judge_all(flags: MtBenchJudgmentFlags, judge: Judge, todo: Sequence[Match], judgments: ResultFile) -> None:
    """Ask the judge about every match and write what it says.

    Raises:
        ValueError: some matches could not be judged; the line counts them and has the first reason.
        Interrupted: by Ctrl-C.
    """
    from tqdm import tqdm

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
    keys = {match.key: match for match in todo}
    unrated = [line for line in judgments.results if line_key(line) in keys and is_unrated(line)]
    if unrated:
        first = keys[line_key(unrated[0])]
        warn(f"{len(unrated)} judgments hold no rating (the first: {first}); show_result.py leaves them out")
    if cut:
        warn(f"{len(cut)} judgments were cut by --max-tokens (the first: {cut[0]})")
