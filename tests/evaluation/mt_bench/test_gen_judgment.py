"""`eval/gen_judgment.py` against a judge on this machine: requests, troubles, continuing, and mistakes in one line."""

from __future__ import annotations

import io
import json
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval import gen_judgment
from lit_gpt import cli
from lit_gpt.evaluation.mt_bench.benchmark_files import BenchmarkFiles, answer_line, read_mt_bench_questions
from lit_gpt.evaluation.mt_bench.judge_client import Judge, JudgeError, JudgeRefused, in_threads
from lit_gpt.evaluation.mt_bench.judging import read_judge_prompts, read_judgments
from tests.support.judge_server import KEY, Answer, FakeJudge, openai_error, serve_fake_judge
from tests.support.training_runs import restore_interrupts

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = [sys.executable, str(ROOT / "eval" / "gen_judgment.py")]
SINGLE = Path("data/mt_bench/model_judgment/judge-1_single.jsonl")
PAIR = Path("data/mt_bench/model_judgment/judge-1_pair.jsonl")


@pytest.fixture
def judge(monkeypatch) -> Iterator[FakeJudge]:
    """A judge, and the environment that leads to it."""
    with serve_fake_judge() as fake:
        for provider, path in (("OPENAI", "/v1"), ("ANTHROPIC", "")):
            monkeypatch.setenv(f"{provider}_API_KEY", KEY)
            monkeypatch.setenv(f"{provider}_BASE_URL", fake.url + path)
        yield fake


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project's root with the answers of two models to all questions."""
    shutil.copytree(ROOT / "data" / "mt_bench", tmp_path / "data" / "mt_bench")
    shutil.copy(ROOT / "data" / "judge_prompts.jsonl", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    bench = BenchmarkFiles("mt_bench")
    shutil.copy(bench.references("gpt-4"), bench.references("judge-1"))
    for model in ("arm", "mdm"):
        put_answers(model, f"{model}'s answer to {{}}")
    return tmp_path


def put_answers(model: str, text: str, count: int = 80, second: str = "") -> None:
    """Write an answer file; `{}` in the text is the question's number."""
    bench = BenchmarkFiles("mt_bench")
    lines = [
        answer_line(one, model, [text.format(one.question_id)])
        for one in read_mt_bench_questions(bench.questions)[:count]
    ]
    for line in lines:
        line["choices"][0]["turns"][1] = second
    bench.answers(model).parent.mkdir(exist_ok=True)
    bench.answers(model).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def judging(folder, judge, monkeypatch, capsys):
    """Run the script's main in this process on the first questions: (exit code, stdout, stderr without the bar)."""

    def run(*flags: str, first: int = 3) -> tuple[int, str, str]:
        words = ["--judge-model", "judge-1", "--first-n", str(first), *flags]
        monkeypatch.setattr(sys, "argv", ["gen_judgment.py", *words])
        with pytest.raises(SystemExit) as end:
            cli.run(gen_judgment.main)
        out, err = capsys.readouterr()
        assert KEY not in out + err
        lines = [line for line in re.split(r"[\r\n]+", err) if line and not line.startswith("matches: ")]
        return int(end.value.code or 0), out, "".join(f"{line}\n" for line in lines)

    return run


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def untimed(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "tstamp"} for line in lines_of(path)]


