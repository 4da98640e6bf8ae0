"""The reversal evaluation: what counts as right, BLEU, and the real script on files of the published form."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

from evaluate_reverse import Flags, main
from lit_gpt import cli
from lit_gpt.checkpoints.loaded import LoadedModel
from lit_gpt.checkpoints.weights import read_model
from lit_gpt.evaluation.reversal import DATA_DIR, FILES, character_bleu, is_right
from lit_gpt.sampling.sample import sample
from lit_gpt.sampling.settings import Sampling
from lit_gpt.tokenizer import Tokenizer
from tests.support.small_models import export_arm_and_mdm
from tests.support.training_runs import kill_after_lines

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "evaluate_reverse.py")
NAMES = ["Orla Quist", "Tam Veer", "Ines Holm", "Rudi Pask"]
DEEDS = ["the baker of blue bread", "the keeper of nine owls", "the judge of fog", "the painter of lost keys"]
LENGTH = 40


# --- what an answer is worth ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "generation", "right"),
    [
        (" Orla Quist", "Orla Quist", True),
        (" Orla Quist", "it was orla quist, they say", True),
        (" the baker.\n", "THE BAKER.", True),
        (" Orla Quist", "Orla  Quist", False),
        (" Orla Quist", "Orla Quis", False),
        (" Orla Quist", "", False),
    ],
)
def test_the_reference_occurs_in_the_generation(reference, generation, right):
    assert is_right(reference, generation) is right


def test_bleu_over_characters():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert character_bleu(" The Baker ", "the baker") == 1
        assert character_bleu("baker", "") == 0
        assert character_bleu("baker", "xyz") == 0
        assert 0 <= character_bleu("baker", "bake") < 1
        assert character_bleu("abcd", "dcba") < 1e-50, "no two characters in a row"
    # By hand, for "abcdef" against "abcdxf": 5/6, 3/5, 2/4 and 1/3 of the n-grams occur, and no brevity penalty.
    assert character_bleu("abcdef", "abcdxf") == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # All n-grams occur, and 4 characters stand for 6: exp(1 - 6/4).
    assert character_bleu("abcdef", "abcd") == pytest.approx(0.6065306597)


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """An ARM and an MDM with random weights, and their tokenizer."""
    return export_arm_and_mdm(tmp_path_factory.mktemp("models"), block_size=64, embedding_scale=4.0)


def write_questions(folder: Path, known: dict[str, list[str]] | None = None) -> Path:
    """The four files, with invented people; `known` gives completions by file."""
    folder.mkdir(exist_ok=True)
    for names in FILES.values():
        for name in names:
            to_description = name in ("p2d_prompts_test.jsonl", "d2p_reverse_prompts_test.jsonl")
            pairs = [
                (f"Far and wide {person} is known as", f" {deed}.")
                if to_description
                else (f"Known as {deed}, there is", f" {person}")
                for person, deed in zip(NAMES, DEEDS, strict=True)
            ]
            if "reverse" in name:
                pairs.reverse()
            ends = (known or {}).get(name) or [completion for _, completion in pairs]
            rows = [{"prompt": prompt, "completion": end} for (prompt, _), end in zip(pairs, ends, strict=True)]
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def evaluating(models, tmp_path, monkeypatch, capsys):
    """Run the script's main in this process, on the questions in `tmp_path/data`: (exit code, stdout, stderr)."""
    write_questions(tmp_path / "data")

    def run(kind: str, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate_reverse.py", *flags_of(models, tmp_path, kind, *flags)])
        with pytest.raises(SystemExit) as end:
            cli.run(main)
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


def flags_of(models: dict[str, Path], folder: Path, kind: str, *flags: str) -> list[str]:
    return ["--ckpt-path", str(models[kind]), "--data_dir", str(folder / "data"), "--length", str(LENGTH), *flags]


def answers_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("qs_type", ["ntd", "dtn"])
@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_right_answers_are_counted_by_direction(kind, qs_type, models, evaluating, tmp_path, monkeypatch):
    """What the models write is laid down as the reference of 3 questions in the taught direction and 1 in reverse."""
    monkeypatch.chdir(tmp_path)
    code, out, _ = evaluating(kind, "--qs_type", qs_type)
    assert code == 0 and out.splitlines()[-1].startswith(f"qs_type: {qs_type}, accs: 0.0, accs_reverse: 0.0")
    answers = answers_of(tmp_path / "out" / "reverse" / f"tiny-{qs_type}.jsonl")
    assert [(one["direction"], one["index"]) for one in answers] == [
        (direction, index) for direction in ("same", "reverse") for index in range(4)
    ]
    same, reverse = FILES[qs_type]
    asked = [json.loads(line)["prompt"] for name in (same, reverse) for line in (tmp_path / "data" / name).open()]
    assert [one["prompt"] for one in answers] == asked
    written = [one["generation"].strip() for one in answers]
    assert all(len(text) > 3 for text in written)
    known = {
        same: [f" {written[0]}", written[1].upper(), written[2][:-1], " nothing of it"],
        reverse: [" no", " nor this", " that neither", written[7]],
    }
    write_questions(tmp_path / "data", known)
    code, out, _ = evaluating(kind, "--qs_type", qs_type, "--existing", "overwrite")
    assert code == 0
    numbers = re.fullmatch(
        rf"qs_type: {qs_type}, accs: 0\.75, accs_reverse: 0\.25(?:, blue: ([\d.]+), blues_reverse: ([\d.]+))?",
        out.splitlines()[-1],
    )
    assert numbers and (numbers[1] is not None) == (qs_type == "ntd")
    if qs_type == "ntd":
        bleus = [character_bleu(end, text) for end, text in zip(known[same] + known[reverse], written, strict=True)]
        assert float(numbers[1]) == pytest.approx(sum(bleus[:4]) / 4) and bleus[0] == 1
        assert float(numbers[2]) == pytest.approx(sum(bleus[4:]) / 4) and bleus[7] == 1
    assert "same direction: 3 of 4 right: 75.0%, 95 % confidence interval 30.1% to 95.4%\nreverse: 1 of 4" in out


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_the_generation_is_the_text_behind_the_prompt(kind, models, evaluating, tmp_path):
    """As the sampler writes it without the script, up to the end token."""
    path = tmp_path / "a.jsonl"
    assert evaluating(kind, "--output", str(path), "--steps", "5")[0] == 0
    model, tokenizer = read_model(models[kind])[0], Tokenizer(models["tokenizer"])
    how = Sampling("greedy", 5, 0.0, 0.8 if kind == "mdm" else 0.0)
    for one in answers_of(path):
        prompt = [tokenizer.bos_id, *tokenizer.encode_ids(one["prompt"])]
        ids = sample(model, [prompt], how, LENGTH, tokenizer.eos_id)[0].tolist()[len(prompt) :]
        end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else None
        assert one["generation"] == tokenizer.decode(ids[:end])


def test_what_stands_behind_the_end_token_is_not_read(models, evaluating, tmp_path, monkeypatch):
    tokenizer, path = Tokenizer(models["tokenizer"]), tmp_path / "a.jsonl"

    def complete(self, prompts, rows, sampling, length):
        return [
            prompt + tokenizer.encode("Somebody").tolist() + tokenizer.encode("Rudi Pask").tolist()
            for prompt in prompts
        ]

    monkeypatch.setattr(LoadedModel, "complete", complete)
    assert evaluating("mdm", "--qs_type", "dtn", "--output", str(path))[0] == 0
    assert {(one["generation"], one["correct"]) for one in answers_of(path)} == {("Somebody", False)}
    # Published: all of it without special tokens. Answers of one rule are not continued by the other.
    code, _, err = evaluating("mdm", "--qs_type", "dtn", "--output", str(path), "--behind_end", "keep")
    assert code == 2 and "(behind_end None there, keep here)" in err
    path = tmp_path / "b.jsonl"
    assert evaluating("mdm", "--qs_type", "dtn", "--output", str(path), "--behind_end", "keep")[0] == 0
    whole = tokenizer.decode([*tokenizer.encode_ids("Somebody"), *tokenizer.encode_ids("Rudi Pask")])
    assert {one["generation"] for one in answers_of(path)} == {whole} and "Rudi Pask" in whole
    assert sum(one["correct"] for one in answers_of(path)) == 2


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_the_batch_changes_nothing_and_a_look_is_continued(kind, evaluating, tmp_path):
    files = [tmp_path / f"{size}.jsonl" for size in (1, 3, 64)]
    for file in files:
        words = ("--output", str(file), "--batch_size", file.stem, "--algorithm", "origin", "--steps", "6")
        if file.stem == "3":
            code, out, _ = evaluating(kind, *words, "--limit", "1")
            assert "0 of 1 right" in out and len(answers_of(file)) == 2
        code, out, _ = evaluating(kind, *words)
        assert code == 0 and ("2 of 8 questions were answered already" in out) == (file.stem == "3")

    def by_question(file: Path) -> list[dict]:
        return sorted(answers_of(file), key=lambda one: (one["direction"], one["index"]))

    assert files[0].read_bytes() == files[2].read_bytes()
    assert by_question(files[0]) == by_question(files[1])


def test_a_killed_evaluation_goes_on(models, evaluating, tmp_path):
    for name in FILES["dtn"]:
        path = tmp_path / "data" / name
        path.write_text(path.read_text() * 4)
    words = ("--qs-type", "dtn", "--batch_size", "1", "--length", "64", "--steps", "30", "--output")
    broken, whole = tmp_path / "broken.jsonl", tmp_path / "whole.jsonl"
    command = [sys.executable, SCRIPT, *flags_of(models, tmp_path, "mdm", *words, str(broken))]
    kill_after_lines(command, broken, 3)
    assert 3 <= broken.read_bytes().count(b"\n") < 32
    code, out, _ = evaluating("mdm", *words, str(broken))
    assert code == 0 and "of 32 questions were answered already" in out
    assert evaluating("mdm", *words, str(whole))[0] == 0
    assert broken.read_bytes() == whole.read_bytes()


def test_answers_of_other_settings_are_not_mixed(evaluating, tmp_path):
    path = tmp_path / "a.jsonl"
    words = ("--steps", "2", "--limit", "1", "--output", str(path))
    assert evaluating("mdm", *words)[0] == 0
    for changed in (("--cfg", "0.5"), ("--seed", "1"), ("--length", "39"), ("--steps", "3"), ("--qs_type", "dtn")):
        code, out, err = evaluating("mdm", *words, *changed)
        name, value = changed[0].removeprefix("--"), changed[1]
        assert (code, out) == (2, "")
        assert re.fullmatch(r"error: .*a.jsonl was made with other settings \(.*\n", err)
        assert re.search(rf"{name} \S+ there, {value} here", err), err
    assert evaluating("mdm", *words, "--algorithm", "greddy", "--cfg", "0.8")[0] == 0, "the same in other words"
    assert "exists" in evaluating("mdm", *words, "--existing", "refuse")[2]
    # Lines that are no answers of this command, without a record of how they were made.
    path.with_suffix(".settings.json").unlink()
    path.write_text('{"direction": "same", "index": 0, "correct": true}\n')
    code, out, err = evaluating("mdm", *words)
    assert (code, out) == (2, "") and "a.jsonl has no a.settings.json beside it" in err
    code, _, err = evaluating("mdm", *words, "--existing", "continue")
    assert code == 2 and "a.jsonl:1 is no result (KeyError('bleu'))" in err
    # Other questions.
    assert evaluating("mdm", *words, "--existing", "overwrite")[0] == 0
    write_questions(tmp_path / "data", {FILES["ntd"][1]: ["a", "b", "c", "d"]})
    code, _, err = evaluating("mdm", *words)
    assert code == 2 and re.search(r"\(data .* there, .* here\)", err)


def test_the_published_settings(models, evaluating, tmp_path, monkeypatch):
    seen = []

    def sample(model, prompts, sampling, length, stop_id, rows):
        seen.append((sampling, length, stop_id))
        return [torch.tensor([*prompt, 70]) for prompt in prompts]

    monkeypatch.setattr("lit_gpt.checkpoints.loaded.sample", sample)
    eos_id = Tokenizer(models["tokenizer"]).eos_id
    for kind, scale in (("mdm", 0.8), ("arm", 0.0)):
        assert evaluating(kind, "--length", "52", "--output", str(tmp_path / f"{kind}.jsonl"))[0] == 0
        assert set(seen) == {(Sampling("greddy", 32, 0.0, scale, 1234), 52, eos_id)}
        seen.clear()
    assert Flags().length == 52 and Flags().data_dir == DATA_DIR


def test_guidance_and_an_arm(evaluating, tmp_path):
    words = ("--limit", "1", "--output", str(tmp_path / "a.jsonl"))
    code, _, err = evaluating("arm", *words)
    assert code == 0 and "error" not in err and "warning" not in err, "the default says nothing"
    code, _, err = evaluating("arm", *words, "--cfg", "0", "--steps", "5", "--existing", "overwrite")
    assert code == 0 and "warning: --steps has no effect: this checkpoint is an ARM\n" in err
    code, _, err = evaluating("arm", *words, "--cfg", "0.8")
    assert (code, err) == (2, "error: --cfg 0.8 needs an MDM, and this checkpoint is an ARM: leave it out\n")


def test_questions_without_room_are_named(evaluating, tmp_path):
    path = tmp_path / "a.jsonl"
    code, out, err = evaluating("mdm", "--length", "9", "--output", str(path))
    assert (
        code == 0
        and out.splitlines()[-1] == "qs_type: ntd, accs: 0.0, accs_reverse: 0.0, blue: 0.0, blues_reverse: 0.0"
    )
    assert "warning: 8 of 8 questions leave no room in --length 9: they count as wrong\n" in err
    assert {(one["generation"], one["correct"], one["bleu"]) for one in answers_of(path)} == {("", False, 0.0)}


MISTAKES = {
    "kind of question": (["--qs_type", "both"], r"--qs_type both: choose ntd \(name to description\) or dtn"),
    "no checkpoint": (["--ckpt_path", ""], "--ckpt_path is missing"),
    "missing": (["--ckpt_path", "nowhere/a.safetensors"], "no checkpoint nowhere/a.safetensors"),
    "size": (["--model", "1028"], "holds tiny, Diff_LLaMA_1028M was asked for"),
    "steps": (["--steps", "0"], "--steps 0: expected at least 1"),
    "length": (["--length", "65"], "--length 65: this model reads at most 64 tokens, prompt included; lower it"),
    "guidance": (["--cfg", "-1"], "cfg_scale is -1.0"),
    "existing": (["--existing", "keep"], "--existing keep: choose from continue, refuse, overwrite"),
    "no data": (
        ["--data_dir", "nowhere"],
        "no p2d_prompts_test.jsonl and no d2p_reverse_prompts_test.jsonl in nowhere: they come from "
        "github.com/lukasberglund/reversal_curse, folder data/reverse_experiments/june_version_7921032488; put them there",
    ),
    "line": ([], r"p2d_prompts_test.jsonl:2 is not JSON .*: expected {\"prompt\": text, \"completion\": text}"),
    "field": ([], r"p2d_prompts_test.jsonl:1 has no text in completion \(found only prompt\)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(evaluating, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, message = MISTAKES[name]
    if name in ("line", "field"):
        good = '{"prompt": "a", "completion": "b"}\n'
        text = {"line": good + "{'prompt'}\n", "field": '{"prompt": "a"}\n' + good}[name]
        (tmp_path / "data" / "p2d_prompts_test.jsonl").write_text(text)
    code, out, err = evaluating("mdm", *flags)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: .*{message}.*\n", err), err
    assert not (tmp_path / "out").exists()
