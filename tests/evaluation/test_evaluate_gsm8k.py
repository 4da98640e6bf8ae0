"""GSM8K's evaluation: what counts as the same answer, the two rounds, and the real script with models that answer."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evaluate_gsm8k import Flags, main
from lit_gpt import cli
from lit_gpt.checkpoints.export import WeightsRecord, export_weights
from lit_gpt.config import Config
from lit_gpt.diffusion import forward_process, masking_probability
from lit_gpt.evaluation.generated_answers import checkpoint_name, wilson_interval
from lit_gpt.evaluation.gsm8k import answer_word_problems, graded_lines
from lit_gpt.evaluation.gsm8k_grading import (
    GRADERS,
    extract_answer,
    is_small_arithmetic,
    normalised,
    published_form,
    same_answer,
)
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.sampling.settings import Sampling
from lit_gpt.tokenizer import Tokenizer
from tests.support.small_models import export_arm_and_mdm
from tests.support.training_runs import kill_after_lines, one_thread_environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "evaluate_gsm8k.py")
# Question, thought, answer.
PROBLEMS = [
    ("Ann has 3 figs and gets 4. How many?", "3 and 4 make 7.", "7"),
    ("Bo had 9 pens and lost 5. How many?", "9 less 5 is 4.", "4"),
    ("Cy sells 6 hats at $2. How much?", "6 by 2 is $12.", "12"),
    ("Di walks 10 miles, 2 a day. How long?", "10 by 2 is 5.", "5"),
]
LENGTH = 64


# --- what is an answer, and when two are the same ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Question: 2+2? Answer: four. #### 4", "4"),
        ("Answer: a #### 4\n", "4"),
        ("#### 4\nand then more\n", "4"),
        ("#### 4\n#### 5\nx #### $6.\nend", "$6."),
        ("#### 4 #### 5", "4 #### 5"),
        ("#### ", ""),
        ("####4", None),
        ("##### 4", "4"),
        ("", None),
        ("no answer", None),
    ],
)
def test_the_last_answer_of_a_text(text, found):
    assert extract_answer(text) == found


SAME = ["18", "18.", " 18 ", "18.0", "$18", "$18.00", "x=18", "3*6=18", "36/2", "\\frac{36}{2}", "(18)", "2*9", "3^2*2"]
SAME += ["20 - 2", "+18", "018", "3**2 + 9", "\\sqrt{324}", "18\r", "180 / 10.", "2 \\times 9"]


@pytest.mark.parametrize("given", SAME)
def test_the_same_number(given):
    assert same_answer(given, "18") and same_answer("18", given)


OTHER = ["", "7", "-18", "18.5", "1,8", "18 apples", "7 or 18", "18 %", "18 18", "1 8", "18%5", "18\\%", "18-", "(18"]
OTHER += ["1/0", "0/0", "()", "^", "eighteen", "#### 18", "18\x00", "$", "\\frac", "{", "1.8.0", "١٨", "18e0", "180"]


@pytest.mark.parametrize("given", OTHER)
def test_another_number_or_none(given):
    assert not same_answer(given, "18") and not same_answer("18", given)


@pytest.mark.parametrize(
    ("given", "target", "same"),
    [
        ("1/2", "0.5", True),
        (".5", "1/2", True),
        ("1,000", "1000", True),
        ("$1,234,567.50", "1234567.5", True),
        ("1,00", "100", False),
        ("1,0000", "10000", False),
        ("-$5", "-5", True),
        ("- 10", "-10", True),
        ("10", "-10", False),
        ("3 1/2", "3.5", False),
        ("3 1/2", "2", False),
        ("2 9", "18", False),
        ("50%", "50", False),
        ("0.333333", "1/3", True),
        ("0.33", "1/3", False),
        ("two words", "two  words.", True),
        ("99^99", "99**99", True),
        ("9^99", "9^98", False),
    ],
)
def test_pairs_of_answers(given, target, same):
    assert same_answer(given, target) is same


ENDLESS = ["9**9**9**9", "9^9^9^9", "9^{9^{9^9}}", "((9^99)^99)^99", "9^999999999", "9^(99999999)", "9^9.9", "9^{-999}"]
ENDLESS += [
    "(" * 50,
    "(" * 500 + "1" + ")" * 500,
    "1" * 100_000,
    "1" * 59 + "x",
    "1 " * 40_000,
    "-" * 10_000,
    "9!!!!!!!!",
]
ENDLESS += ["\\sqrt{1+\\sqrt{2+\\sqrt{3+\\sqrt{5}}}}", "\\frac" * 5000, "1,000" * 20_000, "99999999^99^99", "2^" * 20]


@pytest.mark.parametrize("given", ENDLESS, ids=lambda text: text[:12])
def test_no_answer_takes_long(given):
    same_answer("1/2", "0.5")  # loads the library
    start = time.process_time()  # of this process: a busy machine changes nothing
    assert not same_answer(given, "7") and not is_small_arithmetic(normalised(given))
    assert time.process_time() - start < 5


def test_what_is_worked_out_takes_no_time_either():
    texts = ["-" * 60, "99^99*" + "9" * 54, "((9^{-99}))/7/\\frac{1}{99}", "1/3+" * 14 + "1", "\\frac" * 12]
    start = time.process_time()
    for text in texts:
        assert is_small_arithmetic(text) and not same_answer(text, "7")
    assert time.process_time() - start < 5


ENDLESS_TEXTS = [
    "\\boxed{" * 300,
    "$" * 1999,
    "\\text{" * 300,
    "a" * 1999,
    "1,000" * 390,
    "=" * 100_000,
    "\\boxed{" * 10_000,
]


@pytest.mark.parametrize("given", [*ENDLESS, *ENDLESS_TEXTS], ids=lambda text: text[:12])
def test_no_text_takes_long_to_normalise(given):
    start = time.process_time()
    assert published_form(given) != "7" and not GRADERS["published"](given, "7") and not GRADERS["default"](given, "7")
    assert time.process_time() - start < 5


VERDICTS = json.loads((Path(__file__).parent / "gsm8k_verdicts.json").read_text(encoding="utf-8"))


def test_there_are_enough_verdicts():
    pairs = [tuple(pair) for group in VERDICTS for pair in group["pairs"]]
    assert len(pairs) == len(set(pairs)) >= 400


@pytest.mark.parametrize("grader", list(GRADERS))
@pytest.mark.parametrize("group", VERDICTS, ids=lambda group: group["reason"])
def test_verdicts(group, grader):
    """Pairs of an answer and a target, whose verdicts were reasoned out by hand, with the reason."""
    found = {answer: GRADERS[grader](answer, target) for answer, target in group["pairs"]}
    assert found == dict.fromkeys(found, group[grader])


@pytest.mark.parametrize(
    ("form", "default", "published"),
    [
        ("{}", 1319, 1319),
        ("${}", 1319, 1319),
        ("\\boxed{{{}}}", 1319, 1319),
        ("x = {} dollars", 1319, 1319),
        ("{}.", 1319, 0),
        ("{}.00", 1319, 0),
        ("{}%", 0, 0),
    ],
)
def test_the_bundled_solutions(form, default, published):
    """How many of the test set's own answers, written in some form, each rule takes for right."""
    lines = (ROOT / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    pairs = Counter((form.format(extract_answer(row["answer"])), row["target"]) for row in rows)
    counts = {name: sum(n * rule(*pair) for pair, n in pairs.items()) for name, rule in GRADERS.items()}
    assert counts == {"default": default, "published": published}


def test_both_shares_come_before_the_chosen_one():
    """Also for a file that an older version wrote, whose verdicts were those of its own rule."""
    given = ["7", "7.0", "x=7", None, "8"]
    answers = [{"answer": answer, "target": "7", "correct": False} for answer in given]
    lines = graded_lines("published", answers)
    assert [line.split(":")[0:2] for line in lines[:2]] == [
        ["grader default", " 3 of 5 right"],
        ["grader published", " 2 of 5 right"],
    ]
    assert lines[2:] == ["Acc: 0.4"] and graded_lines("default", answers)[2:] == ["Acc: 0.6"]


@pytest.mark.parametrize(("right", "count"), [(0, 10), (5, 10), (10, 10), (770, 1319)])
def test_the_confidence_interval(right, count):
    """Its ends are the shares whose own normal interval just reaches what was seen."""
    low, high = wilson_interval(right, count)
    for end in (low, high):
        assert abs(right / count - end) == pytest.approx(
            1.959964 * math.sqrt(end * (1 - end) / count), rel=1e-5, abs=1e-7
        )
    assert low - 1e-9 <= right / count <= high + 1e-9 and (low, high) != (right / count,) * 2
    assert (low < 1e-9) == (right == 0) and (high > 1 - 1e-9) == (right == count)


def test_names_of_checkpoints():
    assert checkpoint_name("models/mdm-1028M-3300e18-rsl-0.01.safetensors") == "mdm-1028M-3300e18-rsl-0.01"
    assert checkpoint_name("workdir/finetune/mdm-sharegpt-6M-cfg=0.0/") == "mdm-sharegpt-6M-cfg=0.0"
    assert checkpoint_name("workdir/run-1.0/iter-000100-ckpt.pth") == "run-1.0-iter-000100-ckpt"
    # From within the run's folder, too.
    assert checkpoint_name(".") == Path.cwd().name
    assert checkpoint_name("iter-000100-ckpt.pth") == f"{Path.cwd().name}-iter-000100-ckpt"


# --- the rounds -------------------------------------------------------------------------------------------------------


class Scripted:
    """An answerer whose tokens are characters; each prompt's continuation is laid down, None where there is no room."""

    def __init__(self, kind: str, script: dict[str, str | None]) -> None:
        self.kind, self.script = kind, script
        self.tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids[1:])))
        self.calls: list[tuple[list[str], list[int], float]] = []

    def prompt_ids(self, text):
        return [1, *map(ord, text)]

    def complete(self, prompts, rows, sampling, length):
        texts = [self.tokenizer.decode(ids) for ids in prompts]
        self.calls.append((texts, list(rows), sampling.cfg_scale))
        said = [self.script[text] for text in texts]
        return [None if more is None else ids + list(map(ord, more)) for ids, more in zip(prompts, said, strict=True)]


