"""MT-bench's files and tables: what is read and refused, answers of real models, numbers by hand, the picture."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval import gen_model_answer, show_result
from lit_gpt import cli
from lit_gpt.checkpoints.loaded import load_model
from lit_gpt.data.sft_formats import CHAT_TEMPLATE
from lit_gpt.evaluation.mt_bench.benchmark_files import (
    BenchmarkFiles,
    MtBenchQuestion,
    answer_line,
    read_answers,
    read_json_lines,
    read_mt_bench_questions,
)
from lit_gpt.evaluation.mt_bench.tables import (
    PairwiseRecord,
    aligned_table,
    by_category,
    model_ratings,
    pairwise_records,
)
from lit_gpt.sampling.sample import sample
from lit_gpt.sampling.settings import Sampling
from lit_gpt.ui.plots import plot_radar
from tests.support.small_models import export_arm_and_mdm
from tests.support.training_runs import restore_interrupts

ROOT = Path(__file__).resolve().parents[3]
BENCH = BenchmarkFiles("mt_bench", ROOT / "data")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """An ARM and an MDM with random weights that read 512 tokens."""
    return {
        kind: str(path) for kind, path in export_arm_and_mdm(tmp_path_factory.mktemp("models"), block_size=512).items()
    }


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A project's root with the questions."""
    (tmp_path / "data" / "mt_bench").mkdir(parents=True)
    shutil.copy(BENCH.questions, tmp_path / "data" / "mt_bench")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script's main in this process: (exit code, stdout, stderr)."""

    def run(module: Any, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags])
        with pytest.raises(SystemExit) as end:
            cli.run(module.main)
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


