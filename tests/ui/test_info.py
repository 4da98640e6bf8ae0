"""scripts/info.py and what it prints, on real files of every kind, and on files that are none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lit_gpt.checkpoints import export
from lit_gpt.config import Config
from lit_gpt.data.packed_format import PackedDatasetBuilder
from lit_gpt.files import file_sha256, write_json
from lit_gpt.model.causal import GPT
from lit_gpt.ui.info import info_as_json, path_info
from tests.support.checkpoint_files import make_model, run_record, write_run_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def info(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "info.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def make_run(folder: Path) -> Path:
    """A finished run with a whole checkpoint and a broken one."""
    folder.mkdir()
    model = make_model(GPT)
    write_run_checkpoint(folder, model, 4)
    broken = write_run_checkpoint(folder, model, 8)
    broken.write_bytes(broken.read_bytes()[:-10])
    write_json(folder / "run.json", {**run_record(model), "finished": True, "result": {"val_loss": 3.25}})
    return folder


def make_packed(folder: Path) -> Path:
    builder = PackedDatasetBuilder(folder, "train_slim", chunk_size=100, sep_token=1, vocab_size=300)
    builder.add_array(np.arange(2, 152))
    builder.write_reminder()
    return folder


def test_the_script_prints_a_table(tmp_path: Path) -> None:
    done = info(make_run(tmp_path / "arm-0.003M-1.0"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    for part in (
        "run folder",
        "arm",
        "Diff_LLaMA_0.003M",
        "val_loss: 3.25",
        "iter-000004-ckpt.pth: step 1,",
        "complete",
    ):
        assert part in done.stdout, done.stdout
    assert "iter-000008-ckpt.pth: " in done.stdout and "broken: it has" in done.stdout


def test_what_is_asked_for_most_comes_first_and_nothing_is_broken_at_the_margin(tmp_path: Path) -> None:
    model = make_model(GPT)
    record = run_record(model)
    command = "train.py " + "--flag=value " * 30
    settings = {"beta1": 0.9, "batch_size": 8, "max_steps": 20, "model": model.config.to_dict()}
    result = {"val_loss": 3.25, "val_ppl": 25.79, "val_bits_per_byte": 1.5, "val_is_bound": True}
    record |= {"settings": settings, "result": result, "command": command}
    done = info(export.export_weights(tmp_path, "some", model.state_dict(), record))
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["what", "path", "kind", "model", "shape", "validation"], lines
    assert lines[4].endswith(model.config.describe())
    assert lines[5].endswith("  <= 3.2500 nats per token, perplexity <= 25.79, <= 1.5000 bits per byte")
    assert lines[6:10] == ["settings", "  max_steps: 20", "  batch_size: 8", "  beta1: 0.9"]
    assert f"  command: {command}" in lines
    unfinished = make_run(tmp_path / "run")
    write_json(unfinished / "run.json", {**run_record(model), "finished": False, "settings": settings})
    assert re.search("^progress  +step 1 of 20, not finished$", info(unfinished).stdout, re.MULTILINE)


def test_the_script_prints_json(tmp_path: Path) -> None:
    model = make_model(GPT)
    path = export.export_weights(tmp_path, "some", model.state_dict(), run_record(model))
    done = info(path, "--json")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["what"] == "weights" and shown["kind"] == "arm" and shown["config"] == model.config.to_dict()
    assert shown["sha256"] == file_sha256(path) and shown["size"] == path.stat().st_size
    assert shown["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert shown["run"]["run_id"] == "run-a" and shown["tokenizer"]["source"] == "tok"


def test_the_script_fails_in_one_line(tmp_path: Path) -> None:
    done = info(tmp_path / "missing")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: no such file or folder: {tmp_path / 'missing'}\n"


def test_run_folder(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    shown = path_info(folder)
    assert shown["finished"] is True and shown["written by"] is None
    assert [entry["state"][:8] for entry in shown["checkpoints"]] == ["complete", "broken: "]
    assert path_info(folder / "run.json") == shown
    one = path_info(folder / "iter-000004-ckpt.pth")
    assert one["what"] == "checkpoint" and one["state"] == "complete" and one["step"] == 1 and one["kind"] == "arm"
    assert path_info(folder / "iter-000004-ckpt.json") == one
    json.loads(info_as_json(shown))


def test_published_files(tmp_path: Path) -> None:
    model = make_model(GPT, Config.from_name(6, vocab_size=64))
    torch.save({"model": model.state_dict(), "hparams": {"bs": 3}, "iter_num": 5, "step_count": 5}, tmp_path / "a.pth")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        shown = path_info(tmp_path / name)
        assert shown["kind"] == "arm" and shown["model"].startswith("Diff_LLaMA_6M (by its shapes")
    assert path_info(tmp_path / "a.pth")["settings"] == {"bs": 3}
    (tmp_path / "a.pth").unlink()
    assert path_info(tmp_path)["files"] == {"a.safetensors": (tmp_path / "a.safetensors").stat().st_size}


def test_packed_data(tmp_path: Path) -> None:
    folder = make_packed(tmp_path / "data")
    last = folder / "train_slim_0000000001.bin"
    shown = path_info(last)
    assert shown["tokens"] == 100 and shown["dtype"] == "uint16" and shown["largest id"] == 151
    assert shown["sha256"] == file_sha256(last)
    manifest = {
        "files": {"train_slim_0000000000.bin": {"tokens": 100}, last.name: {"tokens": 50}},
        "tokenizer": {"source": "tok", "vocab_size": 300},
    }
    (folder / "train_slim.manifest.json").write_text(json.dumps(manifest))
    assert path_info(last)["tokens without padding"] == 50
    whole = path_info(folder)
    assert whole["what"] == "packed folder" and whole["tokens"] == 150
    assert whole["series"]["train_slim"]["files"] == 2
    of_manifest = path_info(folder / "train_slim.manifest.json")
    assert of_manifest["what"] == "manifest" and of_manifest["tokens"] == 150 and of_manifest["files"] == 2


def test_tokenizer(tmp_path: Path) -> None:
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    folder = tmp_path / "tok"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=40, minloglevel=2, hard_vocab_limit=False
    )
    for path in (folder, folder / "tokenizer.model"):
        shown = path_info(path)
        assert shown["what"] == "tokenizer" and shown["sha256"] == file_sha256(folder / "tokenizer.model")
        assert shown["vocabulary"] > 20


def truncated_packed(folder: Path) -> Path:
    path = make_packed(folder / "data") / "train_slim_0000000000.bin"
    path.write_bytes(path.read_bytes()[:-3])
    return path


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


NONE_OF_OURS: dict[str, tuple[Any, str]] = {
    "truncated packed file": (truncated_packed, "truncated: it ends at offset 221, expected 224"),
    "another .bin": (lambda folder: written(folder, "x.bin", b"\x00" * 40), "not a packed token file"),
    "text": (lambda folder: written(folder, "x.txt", b"hello"), "nothing that this project writes"),
    "empty file": (lambda folder: written(folder, "x", b""), "nothing that this project writes"),
    "other JSON": (lambda folder: written(folder, "x.json", b"{}"), "is JSON, but nothing"),
    "a JSON list": (lambda folder: written(folder, "x.json", b"[1]"), "expected an object"),
    "broken JSON": (lambda folder: written(folder, "x.json", b"{"), "not readable as JSON"),
    "broken torch file": (lambda folder: written(folder, "x.pth", b"PK\x03\x04"), "truncated or not a torch file"),
    "broken weights": (lambda folder: written(folder, "x.safetensors", b"abc"), "truncated or not a safetensors file"),
    "empty folder": (lambda folder: folder, "holds nothing that this project writes"),
}


@pytest.mark.parametrize("case", NONE_OF_OURS)
def test_what_is_none_of_ours(tmp_path: Path, case: str) -> None:
    make_path, reason = NONE_OF_OURS[case]
    with pytest.raises(ValueError, match=reason) as raised:
        path_info(make_path(tmp_path))
    assert "\n" not in str(raised.value)