def asked(kind, script):
    answerer = Scripted(kind, script)
    questions = [{"index": 3, "question": "a", "target": "4"}, {"index": 7, "question": "b", "target": "5"}]
    rounds = [Sampling(cfg_scale=0.1), Sampling(cfg_scale=0.2)]
    return answerer.calls, answer_word_problems(answerer, rounds, 64, questions)


def test_an_mdm_is_asked_twice():
    script = {
        "Question: a": " #### 9\n",
        "Question: b": " x",
        "Question: a #### 9\n": "#### 4",
        "Question: b x": "####",
    }
    calls, answers = asked("mdm", script)
    assert calls == [
        (["Question: a", "Question: b"], [6, 14], 0.1),
        (["Question: a #### 9\n", "Question: b x"], [7, 15], 0.2),
    ]
    assert [(one["answer"], one["correct"]) for one in answers] == [("4", True), (None, False)]
    assert answers[0] == {
        "index": 3,
        "question": "a",
        "target": "4",
        "text": "Question: a #### 9\n#### 4",
        "answer": "4",
        "correct": True,
        "correct_published": True,
    }


def test_an_arm_is_asked_again_only_for_a_missing_answer():
    script = {"Question: a": " #### 4", "Question: b": " x", "Question: b x": " #### 5"}
    calls, answers = asked("arm", script)
    assert calls[1][:2] == (["Question: b x"], [15])
    assert [one["correct"] for one in answers] == [True, True]


