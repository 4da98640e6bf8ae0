"""A checkpoint's chat template in the harness: questions, system instructions and few shots as turns of a dialogue."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lit_gpt import cli
from lit_gpt.checkpoints.export import WeightsRecord, export_weights
from lit_gpt.checkpoints.loaded import load_model
from lit_gpt.config import Config
from lit_gpt.data.sft_formats import CHAT_TEMPLATE, CHAT_TEMPLATES, SHAREGPT
from lit_gpt.evaluation import lm_harness
from lit_gpt.evaluation.chat_template import find_chat_template, render_chat
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.tokenizer import Tokenizer
from tests.support.small_tokenizers import train_small_tokenizer

TASK = """
task: questions
dataset_path: json
dataset_kwargs:
  data_files:
    train: {folder}/shots.jsonl
    test: {folder}/questions.jsonl
output_type: generate_until
training_split: train
test_split: test
fewshot_split: train
num_fewshot: 2
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
  do_sample: false
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A task of two questions, and MDMs with random weights: `chat`, whose record has a template, and `plain`."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "questions.yaml").write_text(TASK.format(folder=folder))
    for name, first in (("shots", "s"), ("questions", "q")):
        lines = [json.dumps({"question": f"{first}{number}?", "answer": f"a{number}"}) for number in (1, 2)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = Tokenizer(train_small_tokenizer(folder / "tokenizer"))
    model = TransEncoder(Config("tiny", 2, 2, 32, 64, 2, block_size=512, vocab_size=500))
    model.init_weights(3)
    for name, run in (("chat", {"chat_template": CHAT_TEMPLATES["vicuna"]}), ("plain", {})):
        record = WeightsRecord("mdm", model.config, run=run)
        export_weights(folder, name, model.state_dict(), record, tokenizer=tokenizer)
    return folder


def prompts(folder: Path, monkeypatch, checkpoint: str, *flags: str) -> list[str]:
    """What the model read, in the order of the questions, from the samples that the harness logs."""
    monkeypatch.setattr(sys, "argv", ["evaluate_diff.py"])
    out = folder / f"out-{len(list(folder.iterdir()))}"
    words = ["--tasks", "questions", "--include_path", str(folder), "--use_cache", "off", "--log_samples"]
    words += ["--output_path", str(out), "--model_args", f"ckpt_path={folder / checkpoint}.safetensors", *flags]
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: lm_harness.evaluate("mdlm", words))
    if end.value.code:
        return []
    (path,) = out.rglob("samples_questions_*.jsonl")
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda one: one["doc_id"])
    return [one["arguments"]["gen_args_0"]["arg_0"] for one in samples]


SYSTEM = CHAT_TEMPLATE.split(" USER:")[0]


def test_the_checkpoints_template_is_applied(folder, monkeypatch):
    assert prompts(folder, monkeypatch, "chat", "--apply_chat_template", "--num_fewshot", "0") == [
        CHAT_TEMPLATE.format(question=question) for question in ("q1?", "q2?")
    ]
    one, _ = prompts(folder, monkeypatch, "chat", "--apply_chat_template", "--fewshot_as_multiturn", "true")
    shots = {f"USER: s{number}? ASSISTANT: a{number}</s>" for number in (1, 2)}
    assert one.startswith(f"{SYSTEM} USER: ") and one.endswith("</s>USER: q1? ASSISTANT:")
    assert set(one.removeprefix(f"{SYSTEM} ").removesuffix("USER: q1? ASSISTANT:").split("USER: ")) - {""} == {
        shot.removeprefix("USER: ") for shot in shots
    }
    flags = ("--apply_chat_template", "--fewshot_as_multiturn", "false", "--system_instruction", "Be brief.")
    one, _ = prompts(folder, monkeypatch, "chat", *flags)
    assert one.startswith("Be brief. USER: s") and one.count("USER:") == one.count("ASSISTANT:") == 1
    assert "q1?" in one and "</s>" not in one


