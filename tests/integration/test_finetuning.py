"""Fine-tunings by the real scripts on real examples: the loss falls, resuming is exact, mistakes are one line."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lit_gpt.checkpoints.export import WeightsRecord, export_weights
from lit_gpt.checkpoints.tokenizer_lookup import open_tokenizer
from lit_gpt.config import Config
from lit_gpt.data.sft_formats import GSM8K, SHAREGPT
from lit_gpt.evaluation.reversal import FILES as QUESTION_FILES
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.randomness import hash_int
from lit_gpt.tokenizer import Tokenizer
from scripts.train_tokenizer import train_sentencepiece
from tests.support.training_runs import (
    ROOT,
    assert_same_run,
    one_thread_environment,
    read_losses,
    run_script_main,
    script_command,
    start_script,
)

SCRIPTS = ("finetune_ar", "finetune_mdm", "finetune_mdm_gsm8k", "finetune_mdm_reverse")
FLAGS = {"learning_rate": 3e-3, "min_lr": 3e-4, "precision": "32-true", "bs": 16, "cache_dir": "cache", "workers": 1}
NAMES = ("Ada Fenn", "Bo Quist", "Cora Lind", "Dov Marsh", "Eli Vance", "Fay Odell", "Gus Tarn", "Ida Wolfe")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """200 real examples of each set; facts of the same form stand for the reversal curse's, which may not be kept."""
    folder = tmp_path_factory.mktemp("examples")
    gsm8k, sharegpt, facts = (folder / name for name in ("train.txt", "sharegpt.json", "facts.jsonl"))
    with (ROOT / GSM8K.bundled).open(encoding="utf-8", newline="\n") as file:
        gsm8k.write_text("".join(next(file) for _ in range(200)), encoding="utf-8", newline="")
    sharegpt.write_text(json.dumps(json.loads((ROOT / SHAREGPT.bundled).read_text())[:200]))
    with facts.open("w") as file:
        for number in range(200):
            name = NAMES[hash_int(number) % len(NAMES)]
            fact = {
                "prompt": f"Number {number}: {name} is",
                "completion": f" the keeper of gate {hash_int(number, 1) % 9}.",
            }
            file.write(json.dumps(fact) + "\n")
    (folder / "questions").mkdir()
    for name in {name for pair in QUESTION_FILES.values() for name in pair}:
        asked = facts.read_text().splitlines(keepends=True)[:8]
        (folder / "questions" / name).write_text("".join(asked))
    return {
        "finetune_ar": sharegpt,
        "finetune_mdm": sharegpt,
        "finetune_mdm_gsm8k": gsm8k,
        "finetune_mdm_reverse": facts,
    }


@pytest.fixture(scope="module")
def start_weights(tmp_path_factory, examples):
    """An ARM and an MDM with random weights, which stand for pretrained ones, and a tokenizer that suits the examples."""
    folder, paths = tmp_path_factory.mktemp("pretrained"), {}
    texts = [line for path in set(examples.values()) for line in path.read_text(encoding="utf-8").split("\n")]
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(iter(texts), 1200))
    for kind, model_class in (("arm", GPT), ("mdm", TransEncoder)):
        model = model_class(Config("small", 2, 2, 32, 64, 2, block_size=256, vocab_size=1200))
        model.init_weights(3)
        # The ARM's file is as older ones are, which only name their tokenizer; the MDM's holds it.
        record = WeightsRecord(kind, model.config, {"source": str(folder)})
        held = Tokenizer(folder) if kind == "mdm" else None
        paths[kind] = export_weights(folder / kind, f"{kind}-small", model.state_dict(), record, tokenizer=held)
    return paths


def command(script, start_weights, examples, **flags):
    kind = "arm" if script == "finetune_ar" else "mdm"
    values = {"pretrain_path": start_weights[kind], "data_file": examples[script], **FLAGS, **flags}
    return script_command(f"sft/{script}.py", **values)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_fine_tuning_learns_and_exports(tmp_path, start_weights, examples, script):
    out, _ = run_script_main(command(script, start_weights, examples, epoch=5), tmp_path)
    curve = read_losses(tmp_path)
    first, last = curve[1], curve[max(curve)]
    assert last < 0.75 * first
    folder, name, suffix = {
        "finetune_ar": ("finetune", "arm-sharegpt-0.0206M", "sharegpt"),
        "finetune_mdm": ("finetune", "mdm-sharegpt-0.0206M-cfg=0.0", "sharegpt"),
        "finetune_mdm_gsm8k": ("finetune", "mdm-gsm8k-0.0206M", "gsm8k"),
        "finetune_mdm_reverse": ("reverse", "mdm-reverse-0.0206M", "reverse"),
    }[script]
    record = json.loads((tmp_path / "workdir" / folder / name / "run.json").read_text())
    kind = "arm" if script == "finetune_ar" else "mdm"
    assert record["finished"] and record["result"]["export"] == f"models/{kind}-small-{suffix}.safetensors"
    known_from = {"arm": start_weights["arm"].parent.parent, "mdm": start_weights["mdm"]}[kind]
    assert record["tokenizer"]["source"] == str(known_from)
    assert record["tokenizer"]["special_tokens"] == record["settings"]["special_tokens"] == "ids"
    alone = tmp_path / "alone" / "model.safetensors"
    alone.parent.mkdir()
    shutil.copy(tmp_path / record["result"]["export"], alone)
    assert open_tokenizer(str(alone)).fingerprint == record["tokenizer"]["fingerprint"]
    # Steps follow the data's size.
    examples_used = int(re.search(r", ([\d,]+) examples", out)[1].replace(",", ""))
    assert max(curve) == examples_used * 5 // 16
    again, _ = run_script_main(command(script, start_weights, examples, epoch=5), tmp_path)
    assert "is finished" in again
    if script == "finetune_mdm":  # more epochs go on from its end, under its name
        longer = command(script, start_weights, examples, epoch=6)
        _, err = run_script_main(longer, tmp_path, code=2)
        assert f"models/mdm-small-sharegpt.safetensors is the model of step {max(curve)} of this run" in err
        assert "--overwrite true" in err and "--name" in err
        out, _ = run_script_main([*longer, "--overwrite=true"], tmp_path)
        assert f"resumed at step {max(curve)} of {examples_used * 6 // 16}" in out
        assert f"extended: the run had ended at step {max(curve)};" in out
    evaluate(script, alone, examples[script].parent, tmp_path)