def test_where_there_is_no_room():
    """A question that fills the context has no text; a first text that does stands as it is."""
    script = {"Question: a": " #### 4", "Question: a #### 4": None, "Question: b": None}
    for kind in ("mdm", "arm"):
        calls, answers = asked(kind, script)
        assert [one["text"] for one in answers] == ["Question: a #### 4", ""]
        assert [one["correct"] for one in answers] == [True, False]
        assert calls[1][0] == (["Question: a #### 4"] if kind == "mdm" else [])


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An ARM and an MDM with random weights, and the questions."""
    folder = tmp_path_factory.mktemp("gsm8k")
    export_arm_and_mdm(folder, block_size=96, embedding_scale=4.0)
    (folder / "test.jsonl").write_text(
        "".join(
            json.dumps({"question": question, "answer": "", "target": target}) + "\n"
            for question, _, target in PROBLEMS
        )
    )
    return folder


@pytest.fixture(scope="module")
def learnt(folder) -> None:
    """A small MDM that learns PROBLEMS by heart, both rounds; the second one's prompt is one text here, as it is asked."""
    tokenizer = Tokenizer(folder / "tokenizer")

    def ids_of(text: str) -> list[int]:
        return [tokenizer.bos_id, *tokenizer.encode_ids(text)]

    examples = []
    for question, thought, target in PROBLEMS:
        examples.append((ids_of(f"Question: {question}"), ids_of(f"Answer: {thought}")))
        end = [*ids_of(f"#### {target}\n"), tokenizer.eos_id]
        examples.append((ids_of(f"Question: {question} Answer: {thought}"), end))
    rows = [(prompt + response + [tokenizer.eos_id] * LENGTH)[:LENGTH] for prompt, response in examples]
    input_ids = torch.tensor(rows)
    maskable = torch.tensor([[column >= len(prompt) for column in range(LENGTH)] for prompt, _ in examples])
    model = TransEncoder(Config("learnt", 2, 2, 64, 128, 2, block_size=LENGTH, vocab_size=500))
    model.init_weights(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    steps = 500
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        t = (torch.randperm(len(rows), generator=generator) + torch.rand(len(rows), generator=generator)) / len(rows)
        uniforms = torch.rand(input_ids.shape, generator=generator)
        noisy, mask = forward_process(input_ids, masking_probability(t), uniforms, model.config.mask_id, maskable)
        loss = torch.nn.functional.cross_entropy(model(noisy)[mask], input_ids[mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    record = WeightsRecord("mdm", model.config, {"source": str(folder / "tokenizer")})
    export_weights(folder, "learnt", model.state_dict(), record)


@pytest.fixture
def evaluating(folder, monkeypatch, capsys):
    """Run the script's main in this process: (exit code, stdout, stderr)."""

    def run(model: str, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate_gsm8k.py", *flags_of(folder, model, *flags)])
        with pytest.raises(SystemExit) as end:
            cli.run(main)
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


def flags_of(folder: Path, model: str, *flags: str) -> list[str]:
    path = folder / ("learnt.safetensors" if model == "learnt" else f"{model}/tiny.safetensors")
    return ["--ckpt_path", str(path), "--data", str(folder / "test.jsonl"), "--length", str(LENGTH), *flags]


def answers_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_model_that_answers_is_right(folder, learnt, evaluating, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = evaluating("learnt")
    assert code == 0 and out.splitlines()[-1] == "Acc: 1.0"
    answers = answers_of(tmp_path / "out" / "gsm8k" / "learnt.jsonl")
    assert [one["text"] for one in answers] == [
        f"Question: {question} Answer: {thought} #### {target}\n" for question, thought, target in PROBLEMS
    ]
    # One target is another number, another one the same in other words.
    changed = tmp_path / "changed.jsonl"
    text = (folder / "test.jsonl").read_text().replace('"7"', '"8"').replace('"12"', '"$12.00"')
    changed.write_text(text)
    code, out, _ = evaluating("learnt", "--data", str(changed), "--output", "other.jsonl")
    assert code == 0
    assert out.splitlines() == [
        "answers: other.jsonl",
        "grader default: 3 of 4 right: 75.0%, 95 % confidence interval 30.1% to 95.4%",
        "grader published: 2 of 4 right: 50.0%, 95 % confidence interval 15.0% to 85.0%",
        "Acc: 0.75",
    ]
    code, out, _ = evaluating("learnt", "--data", str(changed), "--output", "other.jsonl", "--grader", "published")
    assert code == 0 and "4 of 4 questions were answered already" in out and out.splitlines()[-1] == "Acc: 0.5"
    assert [one["correct"] for one in answers_of(tmp_path / "other.jsonl")] == [False, True, True, True]


@pytest.mark.parametrize("model", ["arm", "mdm"])
def test_the_batch_changes_nothing_and_a_look_is_continued(model, evaluating, tmp_path):
    files = [tmp_path / f"{size}.jsonl" for size in (1, 3, 64)]
    for file in files:
        words = ("--output", str(file), "--steps", "8", "--temperature", "1", "--batch_size", file.stem)
        if file.stem == "3":
            assert evaluating(model, *words, "--limit", "2")[0] == 0
            assert len(answers_of(file)) == 2
        code, out, _ = evaluating(model, *words)
        assert code == 0 and re.fullmatch(r"Acc: [01]\.\d+", out.splitlines()[-1])
        assert ("2 of 4 questions were answered already" in out) == (file.stem == "3")
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()
    answers = answers_of(files[0])
    assert [one["index"] for one in answers] == [0, 1, 2, 3]
    assert all(one["text"].startswith(f"Question: {one['question']}") for one in answers)
    # All is answered: nothing is computed, and a look at the first two counts only them.
    code, out, _ = evaluating(model, *words, "--limit", "2")
    assert "0 of 2 right" in out and len(answers_of(files[2])) == 4
    # The seed and the arithmetic decide.
    for name, value in (("seed", "5"), ("dtype", "bfloat16")):
        other = tmp_path / f"{name}.jsonl"
        assert evaluating(model, *words, f"--{name}", value, "--output", str(other))[0] == 0
        assert [one["text"] for one in answers_of(other)] != [one["text"] for one in answers]


def test_two_processes_write_the_same_file(folder, evaluating, tmp_path):
    """Of five questions, two at once: both have a share of the first four, one alone the last."""
    (tmp_path / "more.jsonl").write_text((folder / "test.jsonl").read_text() * 2)
    words = ("--data", str(tmp_path / "more.jsonl"), "--limit", "5", "--batch_size", "2", "--steps", "8", "--output")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    done = subprocess.run(
        [*launch, *flags_of(folder, "mdm", *words, str(tmp_path / "two.jsonl"))],
        capture_output=True,
        text=True,
        env=one_thread_environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Acc: 0.0" and done.stdout.count("Acc:") == 1
    assert evaluating("mdm", *words, str(tmp_path / "one.jsonl"))[0] == 0
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_a_killed_evaluation_goes_on(folder, evaluating, tmp_path):
    (tmp_path / "many.jsonl").write_text((folder / "test.jsonl").read_text() * 10)
    words = ("--data", str(tmp_path / "many.jsonl"), "--batch_size", "1", "--steps", "30", "--output")
    broken, whole = tmp_path / "broken.jsonl", tmp_path / "whole.jsonl"
    command = [sys.executable, SCRIPT, *flags_of(folder, "mdm", *words, str(broken))]
    kill_after_lines(command, broken, 3)
    there = broken.read_bytes()
    assert 3 <= there.count(b"\n") < 40
    # A kill may tear a line.
    broken.write_bytes(there[:-5])
    code, out, _ = evaluating("mdm", *words, str(broken))
    assert code == 0 and "of 40 questions were answered already" in out
    assert evaluating("mdm", *words, str(whole))[0] == 0
    assert broken.read_bytes() == whole.read_bytes()


def test_answers_of_other_settings_are_not_mixed(evaluating, tmp_path):
    words = ("--steps", "2", "--limit", "1", "--output", str(tmp_path / "a.jsonl"))
    assert evaluating("mdm", *words)[0] == 0
    for changed in (("--cfg2", "0.5"), ("--temperature", "0"), ("--seed", "1"), ("--length", "60"), ("--steps", "3")):
        code, out, err = evaluating("mdm", *words, *changed)
        assert (code, out) == (2, "")
        name, value = changed[0].removeprefix("--"), float(changed[1])
        assert re.fullmatch(
            rf"error: .*a.jsonl was made with other settings \({name} .* there, ({value}|{value:g}) here.*\n", err
        )
    code, _, err = evaluating("arm", *words)
    assert code == 2 and re.search(r"checkpoint \w{64} there, \w{64} here; .*kind mdm there, arm here", err)
    assert evaluating("mdm", *words, "--algorithm", "greddy", "--cfg1", "0.1")[0] == 0, "the same in other words"
    code, _, err = evaluating("mdm", *words, "--dtype", "bfloat16")
    assert code == 2 and "(dtype float32 there, bfloat16 here)" in err
    assert "exists" in evaluating("mdm", *words, "--existing", "refuse")[2]
    code, out, _ = evaluating("mdm", *words, "--seed", "1", "--existing", "overwrite")
    assert code == 0 and "already" not in out
    (tmp_path / "data.jsonl").write_text(GOOD)
    code, _, err = evaluating("mdm", *words, "--seed", "1", "--data", str(tmp_path / "data.jsonl"))
    assert code == 2 and re.search(r"\(data \w+ there, \w+ here\)", err)


def test_the_published_settings(folder, evaluating, tmp_path, monkeypatch):
    seen = []

    def sample(model, prompts, sampling, length, stop_id, rows):
        in_bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        seen.append((sampling, length, stop_id, in_bfloat16))
        return [torch.tensor([*prompt, 70]) for prompt in prompts]

    monkeypatch.setattr("lit_gpt.checkpoints.loaded.sample", sample)
    eos_id = Tokenizer(folder / "tokenizer").eos_id
    for model, scales in (("mdm", (0.1, 0.1)), ("arm", (0.0, 0.0))):
        assert evaluating(model, "--output", str(tmp_path / f"{model}.jsonl"))[0] == 0
        published = Sampling("greddy", steps=256, temperature=0.1, seed=1234)
        assert seen == [(replace(published, cfg_scale=scale), LENGTH, eos_id, False) for scale in scales]
        seen.clear()
    words = ("--cfg1", "0.3", "--cfg2", "0.4", "--dtype", "bfloat16", "--output", str(tmp_path / "other.jsonl"))
    assert evaluating("mdm", *words)[0] == 0
    assert [(sampling.cfg_scale, in_bfloat16) for sampling, _, _, in_bfloat16 in seen] == [(0.3, True), (0.4, True)]
    assert Flags().length == 256 and Flags().data == "data/gsm8k/test.jsonl"


def test_a_batch_that_does_not_fit_is_halved(evaluating, tmp_path, monkeypatch):
    """A device with room for one row: the same answers."""
    assert evaluating("mdm", "--steps", "4", "--output", str(tmp_path / "whole.jsonl"))[0] == 0
    from lit_gpt.checkpoints import loaded

    whole, rows = loaded.sample, []

    def sample(model, prompts, *rest):
        rows.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(model, prompts, *rest)

    monkeypatch.setattr("lit_gpt.checkpoints.loaded.sample", sample)
    assert evaluating("mdm", "--steps", "4", "--output", str(tmp_path / "halves.jsonl"))[0] == 0
    assert rows[:6] == [4, 2, 1, 1, 1, 1]
    assert answers_of(tmp_path / "halves.jsonl") == answers_of(tmp_path / "whole.jsonl")


def test_a_row_that_does_not_fit_is_one_line(evaluating, tmp_path, monkeypatch):
    def sample(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lit_gpt.checkpoints.loaded.sample", sample)
    code, _, err = evaluating("mdm", "--output", str(tmp_path / "a.jsonl"))
    assert code == 2
    assert err.splitlines()[-1] == f"error: a row of {LENGTH} tokens does not fit into the memory of cpu"


def test_flags_that_an_arm_has_no_use_for(evaluating, tmp_path):
    words = ("--limit", "1", "--output", str(tmp_path / "a.jsonl"))
    code, _, err = evaluating("arm", *words, "--cfg1", "0", "--steps", "5")
    assert code == 0 and "warning: --steps has no effect: this checkpoint is an ARM\n" in err
    assert "cfg" not in err and "algorithm" not in err
    code, _, err = evaluating("arm", *words, "--cfg2", "0.1")
    assert (code, err) == (2, "error: --cfg2 0.1 needs an MDM, and this checkpoint is an ARM: leave it out\n")


def test_questions_without_room_are_named(folder, evaluating, tmp_path):
    """One that fills the context to the last token, and one that is longer."""
    tokenizer, path = Tokenizer(folder / "tokenizer"), tmp_path / "a.jsonl"
    lengths = [len(tokenizer.encode_ids(f"Question: {question}")) + 1 for question, _, _ in PROBLEMS]
    length = sorted(lengths)[2]
    assert sorted(lengths)[1] < length < max(lengths)
    code, out, err = evaluating("mdm", "--length", str(length), "--output", str(path))
    assert code == 0 and out.splitlines()[-1] == "Acc: 0.0"
    assert f"warning: 2 of 4 questions leave no room in --length {length}: they count as wrong\n" in err
    assert [one["text"] == "" for one in answers_of(path)] == [own >= length for own in lengths]


def test_half_a_surrogate_pair_in_a_question(evaluating, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"question": "a\\ud800b", "target": "1"}\n')
    words = ("--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "a.jsonl"), "--steps", "2")
    assert evaluating("mdm", *words)[0] == 0
    assert answers_of(tmp_path / "a.jsonl")[0]["question"] == "a\ufffdb"


GOOD = '{"question": "a", "target": "1"}\n'
MISTAKES = {
    "no checkpoint": (["--ckpt_path", ""], "--ckpt_path is missing"),
    "missing": (["--ckpt_path", "nowhere/a.safetensors"], "no checkpoint nowhere/a.safetensors"),
    "size": (["--model", "170"], "holds tiny, Diff_LLaMA_170M was asked for"),
    "counts": (["--steps", "0", "--limit", "-1"], "--steps 0: expected at least 1; --limit -1: expected at least 1"),
    "length": (["--length", "256"], "--length 256: this model reads at most 96 tokens, prompt included; lower it"),
    "temperature": (["--temperature", "-1"], r"temperature is -1.0: it must be a number from 0 up"),
    "guidance": (["--cfg1", "-1"], "cfg_scale is -1.0"),
    "algorithm": (["--algorithm", "best"], "unknown sampling algorithm 'best'"),
    "grader": (["--grader", "fair"], "--grader fair: choose from default, published"),
    "existing": (["--existing", "keep"], "--existing keep: choose from continue, refuse, overwrite"),
    "output": (["--output", "a.json"], r"--output a.json: expected a file that ends in .jsonl"),
    "dtype": (["--dtype", "float16"], "dtype float16: choose from"),
    "flag": (["--stepz", "3"], "stepz"),
    "no data": (
        ["--data", "nowhere.jsonl"],
        "no questions nowhere.jsonl: GSM8K's are data/gsm8k/test.jsonl in this project",
    ),
}
BAD_DATA = {
    "json": (GOOD + "{", r"data.jsonl:2 is not JSON .*: expected {\"question\": text, \"target\": text}"),
    "utf-8": (GOOD + "\udcff\n", r"data.jsonl:2 is not JSON"),
    "list": ("[1]\n", r"data.jsonl:1 holds a JSON list: expected"),
    "field": ("\n" + GOOD + '{"question": "a", "answer": "1"}\n', r"data.jsonl:3 has no text in target \(found only ques.*\)"),
    "long": (f'{{"{"a" * 20000}": 1}}\n', r"data.jsonl:1 has no text in question \(found only a{55}\)"),
    "number": ('{"question": "a", "target": 1}\n', r"data.jsonl:1 has no text in target \(found 1\)"),
    "blank": ('{"question": " ", "target": "1"}\n', r"data.jsonl:1 has no text in question \(found \" \"\)"),
    "empty": ("\n", "data.jsonl holds no question"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*MISTAKES, *(f"data: {name}" for name in BAD_DATA)])
def test_mistakes_are_one_line(evaluating, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in MISTAKES:
        flags, message = MISTAKES[name]
    else:
        text, message = BAD_DATA[name.removeprefix("data: ")]
        (tmp_path / "data.jsonl").write_text(text, errors="surrogateescape")
        flags = ["--data", "data.jsonl"]
    code, out, err = evaluating("mdm", *flags)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: .*{message}.*\n", err), err
    assert not (tmp_path / "out").exists()