def now_and_then(number: int, body: dict[str, Any]) -> Answer | None:
    """Every third request fails, in one way or another, and may be tried again soon."""
    if number % 3:
        return None
    soon = {"retry-after": "0.02"}
    return ((500, "broken", soon), (429, openai_error("slow down"), soon), (503, "", soon))[number // 3 % 3]


# --- the client -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["judge-1", "claude-judge"])
def test_what_is_sent_and_what_comes_back(judge, model):
    judge.judge = lambda prompt: f"About {prompt}: [[3]]"
    reply = Judge(model, 100)("Be fair.", "naïve?")
    assert (reply.text, reply.is_cut) == ("About naïve?: [[3]]", False)
    (body,), (headers,) = judge.bodies, judge.headers
    assert body["temperature"] == 0 and body["max_tokens"] == 100 and body["model"] == model
    assert any(KEY in value for value in headers.values())
    user = {"role": "user", "content": "naïve?"}
    if model == "judge-1":
        assert body["messages"] == [{"role": "system", "content": "Be fair."}, user]
    else:
        assert body["messages"] == [user] and body["system"] == "Be fair."
    judge.finish = "length"
    assert Judge(model, 100)("a", "b").is_cut


@pytest.mark.parametrize("model", ["judge-1", "claude-judge"])
def test_passing_troubles_are_waited_out(judge, model):
    judge.trouble = now_and_then
    assert {Judge(model, 9)("a", "b").text for _ in range(7)} == {"Good. Rating: [[7]]"}
    assert len(judge.bodies) > 9


def test_the_server_says_how_long_to_wait(judge):
    judge.trouble = lambda number, body: (429, openai_error("slow"), {"retry-after": "1"}) if number == 1 else None
    started = time.monotonic()
    Judge("judge-1", 9)("a", "b")
    assert time.monotonic() - started >= 1.0 and len(judge.bodies) == 2


def test_parameters_that_newer_models_refuse(judge, caplog):
    def trouble(number: int, body: dict[str, Any]) -> Answer | None:
        if "max_tokens" in body:
            text = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
            return 400, openai_error(text, param="max_tokens", code="unsupported_parameter"), {}
        if "temperature" in body:
            text = "Unsupported value: 'temperature' does not support 0 with this model."
            return 400, openai_error(text, param="temperature", code="unsupported_value"), {}
        return None

    judge.trouble = trouble
    asked = Judge("judge-1", 50)
    outcomes = [result for _, result in in_threads(lambda text: asked("s", text), list("abcd"), 4)]
    assert len(outcomes) == 4 and all(result.text for result in outcomes)
    assert judge.bodies[-1]["max_completion_tokens"] == 50 and "temperature" not in judge.bodies[-1]
    assert len(judge.bodies) <= 12
    count = len(judge.bodies)
    asked("s", "e")
    assert len(judge.bodies) == count + 1, "what was learnt is kept"
    said = [record.getMessage() for record in caplog.records if record.name == "lit_gpt"]
    assert len(said) == 2 and "max_completion_tokens" in said[0] and "no temperature 0" in said[1]


REFUSALS = {
    "key": (401, "Incorrect API key provided", {}, JudgeRefused),
    "model": (404, "no such model", {}, JudgeRefused),
    "form": (400, "bad form", {}, JudgeRefused),
    "money": (429, "quota", {"code": "insufficient_quota"}, JudgeRefused),
    "long": (400, "too long", {"code": "context_length_exceeded"}, JudgeError),
    "limit": (429, "slow down", {}, JudgeError),
    "server": (500, "broken", {}, JudgeError),
}


@pytest.mark.parametrize("model", ["judge-1", "claude-judge"])
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_and_failures(judge, name, model):
    status, text, more, kind = REFUSALS[name]
    body = openai_error(f"{text}: {KEY} " + "x" * 900, **more)
    judge.trouble = lambda number, _: (status, body, {"x-should-retry": "false"})
    with pytest.raises(JudgeError) as error:
        Judge(model, 9)("a", "b")
    assert type(error.value) is kind
    assert str(error.value).startswith(f"{model}: the server answered {status}: {text}: [the key] xxx")
    assert len(str(error.value)) < 400 and len(judge.bodies) == 1


def test_a_key_at_the_end_of_a_shortened_reason(judge):
    judge.trouble = lambda number, _: (400, openai_error("y" * 290 + KEY), {})
    with pytest.raises(JudgeRefused) as error:
        Judge("judge-1", 9)("a", "b")
    assert KEY[:6] not in str(error.value)


def test_no_server_and_no_judge_behind_it(judge, monkeypatch):
    for answer in ((200, "hello", {}), (200, "hello", {"content-type": "text/html"}), (200, {"choices": []}, {})):
        judge.trouble = lambda number, _, answer=answer: answer
        with pytest.raises(JudgeError, match="judge-1: the server's answer is not of the judge's interface"):
            Judge("judge-1", 9)("a", "b")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    with pytest.raises(JudgeError, match="judge-1: Connection error. .*refused"):
        Judge("judge-1", 9, retries=0)("a", "b")


def test_keys(judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert Judge("judge-1", 9)("a", "b").text
    for value in ("", "sk-\u2026", "two words", "a\nb"):
        monkeypatch.setenv("OPENAI_API_KEY", value)
        with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
            Judge("judge-1", 9)
        assert not value or value not in str(error.value)
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    with pytest.raises(ValueError, match="no key for the judge claude-1: set ANTHROPIC_API_KEY"):
        Judge("claude-1", 9)


@pytest.mark.parametrize("model, package", [("judge-1", "openai"), ("claude-1", "anthropic")])
def test_a_client_that_is_not_installed(judge, monkeypatch, model, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"through the package {package}: ./setup.sh judge installs it"):
        Judge(model, 9)


def test_threads_work_at_once_and_each_item_once():
    together = threading.Barrier(3, timeout=10)
    found = list(in_threads(lambda item: together.wait() or item, list(range(6)), 3))
    assert sorted(item for item, _ in found) == list(range(6))


def test_a_refusal_stops_after_what_is_finished():
    begun, collected = [], []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise JudgeRefused("no")
        return item

    with pytest.raises(JudgeRefused):
        for item, _ in in_threads(work, list(range(9)), 1):
            collected.append(item)
            time.sleep(0.02)
    assert (begun, collected) == ([0, 1, 2, 3], [0, 1, 2])
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda item: 1 / item, [0], 1))