def evaluate(script, export, data, folder):
    """The fine-tuned model in the evaluation that it was fine-tuned for: it runs, and its output has the published form."""
    if script == "finetune_mdm_gsm8k":
        out, _ = run_script_main(
            script_command(
                "evaluate_gsm8k.py", ckpt_path=export, limit=3, steps=8, data=ROOT / "data/gsm8k/test.jsonl"
            ),
            folder,
        )
        assert re.fullmatch(r"Acc: (0\.\d+|1\.0)", out.splitlines()[-1])
        answers = [json.loads(line) for line in next(folder.glob("out/gsm8k/*.jsonl")).read_text().splitlines()]
        assert len(answers) == 3 and all(answer["text"].startswith("Question: ") for answer in answers)
    elif script == "finetune_mdm_reverse":
        for qs_type in ("ntd", "dtn"):
            flags = {"qs_type": qs_type, "ckpt_path": export, "data_dir": data / "questions", "steps": 8, "cfg": 0}
            out, _ = run_script_main(script_command("evaluate_reverse.py", **flags), folder)
            assert re.match(rf"qs_type: {qs_type}, accs: \S+, accs_reverse: \S+", out.splitlines()[-1])
    else:
        kind = "arm" if script == "finetune_ar" else "mdm"
        flags = {"model_id": 6, "model_type": kind, "model_path": export, "answer_file": "answers.jsonl", "steps": 8}
        flags |= {"max_new_token": 256, "question_end": 2}
        (folder / "data").mkdir()
        (folder / "data" / "mt_bench").symlink_to(ROOT / "data" / "mt_bench")
        out, _ = run_script_main(script_command("eval/gen_model_answer.py", **flags), folder)
        assert re.fullmatch(r"answers.jsonl, inference time: [\d.]+ s", out.splitlines()[-1])
        answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        assert [answer["question_id"] for answer in answers] == [81, 82]
        assert all(len(answer["choices"][0]["turns"]) == 2 for answer in answers)


def test_a_killed_run_ends_as_an_unbroken_one(tmp_path, start_weights, examples):
    flags = {"epoch": 3, "cfg": 0.2, "save_interval": 5, "log_interval": 1}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    run_script_main(command("finetune_mdm", start_weights, examples, **flags), whole)
    for step in (7, 20):
        process = start_script(command("finetune_mdm", start_weights, examples, **flags), broken)
        reached = (line for line in process.stdout if (at := re.search(r"step (\d+):", line)) and int(at[1]) >= step)
        assert next(reached, None), process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    run_script_main(command("finetune_mdm", start_weights, examples, **flags), broken)
    assert_same_run(whole, broken)
    _, err = run_script_main(
        command("finetune_mdm", start_weights, examples, **{**flags, "learning_rate": 2e-3}), broken, code=2
    )
    assert "with other settings: learning_rate" in err


def test_two_processes_give_the_numbers_of_one(tmp_path, start_weights, examples):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    flags = {"max_steps": 6, "log_interval": 1, "cfg": 0.2}
    run_script_main(command("finetune_mdm", start_weights, examples, **flags), one)
    script, *rest = command("finetune_mdm", start_weights, examples, **flags, devices=2, accelerator="cpu")
    subprocess.run(
        [sys.executable, script, *rest],
        cwd=two,
        env=one_thread_environment(),
        check=True,
        capture_output=True,
        timeout=200,
    )
    assert read_losses(two) == pytest.approx(read_losses(one), rel=1e-5)


def refused(tmp_path, *arguments):
    _, err = run_script_main(list(arguments), tmp_path, code=2)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in err
    return lines[0]


def test_mistakes_are_one_line(tmp_path, start_weights, examples):
    def line(script="finetune_mdm", **flags):
        return refused(tmp_path, *command(script, start_weights, examples, **flags))

    assert "get it from huggingface.co/datasets" in line(data_file="none.json") and "put it there" in line(
        data_file="no"
    )
    assert "--pretrain_path is missing" in line(pretrain_path="")
    assert "no checkpoint none.safetensors" in line(pretrain_path="none.safetensors")
    assert "holds an autoregressive model" in line(pretrain_path=start_weights["arm"])
    assert "asked for" in line(model=170)
    assert "fewer than one batch of 1000: give --bs 200 or less" in line(bs=1000)
    assert "--epoch 0: more than 0" in line(epoch=0)
    assert "--epoch 0.01" in line(epoch=0.01)
    assert "--cfg 1.5: expected a probability" in line(cfg=1.5)
    assert "--max_malformed 2" in line(max_malformed=2)
    assert not list(Path(tmp_path).glob("models/*"))
    broken = tmp_path / "broken.txt"
    broken.write_text("How?||So. #### 1\nno bars\n")
    assert f"first {broken}:2 (expected one || and one ####)" in line("finetune_mdm_gsm8k", data_file=broken)