def test_without_a_template_there_is_one_line(folder, monkeypatch, capsys):
    assert not prompts(folder, monkeypatch, "plain", "--apply_chat_template")
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: --apply_chat_template: this checkpoint has no chat template; if it was fine-tuned with one, name that: "
        "--apply_chat_template vicuna"
    ]
    # Released checkpoints have no record: their template is named.
    one, _ = prompts(folder, monkeypatch, "plain", "--apply_chat_template", "vicuna", "--num_fewshot", "0")
    assert one == CHAT_TEMPLATE.format(question="q1?")


def test_the_end_of_an_answer_is_the_end_token(folder):
    loaded = load_model(folder / "chat.safetensors").reading("ids")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = render_chat(find_chat_template(loaded), messages, loaded.tokenizer.eos_text, add_generation_prompt=True)
    assert loaded.prompt_ids(text).count(loaded.tokenizer.eos_id) == 1
    # An answer that is begun is continued.
    assert render_chat(find_chat_template(loaded), messages, "</s>", add_generation_prompt=False).endswith(
        "ASSISTANT: b"
    )


def test_templates_are_hostile(folder):
    """A downloaded template reaches nothing but the messages."""
    messages = [{"role": "user", "content": "a"}]
    for template, words in (
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for %}", "cannot take these messages"),
        ("{{ messages[7]['role'] }}", "cannot take these messages"),
        ("{{ 1 / 0 }}", "cannot take these messages: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot take these messages: maximum recursion depth"),
        ("{{ range(10**9) | list }}", "cannot take these messages: Range too big"),
        ("{{ '\ud800' }}", "cannot take these messages: "),
        ("{% include 'a' %}", "cannot take these messages: "),
        ("{% unheard_of %}", "cannot take these messages: Encountered unknown tag 'unheard_of'"),
    ):
        with pytest.raises(ValueError, match=words):
            render_chat(template, messages, "</s>")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{{ m.content }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}", "a<b"),
        ("{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}", "<b"),
        ("{% generation %}{{ messages[0].content }}{% set x = 1 %}{% endgeneration %}{{ x }}", "a"),
        ("{{ strftime_now('%Y')[:2] }}", "20"),
        ("{{ messages[1] | tojson }}", '{"role": "assistant", "content": "<b"}'),
    ],
)
def test_what_templates_of_other_programs_use(template, text):
    turns = [("user", "a"), ("assistant", "<b"), ("user", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert render_chat(template, messages, "</s>") == text


def test_fine_tuning_on_dialogues_records_the_template():
    from lit_gpt.data.sft_formats import GSM8K
    from lit_gpt.training.finetuning import _chat_template

    assert _chat_template(SHAREGPT) == {"chat_template": CHAT_TEMPLATES["vicuna"]} and not _chat_template(GSM8K)
    assert render_chat(CHAT_TEMPLATES["vicuna"], [{"role": "user", "content": "Why?"}], "</s>") == CHAT_TEMPLATE.format(
        question="Why?"
    )


def test_a_tokenizers_own_template_is_found(folder):
    loaded = load_model(folder / "plain.safetensors")
    for held in ("{{ messages[0]['content'] }}!", [{"name": "default", "template": "{{ messages[0]['content'] }}!"}]):
        loaded.tokenizer.contents["tokenizer_config.json"] = json.dumps({"chat_template": held}).encode()
        assert render_chat(find_chat_template(loaded), [{"role": "user", "content": "Hm"}], "") == "Hm!"
    with pytest.raises(ValueError, match="--apply_chat_template chatml: choose from vicuna"):
        find_chat_template(loaded, "chatml")
    for held in (["x"], [1], [{"name": "tool_use", "template": "x"}], {"default": "x"}, 5):
        loaded.tokenizer.contents["tokenizer_config.json"] = json.dumps({"chat_template": held}).encode()
        with pytest.raises(ValueError, match="this checkpoint has no chat template"):
            find_chat_template(loaded)