def lines_of(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def write(path: Path, lines: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_questions_and_references_that_come_with_the_code():
    questions = read_mt_bench_questions(BENCH.questions)
    assert [question.question_id for question in questions] == list(range(81, 161))
    assert {len(question.turns) for question in questions} == {2}
    assert len({question.category for question in questions}) == 8
    assert (
        questions[:2] == read_mt_bench_questions(BENCH.questions, 0, 2)
        and read_mt_bench_questions(BENCH.questions, 79) == questions[79:]
    )
    needed = {one.question_id for one in questions if one.category in ("math", "reasoning", "coding")}
    for judge in ("gpt-4", "gpt-4o-2024-05-13"):
        assert needed <= read_answers(BENCH.references(judge)).keys()


@pytest.mark.parametrize("begin, end", [(80, None), (-1, None), (5, 5), (0, 81), (3, 2)])
def test_a_range_outside_the_questions(begin, end):
    with pytest.raises(
        ValueError, match=f"--question-begin {begin} .*has 80 questions, expected 0 <= begin < end <= 80"
    ):
        read_mt_bench_questions(BENCH.questions, begin, end)


GOOD = {"question_id": 1, "category": "c", "turns": ["a"]}


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"question_id": 1', r"is no question \(Expecting"),
        ('{"question_id": 1, "category": "c"}', r"is no question \('turns' is missing\)"),
        ('["a"]', "is no question"),
        ('{"question_id": "one", "category": "c", "turns": ["a"]}', "question_id 'one', expected a whole number"),
        (
            '{"question_id": "%s", "category": "c", "turns": []}' % ("o" * 9999),
            r"question_id 'o{12}\.\.\.o{13}', expected",
        ),
        ('{"question_id": 2, "category": "c", "turns": []}', r"turns \[\], expected a list of texts"),
        ('{"question_id": 2, "category": "c", "turns": ["\\ud800"]}', "surrogates not allowed"),
        ("\udc80", "is no question"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, reason):
    path = tmp_path / "question.jsonl"
    path.write_bytes((json.dumps(GOOD) + "\n\n" + line).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"question.jsonl:3 {reason}|question.jsonl:3 .*{reason}"):
        read_mt_bench_questions(path)


def test_a_question_that_comes_twice(tmp_path):
    with pytest.raises(ValueError, match="has the question_id 1 twice"):
        read_mt_bench_questions(write(tmp_path / "question.jsonl", [GOOD, GOOD]))


def test_a_torn_end_is_passed_over_only_where_it_may_be(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert read_json_lines(path, "thing", lambda line: line["a"]) == [1, 2], "a last line need not end"
    path.write_text('{"a": 1}\n{"a": ')
    assert read_json_lines(path, "thing", lambda line: line["a"], may_be_torn=True) == [1]
    with pytest.raises(ValueError, match="a.jsonl:2 is no thing"):
        read_json_lines(path, "thing", lambda line: line["a"])
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match="a.jsonl:2 is no thing"):
        read_json_lines(path, "thing", lambda line: line["a"], may_be_torn=True)


def test_the_last_answer_counts_and_its_first_choice(tmp_path):
    question = MtBenchQuestion(7, "math", ("what?", "why?"))
    lines = [answer_line(question, "m", texts) for texts in (["old"], ["new", "other"])]
    assert read_answers(write(tmp_path / "m.jsonl", lines)) == {7: ("new", "")}
    assert list(lines[1]) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert lines[1]["choices"] == [{"index": 0, "turns": ["new", ""]}, {"index": 1, "turns": ["other", ""]}]
    assert lines[0]["answer_id"] != lines[1]["answer_id"]


def test_names_are_those_of_files(tmp_path):
    bench = BenchmarkFiles("b", tmp_path)
    with pytest.raises(FileNotFoundError, match="no answers in .*gen_model_answer"):
        bench.models()
    for name in ("b", "a-1.5"):
        write(bench.answers(name), [])
    (tmp_path / "b" / "model_answer" / "a-1.5.settings.json").touch()
    assert bench.models() == ["a-1.5", "b"] and bench.models(["b", "b"]) == ["b"]
    with pytest.raises(FileNotFoundError, match="no answers of c, d in .*: it has a-1.5, b"):
        bench.models(["c", "b", "d"])
    assert bench.judgments("meta/j", "single").name == "meta_j_single.jsonl"
    assert bench.judgments("j", "pairwise-all") == bench.judgments("j", "pairwise-baseline")


# --- answers of real models -------------------------------------------------------------------------------------------


def answers(models: dict[str, str], kind: str, *flags: str, file: str = "a.jsonl") -> list[str]:
    """The flags of a quick run."""
    words = ["--model-id", "1028", "--model-type", kind, "--model-path", models[kind], "--max-new-token", "300"]
    return [*words, "--answer-file", file, "--question-end", "4", *(["--steps", "6"] if kind == "mdm" else []), *flags]


def test_both_kinds_answer_as_real_commands(models, folder):
    """The published commands, each a process of its own; a second one does only what is left."""
    for kind in ("arm", "mdm"):
        file = f"data/mt_bench/model_answer/{kind}.jsonl"
        guidance = ["--cfg-scale", "0.6"] if kind == "mdm" else []
        words = [
            sys.executable,
            str(ROOT / "eval" / "gen_model_answer.py"),
            *answers(models, kind, *guidance, file=file),
        ]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(rf"{file}, inference time: [\d.]+ s\n", done.stdout)
        found = lines_of(file)
        assert [line["question_id"] for line in found] == [81, 82, 83, 84]
        for line in found:
            assert line["model_id"] == "1028" and len(line["choices"]) == 1
            first, second = line["choices"][0]["turns"]
            assert first and second == "" and "USER" not in first and first == first.strip()


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_an_answer_is_the_text_behind_the_prompt(models, folder, script, kind):
    """By the sampler itself: the seed is the choice, the random stream the question's, whatever the batch."""
    loaded = load_model(models[kind])
    end, guidance = loaded.tokenizer.eos_id, 0.6 if kind == "mdm" else 0.0
    how = Sampling(steps=6, cfg_scale=guidance, seed=1)
    questions = read_mt_bench_questions(BENCH.questions, 0, 8)
    prompts = [loaded.prompt_ids(CHAT_TEMPLATE.format(question=question.turns[0])) for question in questions]
    rows = sample(loaded.model, prompts, how, 300, end, [question.question_id for question in questions])
    answered = [row.tolist()[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    assert any(end in ids[:-1] for ids in answered) or kind == "arm", "some text is behind an end token"
    expected = [loaded.tokenizer.decode(ids[: [*ids, end].index(end)]).strip() for ids in answered]
    for size in ("1", "3", "8"):
        flags = ["--num-choices", "2", "--batch-size", size, "--existing", "overwrite", "--question-end", "8"]
        code, _, err = script(gen_model_answer, *answers(models, kind, *flags, "--cfg-scale", str(guidance)))
        assert code == 0 and "warning" not in err
        found = [[choice["turns"][0] for choice in line["choices"]] for line in lines_of("a.jsonl")]
        assert [second for _, second in found] == expected
        assert all(first != second for first, second in found)
    # Published: all that was written, special tokens apart.
    flags = [*flags[:-2], "--question-end", "8", "--behind-end", "keep", "--existing", "overwrite"]
    code, _, err = script(gen_model_answer, *answers(models, kind, *flags, "--cfg-scale", str(guidance)))
    assert code == 0
    found = [line["choices"][1]["turns"][0] for line in lines_of("a.jsonl")]
    assert found == [loaded.tokenizer.decode(ids).strip() for ids in answered]


def test_a_longer_question_file_goes_on(models, folder, script):
    assert script(gen_model_answer, *answers(models, "mdm", "--question-end", "2"))[0] == 0
    before = lines_of("a.jsonl")
    assert script(gen_model_answer, *answers(models, "mdm", "--question-begin", "1"))[0] == 0
    assert lines_of("a.jsonl")[:2] == before and [one["question_id"] for one in lines_of("a.jsonl")] == [81, 82, 83, 84]
    code, _, err = script(gen_model_answer, *answers(models, "mdm", "--steps", "7"))
    assert code == 2 and re.search(r"error: a.jsonl was made with other settings \(steps 6 there, 7 here\)", err)
    assert script(gen_model_answer, *answers(models, "mdm", "--existing", "refuse"))[0] == 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on(models, folder, script, number):
    """Stopped in the middle, wherever that is; the same command ends with the answers of an unbroken run."""
    flags = ("--batch-size", "1", "--question-end", "12", "--steps", "40")
    words = [sys.executable, str(ROOT / "eval" / "gen_model_answer.py"), *answers(models, "mdm", *flags)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=restore_interrupts
    )
    limit = time.monotonic() + 60
    while not (Path("a.jsonl").exists() and Path("a.jsonl").read_bytes().count(b"\n") > 1):
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    kept = len(Path("a.jsonl").read_bytes().split(b"\n")) - 1
    assert 1 < kept < 12
    if number == signal.SIGINT:
        assert process.returncode == 130
        last = err.rstrip().splitlines()[-1]
        # Ctrl-C may come between writing an answer and counting it.
        lines = [f"interrupted: {n} of 12 answers are in a.jsonl; the same command goes on" for n in (kept - 1, kept)]
        assert last in lines
    assert script(gen_model_answer, *answers(models, "mdm", *flags))[0] == 0
    assert script(gen_model_answer, *answers(models, "mdm", *flags, file="b.jsonl"))[0] == 0
    one, other = (
        [(line["question_id"], line["choices"]) for line in lines_of(name)] for name in ("a.jsonl", "b.jsonl")
    )
    assert one == other and len(one) == 12


def test_two_processes_share_the_questions(models, folder, script):
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    words += [
        str(ROOT / "eval" / "gen_model_answer.py"),
        *answers(models, "mdm", "--batch-size", "1", "--question-end", "5"),
    ]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("inference time") == 1
    assert script(gen_model_answer, *answers(models, "mdm", "--question-end", "5", file="b.jsonl"))[0] == 0
    one, other = (
        [(line["question_id"], line["choices"]) for line in lines_of(name)] for name in ("a.jsonl", "b.jsonl")
    )
    assert one == other and len(one) == 5


def test_no_room_for_an_answer(models, folder, script):
    loaded = load_model(models["arm"])
    questions = read_mt_bench_questions(BENCH.questions, 0, 4)
    lengths = [len(loaded.prompt_ids(CHAT_TEMPLATE.format(question=one.turns[0]))) for one in questions]
    limit = max(lengths)
    assert sorted(lengths)[-2] + 10 < limit, "the longest one alone has no room"
    code, _, err = script(gen_model_answer, *answers(models, "arm", "--max-new-token", str(limit)))
    assert code == 0
    texts = [line["choices"][0]["turns"][0] for line in lines_of("a.jsonl")]
    assert [bool(text) for text in texts] == [length < limit for length in lengths]
    longest = questions[lengths.index(limit)].question_id
    assert f"warning: 1 questions leave no room in {limit} tokens, their answers stay empty: {longest}\n" in err


def test_what_has_no_effect_is_said(models, folder, script):
    flags = ("--max-new-token", "1024", "--question-end", "1", "--steps", "5", "--num-gpus-total", "4")
    code, _, err = script(gen_model_answer, *answers(models, "arm", *flags))
    assert code == 0
    assert "warning: --max-new-token 1024: this model reads 512 tokens, which is the limit now\n" in err
    assert "warning: --steps has no effect on an ARM\n" in err
    assert "torchrun --nproc_per_node 4 eval/gen_model_answer.py" in err


def test_flags_of_the_original_that_mean_nothing_here(models, folder, script):
    flags = ("--question-end", "1", "--dtype", "float16", "--max-gpu-memory", "40GiB", "--revision", "v2")
    code, _, err = script(gen_model_answer, *answers(models, "arm", *flags))
    assert code == 0
    assert "warning: --dtype float16 is not computed with: taken as auto" in err
    for name in ("--max-gpu-memory", "--revision"):
        assert f"warning: {name} has no effect: the model is one file, and on one device\n" in err
    settings = json.loads(Path("a.settings.json").read_text())
    assert settings["dtype"] in ("float32", "bfloat16")
    code, _, err = script(gen_model_answer, *answers(models, "arm", "--question-end", "1", "--revision", "main"))
    assert code == 0 and "warning" not in err


def test_the_default_file_is_named_by_the_model(models, folder, script):
    flags = ["--model-id", "my-arm", "--model-type", "arm", "--model-path", models["arm"], "--question-end", "1"]
    code, out, _ = script(gen_model_answer, *flags, "--max-new-token", "180")
    assert code == 0 and out.startswith("data/mt_bench/model_answer/my-arm.jsonl, inference time: ")


MISTAKES = {
    "kind": (
        ["--model-type", "mdm"],
        "tiny.safetensors holds an autoregressive model .arm., a masked .* was asked for",
    ),
    "no kind": (["--model-type", "gpt"], "--model-type gpt: choose from arm, mdm"),
    "guidance": (["--cfg-scale", "1"], "--cfg-scale 1.0 needs an MDM"),
    "several": (["--steps", "0", "--batch-size", "0"], "--steps 0: expected at least 1; --batch-size 0: expected"),
    "context": (["--max-new-token", "0"], "--max-new-token 0: expected at least 1"),
    "model": (["--model-path", "nowhere.safetensors"], "no checkpoint nowhere.safetensors"),
    "no model": (["--model-path", ""], "--model-path is missing"),
    "bench": (["--bench-name", "other"], "no file data/other/question.jsonl"),
    "range": (["--question-begin", "100"], "--question-begin 100 --question-end 4: .* has 80 questions"),
    "suffix": (["--answer-file", "a.txt"], "--answer-file a.txt: expected a file that ends in .jsonl"),
    "existing": (["--existing", "keep"], "--existing keep: choose from continue, refuse, overwrite"),
    "dtype": (["--dtype", "half"], "dtype half: choose from"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_answers_are_one_line(models, folder, script, name):
    flags, message = MISTAKES[name]
    code, out, err = script(gen_model_answer, *answers(models, "arm", *flags))
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: .*{message}.*\n", err), err
    assert not Path("a.jsonl").exists()


# --- tables -----------------------------------------------------------------------------------------------------------


def rated(model: str, question_id: int, turn: int, score: float) -> dict[str, Any]:
    return {"question_id": question_id, "model": model, "turn": turn, "score": score, "judge": ["j", "single-v1"]}


def compared(first: str, second: str, winners: tuple[str, str], question_id: int = 81) -> dict[str, Any]:
    names = {"model_1": first, "model_2": second, "g1_winner": winners[0], "g2_winner": winners[1]}
    return {"question_id": question_id, "turn": 1, **names}


RATINGS = [
    rated("arm", 81, 1, 4),
    rated("arm", 81, 2, 2),
    rated("arm", 111, 1, 7.5),
    rated("arm", 112, 1, -1),
    rated("mdm", 81, 1, 10),
    rated("mdm", 999, 1, 1),
    rated("none", 81, 1, -1),
]


def test_means_by_hand():
    arm, mdm, none = (
        next(one for one in model_ratings(RATINGS) if one.model == name) for name in ("arm", "mdm", "none")
    )
    assert (arm.mean(1), arm.mean(2), arm.mean(), arm.rated, arm.unrated) == (5.75, 2, 4.5, 3, 1)
    assert (mdm.mean(1), mdm.mean(2), mdm.mean()) == (5.5, None, 5.5)
    assert (none.mean(), none.rated, none.unrated) == (None, 0, 1)
    assert [one.model for one in model_ratings(RATINGS)] == ["mdm", "arm", "none"]
    split = by_category(RATINGS, {111: "math", 81: "writing", 5: "stem"})
    assert {name: len(own) for name, own in split.items()} == {"math": 1, "writing": 4, "stem": 0}


PAIRS = [
    compared("arm", "mdm", ("model_1", "model_1")),
    compared("arm", "mdm", ("model_2", "model_2"), 82),
    compared("arm", "mdm", ("model_1", "model_2"), 83),
    compared("arm", "mdm", ("tie", "model_2"), 84),
    compared("mdm", "gpt", ("model_2", "model_2"), 85),
    compared("arm", "gpt", ("error", "model_1"), 86),
]


def test_wins_by_hand():
    assert pairwise_records(PAIRS, None) == [
        PairwiseRecord("gpt", 1, 0, 0),
        PairwiseRecord("arm", 1, 1, 2),
        PairwiseRecord("mdm", 1, 2, 2),
    ]
    ties = [compared("ties", name, ("tie", "tie")) for name in ("a", "b", "c")]
    wins = [compared("wins", "ties", ("model_1", "model_1")), compared("wins", "d", ("model_2", "model_2"))]
    wins += [compared("wins", "d", ("model_2", "model_2"), 82)]
    order = [record.model for record in pairwise_records([*ties, *wins], None)]
    assert order == ["d", "a", "b", "c", "ties", "wins"], "a tie is half a win: 0.375 of 4 before a third of 3"
    assert pairwise_records(PAIRS, "arm") == [PairwiseRecord("mdm", 1, 1, 2)]
    assert PairwiseRecord("x", 3, 1, 4).rates == (0.375, 0.125, 0.625)


def test_a_table_is_aligned():
    assert aligned_table(("a", "bb"), [("long", 1.5), ("x", None), ("y", 12)]).split("\n") == [
        "a         bb",
        "long  1.5000",
        "x          -",
        "y         12",
    ]


def test_results_are_shown(folder, script):
    write(folder / "data/mt_bench/model_judgment/j_single.jsonl", [*RATINGS, rated("mdm", 81, 1, 9)])
    code, out, err = script(show_result, "--judge-model", "j")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[2:16] == [
        "########## First turn ##########",
        "              score",
        "model turn",
        "arm   1    5.750000",
        "mdm   1    5.000000",  # the later judgment of question 81 counts
        "",
        "########## Second turn ##########",
        "              score",
        "model turn",
        "arm   2    2.000000",
        "",
        "########## Average ##########",
        "         score",
        "model",
    ]
    assert lines[16:19] == ["mdm   5.000000", "arm   4.500000", ""]
    lines = lines[:2] + lines[19:]
    assert lines[2].split("  ")[0] == "model" and lines[2].endswith("rated  without rating")
    assert [line.split() for line in lines[3:6]] == [
        ["mdm", "5.0000", "-", "5.0000", "2", "0"],  # the later judgment of question 81 counts
        ["arm", "5.7500", "2.0000", "4.5000", "3", "1"],
        ["none", "-", "-", "-", "0", "1"],
    ]
    assert lines[7].split() == ["category", "mdm", "arm", "none"]
    assert lines[8].split() == ["writing", "9.0000", "3.0000", "-"]
    assert lines[11].split() == ["math", "-", "7.5000", "-"] and len(lines) == 18
    assert lines[-1] == "data/mt_bench/radar.png" and Image.open(lines[-1]).size[0] > 500


def test_chosen_models_without_a_picture(folder, script):
    write(folder / "data/mt_bench/model_judgment/gpt-4_single.jsonl", RATINGS)
    code, out, _ = script(show_result, "--model-list", "arm", "--radar", "off")
    assert code == 0 and "mdm" not in out and "radar" not in out
    assert not (folder / "data/mt_bench/radar.png").exists()
    (folder / "data/mt_bench/question.jsonl").unlink()
    code, out, err = script(show_result)
    assert code == 0 and "no picture" in err and "5.7500" in out


def test_comparisons_are_shown(folder, script):
    path = write(folder / "data/mt_bench/model_judgment/j_pair.jsonl", PAIRS)
    code, out, _ = script(show_result, "--judge-model", "j", "--mode", "pairwise-all")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[2] == ["model", "win", "loss", "tie", "win_rate", "loss_rate", "win_rate_adjusted"]
    assert lines[3] == ["gpt", "1", "0", "0", "1.0000", "0.0000", "1.0000"]
    assert lines[4] == ["arm", "1", "1", "2", "0.2500", "0.2500", "0.5000"]
    assert lines[5] == ["mdm", "1", "2", "2", "0.2000", "0.4000", "0.4000"]
    assert " ".join(lines[-1]) == "1 of 6 matches are left out: a verdict is missing"
    # A pair counts where its first model is listed.
    code, out, _ = script(show_result, "--judge-model", "j", "--mode", "pairwise-all", "--model-list", "mdm")
    assert code == 0 and [line.split()[:4] for line in out.splitlines()[3:]] == [
        ["gpt", "1", "0", "0"],
        ["mdm", "0", "1", "0"],
    ]
    flags = ("--input-file", str(path), "--mode", "pairwise-baseline", "--baseline-model", "mdm", "--model-list", "arm")
    code, out, _ = script(show_result, *flags)
    assert code == 0 and [line.split() for line in out.splitlines()][3:] == [lines[4]]


RESULT_MISTAKES = {
    "mode": (["--mode", "pairwise"], "--mode pairwise: choose from single, pairwise-baseline, pairwise-all"),
    "judge": (["--judge-model", "k"], r"no judgments .*k_single.jsonl \(there are j_pair.jsonl, j_single.jsonl\)"),
    "model": (["--model-list", "arm", "x"], "j_single.jsonl has no judgments of x: it has arm, mdm, none"),
    "baseline": (["--mode", "pairwise-baseline"], "--baseline-model gpt-3.5-turbo: .*j_pair.jsonl has arm, gpt, mdm"),
    "file": (
        ["--mode", "pairwise-all", "--input-file", "single.jsonl"],
        r"single.jsonl:1 is no judgment \(pairwise-all\)",
    ),
    "empty": (["--input-file", "empty.jsonl"], "empty.jsonl holds no judgment"),
    "picture": (["--radar", "a.jpg"], "--radar a.jpg: expected FILE.png or off"),
}


@pytest.mark.parametrize("name", RESULT_MISTAKES)
def test_mistakes_of_results_are_one_line(folder, script, name):
    write(folder / "data/mt_bench/model_judgment/j_single.jsonl", RATINGS)
    write(folder / "data/mt_bench/model_judgment/j_pair.jsonl", PAIRS)
    write(folder / "single.jsonl", RATINGS)
    write(folder / "empty.jsonl", [])
    flags, message = RESULT_MISTAKES[name]
    code, out, err = script(show_result, "--judge-model", "j", *flags)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: .*{message}.*\n", err), err


def test_the_wheel_shows_the_values(tmp_path):
    """A value twice as large is twice as far from the centre."""

    def reach(value: float) -> int:
        """Height of the second polygon, in pixels."""
        path = tmp_path / "a.png"
        plot_radar({"scale": [10.0] * 4, "x": [value] * 4}, ["a", "b", "c", "d"], "title", path)
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        own = np.abs(pixels - np.array([0xD9, 0x56, 0x0B])).sum(-1) < 30
        rows = np.flatnonzero(own[: int(0.85 * len(own))].any(1))  # the legend is below
        return int(rows[-1] - rows[0])

    assert reach(8.0) == pytest.approx(2 * reach(4.0), rel=0.03)


def test_a_wheel_of_anything(tmp_path):
    """Gaps, many names, nothing at all."""
    for values in ({"x": [1.0, None, 3.0, 4.0]}, {str(n): [n / 3] * 4 for n in range(12)}, {"x": [None] * 4}):
        plot_radar(values, ["a", "b", "c", "d"], "title", tmp_path / "a.png")
        assert Image.open(tmp_path / "a.png").size[0] > 500