def test_what_is_finished_at_an_interrupt_is_kept(monkeypatch):
    """Ctrl-C comes while the main thread waits: what other threads have finished by then is passed on first."""
    real, calls = queue.SimpleQueue, []

    class Interrupting(real):
        def get(self):
            calls.append(1)
            if len(calls) == 3:
                while self.qsize() < 4:
                    time.sleep(0.01)
                raise KeyboardInterrupt
            return super().get()

    monkeypatch.setattr(queue, "SimpleQueue", Interrupting)
    collected = []
    with pytest.raises(KeyboardInterrupt):
        for item, _ in in_threads(lambda item: item, list(range(6)), 2):
            collected.append(item)
    assert sorted(collected) == list(range(6))


# --- judging ----------------------------------------------------------------------------------------------------------


def test_single_judgments(judging, judge):
    judge.judge = lambda prompt: "Rating: [[4.5]]" if "arm's" in prompt else "good [[9]]"
    code, out, err = judging("--parallel", "2")
    assert (code, err) == (0, "")
    assert re.search(
        r"judge-1, single: 6 of 6 matches to judge, 6 requests, about [\d,]+ tokens to send .*12,288 to get", out
    )
    assert "second turns are left out of arm, mdm" in out
    found = lines_of(SINGLE)
    assert [(line["model"], line["question_id"], line["score"]) for line in found] == [
        *(("arm", number, 4.5) for number in (81, 82, 83)),
        *(("mdm", number, 9) for number in (81, 82, 83)),
    ]
    assert {line["user_prompt"] for line in found} == {body["messages"][1]["content"] for body in judge.bodies}
    assert {body["max_tokens"] for body in judge.bodies} == {2048}


def test_references_are_shown_to_the_judge(judging, judge):
    assert judging("--model-list", "arm", first=80)[0] == 0
    names = {line["question_id"]: line["judge"] for line in lines_of(SINGLE)}
    assert names[81] == ["judge-1", "single-v1"] and names[111] == ["judge-1", "single-math-v1"]
    with_reference = [body for body in judge.bodies if "Reference Answer" in body["messages"][1]["content"]]
    assert len(with_reference) == 30 and len(names) == 80


def test_pairs_in_both_orders(judging, judge):
    """One who always prefers A makes ties; one who prefers the ARM makes wins."""
    judge.judge = lambda prompt: "[[C]]" if "to 82" in prompt else "[[A]]" if "to 83" in prompt else prefers_arm(prompt)

    def prefers_arm(prompt: str) -> str:
        return "[[A]]" if prompt.index("arm's") < prompt.index("mdm's") else "[[B]]"

    assert judging("--mode", "pairwise-all")[0] == 0
    found = [(line["model_1"], line["model_2"], line["g1_winner"], line["g2_winner"]) for line in lines_of(PAIR)]
    assert found == [
        ("arm", "mdm", "model_1", "model_1"),
        ("arm", "mdm", "tie", "tie"),
        ("arm", "mdm", "model_1", "model_2"),
    ]
    assert len(judge.bodies) == 6
    put_answers("gpt-3.5-turbo", "gpt's answer to {}")
    judge.judge = lambda prompt: "[[B]]"
    code, out, _ = judging("--mode", "pairwise-baseline")
    assert code == 0 and "6 of 6 matches to judge, 12 requests" in out
    found = [(line["model_1"], line["model_2"], line["g1_winner"], line["g2_winner"]) for line in lines_of(PAIR)]
    assert len(found) == 9
    assert found[:3] == [("arm", "gpt-3.5-turbo", "model_2", "model_1")] * 3
    assert found[6:] == [("mdm", "gpt-3.5-turbo", "model_2", "model_1")] * 3
    code, out, _ = judging("--mode", "pairwise-all", "--model-list", "gpt-3.5-turbo", "mdm")
    assert code == 0 and "0 of 3 matches to judge" in out, "the baseline's matches are the same the other way round"


