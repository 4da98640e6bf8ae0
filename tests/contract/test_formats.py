"""docs/formats.md names every key, column and tensor that the code writes into a user's files."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from lit_gpt.config import Config
from lit_gpt.evaluation.mt_bench.benchmark_files import MtBenchQuestion, answer_line
from lit_gpt.evaluation.mt_bench.judging import JudgePrompt, Match, judgment_line
from tests.support.small_tokenizers import train_small_tokenizer
from tests.support.training_runs import make_packed_data, read_metrics, run_pretraining, script_command

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([^`]+)`", PAGE))


def unnamed(names) -> set[str]:
    """Names that the page lacks; the number of a layer is N there."""
    found = {re.sub(r"\.h\.\d+\.", ".h.N.", name) for name in names}
    assert found
    return found - NAMED


def test_a_runs_files(tmp_path):
    make_packed_data(tmp_path / "data")
    run_pretraining("train_mdm.py", tmp_path, max_steps=2)
    (run,) = tmp_path.glob("workdir/scaling_debug/*/run.json")
    record = json.loads(run.read_text())
    assert not unnamed(record) and not unnamed(record["config"]) and not unnamed(record["tokenizer"])
    (checkpoint,) = run.parent.glob("iter-*-ckpt.pth")
    content = torch.load(checkpoint, weights_only=True)
    assert not unnamed(content) and not unnamed(content["model"]) and not unnamed(content["record"])
    assert not unnamed(content["record"]["run"])
    assert not unnamed(json.loads(checkpoint.with_suffix(".json").read_text()))
    assert not unnamed(read_metrics(tmp_path)[0])
    (export,) = tmp_path.glob("models/*.safetensors")
    with safe_open(export, framework="pt") as file:
        assert not unnamed(file.metadata()) and not unnamed(file.keys())
        said = json.loads(file.metadata()["smdm"])
        assert not unnamed(said) and not unnamed(said["tokenizer"])
        assert said.keys() == record.keys() - {"finished", "log_path"}
    assert Config.from_dict(said["config"]).to_dict() == said["config"]
    assert record["result"].keys() - said["result"].keys() == {"export"}


def test_packed_tokens_and_their_manifest(tmp_path):
    train_small_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("To be, or not to be.\n" * 9)
    flags = {"source_path": "text.txt", "tokenizer_path": "tokenizer", "destination_path": "out", "chunk_size": 64}
    subprocess.run([sys.executable, *script_command("scripts/prepare_text.py", **flags)], cwd=tmp_path, check=True)
    (manifest,) = tmp_path.glob("out/*.manifest.json")
    found = json.loads(manifest.read_text())
    assert not unnamed(found) and not unnamed(found["tokenizer"])
    for name, entry in found["files"].items():
        assert not unnamed(entry)
        raw = (tmp_path / "out" / name).read_bytes()
        # The table's offsets, and the codes of the types that preparations choose.
        assert (raw[:7], *struct.unpack("<QBQ", raw[7:24])) == (b"LITPKDS", 1, 8, 64) and len(raw) == 24 + 2 * 64
    assert "1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16" in PAGE


def test_lines_of_mt_bench():
    answer = answer_line(MtBenchQuestion(81, "writing", ("Write.", "Again.")), "model", ["text"])
    assert not unnamed(answer) and not unnamed(answer["choices"][0])
    prompt = JudgePrompt("single-v1", "", "")
    for models in (("a",), ("a", "b")):
        match = Match(81, models, 1, prompt, ("ask",) * len(models))
        assert not unnamed(judgment_line(match, "judge", ["[[7]]"] * len(models)))
