"""Results that users have on the disk are found again: what decides a result is spelled out as it is in their caches."""

from __future__ import annotations

import json
import re
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate_fineweb
from lit_gpt.checkpoints.loaded import LoadedModel, load_model
from lit_gpt.data.packed_format import PackedDatasetBuilder
from lit_gpt.evaluation import lm_adapter, lm_harness
from lit_gpt.evaluation.lm_adapter import Adapter
from lit_gpt.evaluation.result_cache import EvalCache, request_key
from lit_gpt.evaluation.settings import read_model_args
from lit_gpt.files import SaveError
from lit_gpt.likelihood import loglikelihood
from lit_gpt.likelihood.monte_carlo import MonteCarlo
from tests.support.small_models import export_arm_and_mdm

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 16
OF_THE_MODEL = ("checkpoint", "config", "tokenizer_hash")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An ARM and an MDM with random weights, their tokenizer, and packed tokens."""
    folder = tmp_path_factory.mktemp("models")
    export_arm_and_mdm(folder)
    (folder / "new").mkdir()
    builder = PackedDatasetBuilder(folder / "new", "validation", chunk_size=LENGTH * 4, sep_token=1, vocab_size=500)
    builder.add_array([2] * LENGTH * 2)
    builder.write_reminder()
    return folder


def settings_of(cache: Path, without: tuple[str, ...]) -> dict[str, object]:
    """What the only file of a cache says in its first line; the model's own part must be there, and is left out."""
    (path,) = cache.glob("*.jsonl")
    settings = json.loads(path.read_text().splitlines()[0])
    assert EvalCache(cache, settings).path == path
    for name in without:
        assert settings.pop(name)
    return settings