def test_second_turns(judging, judge):
    put_answers("mdm", "mdm's answer", second="mdm's second answer")
    code, out, _ = judging(first=1)
    assert code == 0 and "second turns are left out of arm: " in out
    assert [(line["model"], line["turn"], line["judge"][1]) for line in lines_of(SINGLE)] == [
        ("arm", 1, "single-v1"),
        ("mdm", 1, "single-v1"),
        ("mdm", 2, "single-v1-multi-turn"),
    ]
    code, out, _ = judging("--turns", "both", first=1)
    assert "1 of 4 matches" in out and "left out" not in out
    assert "0 of 2 matches" in judging("--turns", "first", first=1)[1]


def test_threads_change_nothing_but_the_time(judging, judge, folder):
    judge.judge = lambda prompt: f"[[{len(prompt) % 10}]]"
    judge.trouble = now_and_then
    assert judging(first=20)[0] == 0
    alone = untimed(SINGLE)
    assert judge.most_at_once == 1
    judge.delay_s = 0.02
    assert judging("--parallel", "4", "--existing", "overwrite", first=20)[0] == 0
    assert untimed(SINGLE) == alone and len(alone) == 40
    assert judge.most_at_once == 4


def test_only_what_is_new_is_judged(judging, judge):
    assert judging(first=2)[0] == 0
    assert "2 of 6 matches" in judging()[1] and "0 of 6 matches" in judging()[1]
    assert set(judge.answered.values()) == {1} and len(judge.answered) == 6
    put_answers("arm", "arm's better answer to {}")
    code, out, _ = judging()
    assert code == 0 and "3 of 6 matches" in out
    found = lines_of(SINGLE)
    assert len(found) == 6, "the judgments of the old answers are gone"
    assert all("better" in line["user_prompt"] for line in found if line["model"] == "arm")
    code, _, err = judging("--max-tokens", "100", first=4)
    assert code == 2 and "made with other settings (max_tokens 2048 there, 100 here)" in err
    assert judging("--existing", "refuse", first=4)[0] == 2
    assert len(lines_of(SINGLE)) == 6


def test_a_file_of_fastchat_is_continued(judging, judge):
    assert judging()[0] == 0
    SINGLE.with_suffix(".settings.json").unlink()
    SINGLE.write_text("".join(line + "\n" for line in SINGLE.read_text().splitlines()[:4]))
    code, _, err = judging()
    assert code == 2 and "has no judge-1_single.settings.json beside it" in err and len(lines_of(SINGLE)) == 4
    code, out, err = judging("--existing", "continue")
    assert code == 0 and "2 of 6 matches" in out and "they are kept" in err
    assert len(lines_of(SINGLE)) == 6 and set(judge.answered.values()) == {1, 2}


