"""An exported model holds its tokenizer: the file alone evaluates, samples and chats, wherever it is taken."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate_gsm8k
from lit_gpt import cli, load_model
from lit_gpt.checkpoints.export import METADATA_KEY, WeightsRecord, export_weights, read_record, tokenizer_name
from lit_gpt.checkpoints.tokenizer_lookup import find_tokenizer, open_tokenizer
from lit_gpt.config import Config
from lit_gpt.evaluation.lm_adapter import Adapter
from lit_gpt.evaluation.settings import read_model_args
from lit_gpt.files import file_sha256
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.ui.info import path_info
from scripts import chat
from tests.support.small_tokenizers import convert_to_tokenizer_json, train_small_tokenizer

TEXTS = ["To be, or not to be", "déjà vu   naïve\n2048", ""]


def export(folder: Path, kind: type, tokenizer: Tokenizer | None, **recorded: object) -> Path:
    """A small model with random weights; without a tokenizer it is as older files are."""
    model = kind(Config("tiny", 2, 2, 32, 64, 2, block_size=64, vocab_size=500))
    model.init_weights(3)
    record = WeightsRecord(model.kind, model.config, dict(recorded), {"run_id": "a"})
    return export_weights(folder, model.kind, model.state_dict(), record, tokenizer=tokenizer)


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def alone(request, tmp_path_factory) -> dict[str, Path]:
    """An ARM's and an MDM's file, each alone in a folder; what they were made from is gone."""
    made = tmp_path_factory.mktemp("made")
    folder = train_small_tokenizer(made / "tokenizer")
    if request.param == "tokenizer.json":
        folder = convert_to_tokenizer_json(folder, made / "json")
    paths = {}
    for kind in (GPT, TransEncoder):
        path = export(made, kind, Tokenizer(folder))
        paths[kind.kind] = Path(shutil.copy(path, tmp_path_factory.mktemp(kind.kind)))
    shutil.rmtree(made)
    return paths


def run_script(monkeypatch, capsys, main, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_the_file_alone_evaluates_samples_and_chats(alone, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = alone[kind]
    model = load_model(path)
    assert (model.loglikelihood("To be, or", " not to be").nats < 0) and model.tokenizer.source == str(path)
    adapter = Adapter(kind, read_model_args(kind, {"ckpt_path": str(path)}), None, ["evaluate"])
    assert adapter.get_model_info()["tokenizer_hash"] == model.tokenizer.fingerprint
    code, out, _ = run_script(monkeypatch, capsys, chat.main, "--ckpt_path", str(path), "--prompt", "To be")
    assert code == 0 and out.startswith("To be") and len(out) > 10
    Path("questions.jsonl").write_text(json.dumps({"question": "1 + 1?", "target": "2"}) + "\n")
    words = ("--ckpt_path", str(path), "--data", "questions.jsonl", "--length", "32", "--steps", "4")
    code, out, _ = run_script(monkeypatch, capsys, evaluate_gsm8k.main, *words)
    assert code == 0 and out.splitlines()[-1] == "Acc: 0.0"


def test_the_tokenizer_inside_is_the_one_that_went_in(tmp_path):
    folder = train_small_tokenizer(tmp_path / "tokenizer")
    for source in (folder, convert_to_tokenizer_json(folder, tmp_path / "json")):
        tokenizer = Tokenizer(source)
        path = export(tmp_path / source.name / "model", GPT, tokenizer)
        held = open_tokenizer(str(path))
        assert held.contents == tokenizer.contents and held.fingerprint == tokenizer.fingerprint
        for text in TEXTS:
            assert held.encode_ids(text) == tokenizer.encode_ids(text)
            assert held.decode(held.encode_ids(text)) == text
        record = read_record(path)
        assert record.tokenizer == {"source": str(source), "fingerprint": tokenizer.fingerprint}
        assert record.run == {"run_id": "a"} and WeightsRecord.from_dict(record.to_dict()) == record


def test_equal_models_are_equal_files(tmp_path):
    tokenizer = Tokenizer(convert_to_tokenizer_json(train_small_tokenizer(tmp_path / "tokenizer"), tmp_path / "json"))
    paths = [export(tmp_path / name, GPT, tokenizer) for name in ("a", "b", "c")]
    assert len({file_sha256(path) for path in paths}) == 1


def test_what_a_file_holds_is_said(alone):
    for path in alone.values():
        tokenizer = open_tokenizer(str(path))
        shown = path_info(path)["tokenizer"]
        assert shown["inside"] == {name: len(content) for name, content in tokenizer.contents.items()}
        assert shown["sha256"] == shown["fingerprint"] == tokenizer.fingerprint


# --- files of older versions ------------------------------------------------------------------------------------------


def find(path: Path, given: str | None = None) -> Tokenizer:
    record = read_record(path)
    return find_tokenizer(path, record.config, record, given)


def test_an_older_file_looks_at_its_record_and_beside_itself(tmp_path, caplog):
    recorded = train_small_tokenizer(tmp_path / "tokenizer", 450)
    fingerprint = Tokenizer(recorded).fingerprint
    path = export(tmp_path / "model", GPT, None, source=str(recorded), fingerprint=fingerprint)
    beside = train_small_tokenizer(tmp_path / "model", 400)
    assert find(path).source == str(recorded), "another tokenizer beside it is passed over"
    # Another one has taken the recorded one's place: the right one beside the file counts.
    shutil.copy(recorded / "tokenizer.model", beside / "tokenizer.model")
    train_small_tokenizer(recorded, 420)
    assert find(path).source == str(beside) and not caplog.records
    # Only wrong ones: refused.
    (beside / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=f"^{recorded} is another tokenizer than the one that {path} was trained with"):
        find(path)
    shutil.rmtree(recorded)
    with pytest.raises(FileNotFoundError, match="which the checkpoint was trained with; --tokenizer FOLDER, or token"):
        find(path)


def test_a_given_tokenizer_is_compared_by_its_fingerprint(tmp_path):
    """One of the right size was taken, and every id meant another text."""
    folder, other = (train_small_tokenizer(tmp_path / str(lines), 500, lines) for lines in (4000, 2000))
    own, converted = Tokenizer(folder), convert_to_tokenizer_json(folder, tmp_path / "json")
    assert own.vocab_size == Tokenizer(other).vocab_size
    holds, names = export(tmp_path, GPT, own), export(tmp_path / "old", GPT, None, fingerprint=own.fingerprint)
    for path in (holds, names):
        assert find(path, str(folder)).fingerprint == own.fingerprint
        with pytest.raises(
            ValueError, match=f"^{other} is another tokenizer than the one that {path} was trained with"
        ):
            find(path, str(other))
    # The same one in its other form is the same, where the file holds one of them; of a folder with both, either counts.
    assert find(holds, str(converted)).source == str(converted)
    in_json = export(tmp_path / "in_json", GPT, None, fingerprint=Tokenizer(converted).fingerprint)
    shutil.copy(converted / "tokenizer.json", folder)
    assert find(in_json, str(folder)).fingerprint == Tokenizer(converted).fingerprint
    assert find(names, str(folder)).fingerprint == own.fingerprint


def test_an_emptied_folder_does_not_hide_the_tokenizer_beside_the_file(tmp_path):
    recorded = train_small_tokenizer(tmp_path / "tokenizer")
    path = export(tmp_path / "model", GPT, None, source=str(recorded), fingerprint=Tokenizer(recorded).fingerprint)
    (tmp_path / "model" / "tokenizer.model").write_bytes((recorded / "tokenizer.model").read_bytes())
    (recorded / "tokenizer.model").unlink()
    assert find(path).source == str(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=f"^{recorded}: this folder has no .*which the checkpoint was trained"):
        find(path)
    # Where the one beside it is another, that is what is wrong.
    beside = train_small_tokenizer(tmp_path / "model", 400)
    with pytest.raises(ValueError, match=f"^{beside} is another tokenizer than"):
        find(path)


def test_a_damaged_second_form_does_not_matter_where_the_first_is_right(tmp_path):
    folder = train_small_tokenizer(tmp_path / "tokenizer")
    path = export(tmp_path, GPT, None, fingerprint=Tokenizer(folder).fingerprint)
    (folder / "tokenizer.json").write_text("{}")
    assert find(path, str(folder)).source == str(folder)


def test_a_folder_that_is_gone_is_not_asked_for_on_the_hub(tmp_path, monkeypatch):
    """`data/tokenizer` could be somebody's there; a name on the hub is recorded as one."""
    asked = []

    def download(name: str, filename: str) -> str:
        asked.append(name)
        raise EntryNotFoundError("none")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for source in ("data/tokenizer", "tokenizer"):
        path = export(tmp_path / source, GPT, None, source=source, fingerprint="0" * 64)
        with pytest.raises(
            FileNotFoundError, match=f"^{source}: no such tokenizer here .which the checkpoint was train"
        ):
            find(path)
    assert not asked
    path = export(tmp_path / "hub", GPT, None, source="owner/name", fingerprint="0" * 64, hub=True)
    with pytest.raises(FileNotFoundError, match="the hub could not give it"):
        find(path)
    assert set(asked) == {"owner/name"}
    tokenizer = Tokenizer(train_small_tokenizer(tmp_path / "local"))
    assert tokenizer_name(tokenizer) == {"source": str(tmp_path / "local"), "fingerprint": tokenizer.fingerprint}
    tokenizer.source = "owner/name"
    assert tokenizer_name(tokenizer) == {"source": "owner/name", "fingerprint": tokenizer.fingerprint, "hub": True}