HARNESS = {
    "arm": (
        "arm",
        {"seed": 7},
        {"estimator": "exact (left to right)", "seed": 7, "generation": ["greedy", None, 0.0]},
    ),
    "mc": (
        "mdm",
        {},
        {"estimator": "mc", "mc_num": 1024, "eps": 0.0, "cfg_scale": 0.0, "greedy": False, "pad_to": 0, "seed": 1234},
    ),
    "chain_rule": (
        "mdm",
        {"nll_type": "chain_rule", "greddy": True, "cfg": 1.1, "padding": True, "mc_num": 5, "budget": 6},
        {"estimator": "chain_rule", "eps": 0.0, "cfg_scale": 1.1, "greedy": True, "pad_to": 128, "seed": 1234},
    ),
    "exact": (
        "mdm",
        {"nll_type": "exact", "budget": 9, "mc_num": 5, "alg": "origin", "steps": 4, "temperature": 0.5},
        {"estimator": "exact", "budget": 9, "eps": 0.0, "cfg_scale": 0.0, "greedy": False, "pad_to": 0, "seed": 1234,
         "generation": ["origin", 4, 0.5]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HARNESS)
def test_likelihoods_of_the_harness(folder, tmp_path, name):
    kind, given, expected = HARNESS[name]
    (path,) = (folder / kind).glob("*.safetensors")
    arguments = read_model_args(kind, {"ckpt_path": str(path), "dtype": "float32", **given})
    adapter = Adapter(kind, arguments, tmp_path, ["evaluate"])
    adapter.loglikelihood([SimpleNamespace(args=("My lord,", " what news?"))])
    adapter.close()
    common = {"kind": kind, "max_length": 128, "dtype": "float32", "generation": ["greedy", None, 0.0]}
    own = {} if kind == "arm" else {expected["estimator"]: 1}
    common |= {"device": "cpu", "computed_by": {"scoring": 1, "tokenization": 1, **own}}
    common["special_tokens"] = "ids"
    assert settings_of(tmp_path, OF_THE_MODEL) == {**common, **expected}


@pytest.mark.parametrize(
    ("kind", "words", "expected"),
    [
        ("arm", (), {}),
        ("mdm", ("--mc-samples", "4"), {"estimator": "mc", "samples": 4, "seed": 1234}),
        (
            "mdm",
            ("--estimator", "exact", "--mc_samples", "3", "--seed", "5"),
            {"estimator": "exact", "samples": 3, "seed": 5},
        ),
    ],
    ids=["arm", "mc", "exact"],
)
def test_rows_of_fineweb(folder, tmp_path, monkeypatch, kind, words, expected):
    (path,) = (folder / kind).glob("*.safetensors")
    flags = ["--type", kind, "--ckpt-path", str(path), "--data-dir", str(folder), "--fineweb", "new", "--length", "16"]
    monkeypatch.setattr(sys, "argv", ["evaluate_fineweb.py", *flags, "--cache", str(tmp_path), *words])
    evaluate_fineweb.main()
    versions = {"scoring": 1, **({} if kind == "arm" else {expected["estimator"]: 1})}
    common = {"dtype": "float32", "length": 16, "device": "cpu", "computed_by": versions}
    assert settings_of(tmp_path, ("checkpoint", "config")) == {**common, **expected}


def test_tokens_of_another_tokenizer_are_refused(folder, tmp_path, monkeypatch):
    """Their perplexity was that of other texts."""
    for kind in ("arm", "mdm"):
        (path,) = (folder / kind).glob("*.safetensors")
        shutil.copytree(folder / "new", tmp_path / "other", dirs_exist_ok=True)
        manifest = tmp_path / "other" / "validation.manifest.json"
        flags = ["--type", kind, "--ckpt-path", str(path), "--data-dir", str(tmp_path), "--fineweb", "other"]
        words = [*flags, "--length", "16", "--cache", "off", "--mc-samples", "2"]
        monkeypatch.setattr(sys, "argv", ["evaluate_fineweb.py", *words])
        content = {"tokenizer": {"source": "t", "fingerprint": "0" * 64}}
        manifest.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"other was packed with another tokenizer \(SHA-256 000000000000\.\.\.\)"):
            evaluate_fineweb.main()
        content["tokenizer"]["fingerprint"] = load_model(path).tokenizer.fingerprint
        manifest.write_text(json.dumps(content))
        evaluate_fineweb.main()


@pytest.mark.parametrize(
    "changed",
    [
        (MonteCarlo, "version", 2),
        (loglikelihood, "SCORING_VERSION", 2),
        (lm_adapter, "TOKENIZATION_VERSION", 2),
        (LoadedModel, "device", torch.device("meta")),
    ],
    ids=["estimator", "scoring", "tokenization", "device"],
)
def test_what_another_version_or_device_computed_is_not_served(folder, tmp_path, monkeypatch, changed):
    """A likelihood of a former estimator was served for ever, and a GPU's to a CPU."""
    (path,) = (folder / "mdm").glob("*.safetensors")
    arguments = read_model_args("mdm", {"ckpt_path": str(path)})
    before = Adapter("mdm", arguments, tmp_path, ["evaluate"])
    before.close()
    with monkeypatch.context() as patch:
        patch.setattr(*changed)
        Adapter("mdm", arguments, tmp_path, ["evaluate"]).close()
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_an_output_path_that_is_added_later_finds_the_work(folder, tmp_path, monkeypatch, capsys):
    """The results lay in the user's cache, and the same command with --output_path computed them again."""
    (path,) = (folder / "arm").glob("*.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["evaluate_ar.py"])
    words = ["--tasks", "next_line", "--include_path", "tasks", "--limit", "2", "--model_args", f"ckpt_path={path}"]
    lm_harness.evaluate("ar", words)
    assert "were there already" not in capsys.readouterr().out
    lm_harness.evaluate("ar", [*words, "--output_path", str(tmp_path / "out")])
    assert re.search(r"(\d+) of \1 results were there already", capsys.readouterr().out)
    (record,) = (tmp_path / "out").rglob("results_*.json")
    assert sum(json.loads(record.read_text())["config"]["results_by_commit"].values()) > 2


def test_a_full_disk_names_the_file(tmp_path):
    cache = EvalCache(tmp_path, {"a": 1})
    assert cache.path is not None
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(SaveError, match=f"^cannot write {cache.path}: File too large"):
            cache.add([("key", "x" * 200)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_names_of_files_and_keys_of_results(tmp_path):
    settings = {"estimator": "mc", "mc_num": 1024, "eps": 0.0, "greedy": False, "config": {"n_layer": 2}}
    assert EvalCache(tmp_path, settings).path == tmp_path / "42a2b8000129729e.0.jsonl"
    assert request_key("likelihood", (1, 2, 3), (4,)) == "cc1d592c42ba93be8326e2b5ce62e04d"
    assert request_key("row", 0, (), (4, 5)) == "d85f5b273f2e7dba0442b557429c46fb"
    assert request_key("generate", "ROMEO:", {"until": ["\n"]}) == "c0c8b28ccdedbc7f12cf8c2b6a0e3404"