def test_a_dry_run_sends_and_writes_nothing(judging, judge, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    code, out, err = judging("--dry_run")
    assert (code, err) == (0, "") and "6 of 6 matches to judge" in out
    assert not judge.bodies and not SINGLE.parent.exists()


class Typed(io.StringIO):
    """What a user types at a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("typed, flags, code", [("\n", [], 0), ("", [], 130), ("", ["--yes"], 0)])
def test_it_asks_at_a_terminal(judging, judge, monkeypatch, typed, flags, code):
    monkeypatch.setattr(sys, "stdin", Typed(typed))
    assert judging(*flags)[0] == code
    assert len(judge.bodies) == (0 if code else 6) and SINGLE.exists() == (not code)


def test_judgments_without_a_rating(judging, judge):
    judge.judge = lambda prompt: "I cannot." if "arm's answer to 82" in prompt else "Rating: [[3]]"
    code, _, err = judging()
    assert code == 0
    assert err == (
        "warning: 1 judgments hold no rating (the first: question 82, arm, turn 1); show_result.py leaves them out\n"
    )
    assert [line["score"] for line in lines_of(SINGLE)] == [3, -1, 3, 3, 3, 3]
    judge.finish = "length"
    code, _, err = judging("--mode", "pairwise-all")
    assert code == 0 and "3 judgments hold no rating" in err and "3 judgments were cut by --max-tokens" in err
    assert {line["g1_winner"] for line in lines_of(PAIR)} == {"error"}


def test_what_failed_is_said_and_done_by_the_next_run(judging, judge):
    never = {"x-should-retry": "false"}
    judge.trouble = lambda _, body: (500, "broken", never) if "to 82" in body["messages"][1]["content"] else None
    code, _, err = judging()
    assert code == 2
    assert re.fullmatch(
        r"error: 2 matches could not be judged; question 82, arm, turn 1: judge-1: the server answered 500: .*"
        rf"\(4 of 6 judgments are in {SINGLE}; the same command goes on\)\n",
        err,
    )
    assert [line["question_id"] for line in lines_of(SINGLE)] == [81, 83, 81, 83]
    judge.trouble = lambda number, body: None
    code, out, err = judging()
    assert (code, err) == (0, "") and "2 of 6 matches" in out
    assert len(lines_of(SINGLE)) == 6 and set(judge.answered.values()) == {1}


def test_a_server_that_is_gone_is_not_asked_for_everything(judging, judge):
    judge.trouble = lambda number, body: (500, "broken", {"x-should-retry": "false"}) if number > 2 else None
    code, _, err = judging(first=10)
    assert code == 2 and "3 matches could not be judged, 15 were not tried" in err and "(2 of 20 judgments" in err
    # The three failures in a row may reach the script while others are under way, on a busy machine quite some.
    assert 5 <= len(judge.bodies) < 20


def test_failures_here_and_there_do_not_end_the_work(judging, judge):
    """Whose question's number is even."""
    failure = (500, "broken", {"x-should-retry": "false"})
    judge.trouble = lambda _, body: failure if re.search(r"to \d[02468]\n", body["messages"][1]["content"]) else None
    code, _, err = judging(first=10)
    assert code == 2 and "error: 10 matches could not be judged; question 82" in err and "not tried" not in err
    assert [line["question_id"] % 2 for line in lines_of(SINGLE)] == [1] * 10


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_stops_at_once(judging, judge, status):
    judge.trouble = lambda number, body: (status, openai_error(f"not with {KEY}"), {}) if number > 4 else None
    code, _, err = judging("--parallel", "2", first=20)
    assert code == 2
    assert re.fullmatch(
        rf"error: judge-1: the server answered {status}: not with \[the key\] \(\d of 40 judgments .*\n", err
    )
    assert len(judge.bodies) < 10
    # The fourth may have been under way when the fifth was refused.
    assert len(lines_of(SINGLE)) in (3, 4) and len(lines_of(SINGLE)) == int(re.search(r"\((\d) of 40", err)[1])


# --- stopped ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_goes_on(judging, judge, folder, number):
    """A real process, stopped while requests are under way: every judgment that was written is kept."""
    judge.delay_s = 0.1
    judge.judge = lambda prompt: f"[[{len(prompt) % 10}]]"
    words = [*SCRIPT, "--judge-model", "judge-1", "--first-n", "20", "--parallel", "3", "--model-list", "arm"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=restore_interrupts
    )
    limit = time.monotonic() + 30
    while not SINGLE.exists() or SINGLE.read_bytes().count(b"\n") < 4:
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.01)
    judge.delay_s = 60
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)  # it does not wait for answers
    assert KEY not in out + err
    kept = read_judgments(SINGLE, "single")
    assert 4 <= len(kept) < 20
    if number == signal.SIGINT:
        assert process.returncode == 130
        last = err.rstrip().splitlines()[-1]
        assert last == f"interrupted: {len(kept)} of 20 judgments are in {SINGLE}; the same command goes on"
    judge.delay_s = 0
    code, out, _ = judging("--model-list", "arm", first=20)
    assert code == 0 and f"{20 - len(kept)} of 20 matches to judge" in out
    found = lines_of(SINGLE)
    assert len(found) == 20 == len({line["question_id"] for line in found})
    assert [line for line in found if line in kept] == sorted(kept, key=lambda line: line["question_id"])


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "mode": (["--mode", "both"], "--mode both: choose from single, pairwise-baseline, pairwise-all"),
    "numbers": (
        ["--parallel", "0", "--max-tokens", "0"],
        "--parallel 0: expected at least 1; --max-tokens 0: expected",
    ),
    "first": (["--first-n", "0"], "--first-n 0: expected at least 1"),
    "turns": (["--turns", "2"], "--turns 2: choose from auto, first, both"),
    "existing": (["--existing", "keep"], "--existing keep: choose from"),
    "no judge": (["--judge-model", ""], "--judge-model is missing"),
    "bench": (["--bench-name", "other"], "no file data/other/question.jsonl"),
    "model": (["--model-list", "arm", "x"], "no answers of x in data/mt_bench/model_answer: it has arm, mdm"),
    "baseline": (["--mode", "pairwise-baseline"], "no answers of gpt-3.5-turbo in .*: it has arm, mdm"),
    "judge file": (
        ["--judge-file", "nowhere.jsonl"],
        r"no file nowhere.jsonl \(expected one judge prompt in each line",
    ),
    "references": (
        ["--judge-model", "k", "--first-n", "31"],
        "no reference answers .*/k.jsonl, which math, .*--reference-file",
    ),
    "short references": (
        ["--first-n", "80", "--reference-file", "data/mt_bench/model_answer/few.jsonl"],
        r"few.jsonl lacks 30 of 30 reference answers \(101, 102, 103, 104, 105, ...\)",
    ),
    "answers": (
        ["--model-list", "few"],
        r"few.jsonl lacks answers to 1 of 3 questions \(83\): .*gen_model_answer.py again",
    ),
    "two": (["--mode", "pairwise-all", "--model-list", "arm"], "--mode pairwise-all needs two models, found arm"),
    "prompts": (["--judge-file", "few.jsonl"], "the judge's prompts lack single-v1, they are other: see --judge-file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(judging, judge, folder, name):
    if name in ("short references", "answers"):
        put_answers("few", "answer to {}", count=2)
    (folder / "few.jsonl").write_text('{"name": "other", "system_prompt": "", "prompt_template": ""}\n')
    flags, message = MISTAKES[name]
    code, out, err = judging(*(["--model-list", "arm"] if name == "short references" else []), *flags)
    assert code == 2 and not judge.bodies and not SINGLE.exists()
    assert re.fullmatch(f"error: .*{message}.*\n", err), err


def test_malformed_answers_are_named(judging, judge):
    path = BenchmarkFiles("mt_bench").answers("arm")
    path.write_text(path.read_text() + '{"question_id": 81}\n')
    assert judging()[2].startswith(f"error: {path}:81 is no answer ('choices' is missing)")


def test_no_key(judging, judge, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    code, out, err = judging()
    assert code == 2 and err.startswith("error: no key for the judge judge-1: set OPENAI_API_KEY")
    assert "6 of 6 matches to judge" in out and not SINGLE.parent.exists()


def test_a_judge_of_anthropic(judging, judge):
    judge.judge = lambda prompt: "Rating: [[6]]"
    references = str(BenchmarkFiles("mt_bench").references("gpt-4"))
    code, _, err = judging("--judge-model", "claude-judge", "--reference-file", references, first=31)
    assert (code, err) == (0, "")
    found = lines_of(SINGLE.with_name("claude-judge_single.jsonl"))
    assert len(found) == 62 and {line["score"] for line in found} == {6} and found[0]["judge"][0] == "claude-judge"
    assert {"system", "messages", "model", "max_tokens", "temperature"} == set(judge.bodies[0])


def test_a_judge_of_anthropic_as_published(judging, judge):
    """1024 tokens; a pair's instruction stands in the user's message, a single answer's system prompt stays one."""
    words = ("--judge-model", "claude-judge", "--published-claude")
    judge.judge = lambda prompt: "[[6]] [[A]]"
    assert judging(*words, "--dry_run")[1].endswith("at most 6,144 to get\n")
    code, _, err = judging(*words)
    assert (code, err) == (0, "")
    assert {body["max_tokens"] for body in judge.bodies} == {1024}
    assert {body["system"] for body in judge.bodies} == {"You are a helpful assistant."}
    judge.bodies.clear()
    assert judging(*words, "--mode", "pairwise-all")[0] == 0
    prompts = read_judge_prompts(Path("data/judge_prompts.jsonl"))
    assert len(judge.bodies) == 6
    for body in judge.bodies:
        assert "system" not in body and body["max_tokens"] == 1024
        assert body["messages"][0]["content"].startswith(
            f"[Instruction]\n{prompts['pair-v2'].system}\n\n[User Question]"
        )
    assert "0 of 3 matches to judge" in judging(*words, "--mode", "pairwise-all")[1]
    assert "3 of 3 matches to judge" in judging(*words[:2], "--mode", "pairwise-all", "--dry_run")[1]
    code, _, err = judging("--published-claude", "--dry_run")
    assert code == 0 and err == (
        "warning: --published-claude has no effect: judge-1 is not asked by Anthropic's interface\n"
    )