def test_a_file_without_a_record_looks_beside_itself(tmp_path):
    path = export(tmp_path, GPT, None)
    save_file(load_file(path), path)
    assert read_record(path) is None
    train_small_tokenizer(tmp_path)
    assert find_tokenizer(path, Config.from_name(6), None).source == str(tmp_path)


def test_another_models_tokenizer_can_be_given(alone, tmp_path):
    path = export(tmp_path, GPT, None, source="nowhere/at/all")
    assert find(path, str(alone["mdm"])).source == str(alone["mdm"])
    with pytest.raises(FileNotFoundError, match="this model has no tokenizer inside"):
        find(path, str(path))


def test_a_damaged_tokenizer_is_refused(alone, tmp_path):
    for name, change in {
        "cut": lambda files: {key: text[:-3] for key, text in files.items()},
        "other": lambda files: dict.fromkeys(files, "AAAA"),
        "foreign": lambda files: {"words.txt": "AAAA"},
    }.items():
        path = tmp_path / f"{name}.safetensors"
        with safe_open(alone["arm"], framework="pt") as file:
            record = json.loads(file.metadata()[METADATA_KEY])
        record["tokenizer_files"] = change(record["tokenizer_files"])
        save_file(load_file(alone["arm"]), path, {METADATA_KEY: json.dumps(record)})
        with pytest.raises(ValueError, match=f"the tokenizer inside {path}"):
            find(path)
        assert "broken" in path_info(path)["tokenizer"]["inside"]


def test_a_very_large_tokenizer_is_only_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_gpt.checkpoints.export._LARGEST_TOKENIZER", 1000)
    tokenizer = Tokenizer(train_small_tokenizer(tmp_path / "tokenizer"))
    record = read_record(export(tmp_path, GPT, tokenizer))
    assert record.tokenizer_files == {} and record.tokenizer["fingerprint"] == tokenizer.fingerprint
