"""Weights from everything a user may have, exports, and the line each mistake gets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lit_gpt import files
from lit_gpt.checkpoints import export, weights
from lit_gpt.checkpoints.export import WeightsRecord
from lit_gpt.config import Config
from lit_gpt.files import file_sha256
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.model.layers import Transformer
from tests.support.checkpoint_files import TINY, make_model, run_record, write_run_checkpoint

# The published shape's layers and widths are what tells its size; a small vocabulary keeps the test small.
SIX = Config.from_name(6, vocab_size=64)


def assert_same(state: dict[str, torch.Tensor], model: Transformer) -> None:
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


# --- everything that holds weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GPT, TransEncoder])
def test_export_comes_back(tmp_path: Path, kind: type[Transformer]) -> None:
    model = make_model(kind)
    path = export.export_weights(tmp_path, "some", model.state_dict(), run_record(model))
    assert path == tmp_path / "some.safetensors" and [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded, record = weights.read_model(path)
    assert type(loaded) is kind and loaded.config == TINY and not loaded.training
    assert record is not None and record.tokenizer["source"] == "tok" and record.run_id == "run-a"
    assert WeightsRecord.from_dict(record.to_dict()) == record
    ids = torch.randint(0, 50, (2, 16))
    assert torch.equal(loaded(ids), model(ids))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    model = make_model(GPT)
    hashes = set()
    for name in "abc":
        hashes.add(file_sha256(export.export_weights(tmp_path, name, model.state_dict(), run_record(model))))
    assert len(hashes) == 1


def test_export_is_float32(tmp_path: Path) -> None:
    model = make_model(GPT).to(torch.bfloat16)
    path = export.export_weights(tmp_path, "half", model.state_dict(), run_record(model))
    state, _ = weights.load_weights(path)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert next(weights.read_model(path, dtype=torch.bfloat16)[0].parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_an_exports_permissions_follow_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    model = make_model(GPT)
    before = os.umask(mask)
    try:
        for _ in range(2):  # the second replaces the first
            path = export.export_weights(tmp_path, "ar", model.state_dict(), run_record(model))
            assert path.name == "ar.safetensors" and path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_run_folder_and_checkpoint(tmp_path: Path) -> None:
    first, second = make_model(TransEncoder, seed=1), make_model(TransEncoder, seed=2)
    path = write_run_checkpoint(tmp_path, first, 4)
    for source in (tmp_path, path):
        loaded, record = weights.read_model(source)
        assert_same(loaded.state_dict(), first)
        assert record is not None and record.kind == "mdm"
    newer = write_run_checkpoint(tmp_path, second, 8)
    assert_same(weights.load_weights(tmp_path)[0], second)
    newer.write_bytes(newer.read_bytes()[:-7])
    assert_same(weights.load_weights(tmp_path)[0], first)
    with pytest.raises(ValueError, match="cannot be used: it has"):
        weights.load_weights(newer)


def test_checkpoint_without_its_marker_knows_its_record(tmp_path: Path) -> None:
    path = write_run_checkpoint(tmp_path, make_model(TransEncoder))
    path.with_suffix(".json").unlink()
    assert weights.read_model(path)[0].config == TINY


@pytest.mark.parametrize("kind", [GPT, TransEncoder])
@pytest.mark.parametrize("prefix", ["", "_forward_module.", "module.", "_orig_mod.", "module._orig_mod."])
def test_published_pth(tmp_path: Path, kind: type[Transformer], prefix: str) -> None:
    model = make_model(kind, SIX)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"model": state, "hparams": {"bs": 3}}, tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        loaded, record = weights.read_model(tmp_path / name, model_name=6)
        assert type(loaded) is kind and record is None
        assert_same(loaded.state_dict(), model)


def test_released_safetensors_is_recognised_by_its_shapes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(TransEncoder, SIX)
    save_file(model.state_dict(), tmp_path / "mdm-6M.safetensors")
    loaded, record = weights.read_model(tmp_path / "mdm-6M.safetensors")
    assert record is None and loaded.kind == "mdm" and loaded.config.name == "Diff_LLaMA_6M"
    assert "its shapes are those of Diff_LLaMA_6M" in caplog.text
    assert_same(loaded.state_dict(), model)


def test_every_published_size_is_told_by_its_layers_and_widths() -> None:
    from lit_gpt.config import SIZES

    shapes = {(c.n_layer, c.n_embd, c.intermediate_size) for c in map(Config.from_name, SIZES)}
    assert len(shapes) == len(SIZES)


# --- mistakes -----------------------------------------------------------------------------------------------------


def fails(match: str, *arguments: Any, **named: Any) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=match) as raised:
        weights.read_model(*arguments, **named)
    assert "\n" not in str(raised.value)


def test_missing(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "there.safetensors")
    fails("no such file; .* has there.safetensors", tmp_path / "not.safetensors")
    fails("no such file .and no folder", tmp_path / "no" / "not.safetensors")
    fails("is no run folder: name one of its files .there.safetensors", tmp_path)
    (tmp_path / "empty").mkdir()
    fails("holds no complete checkpoint", tmp_path / "empty")


def test_another_kind_or_model(tmp_path: Path) -> None:
    arm, mdm = make_model(GPT, SIX), make_model(TransEncoder)
    with_record = export.export_weights(tmp_path, "mdm", mdm.state_dict(), run_record(mdm))
    torch.save(arm.state_dict(), tmp_path / "arm.pth")
    fails(
        r"holds a masked diffusion model \(mdm\), an autoregressive model \(arm\) was asked for",
        with_record,
        kind="arm",
    )
    fails(r"holds an autoregressive model \(arm\), a masked", tmp_path / "arm.pth", kind="mdm")
    fails("holds Diff_LLaMA_0.003M, Diff_LLaMA_19M was asked for", with_record, model_name=19)
    fails("has the shapes of Diff_LLaMA_6M, Diff_LLaMA_19M was asked for", tmp_path / "arm.pth", model_name="19")
    fails("unknown model size '7'", tmp_path / "arm.pth", model_name="7")
    assert weights.read_model(with_record, model_name="Diff_LLaMA_0.003M")[0].config == TINY


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    model = make_model(GPT, SIX)
    state = model.state_dict()
    name = "transformer.h.3.attn.proj.weight"
    torch.save({**state, name: torch.zeros(3, 4)}, tmp_path / "shape.pth")
    fails(rf"{name} has shape \[3, 4\], expected \[256, 256\]", tmp_path / "shape.pth", model_name=6)
    torch.save({key: value for key, value in state.items() if key != name}, tmp_path / "missing.pth")
    fails(f"{name} is missing", tmp_path / "missing.pth", model_name=6)
    torch.save({**state, "extra.bias": torch.zeros(1)}, tmp_path / "extra.pth")
    fails("1 unknown parameters, the first extra.bias", tmp_path / "extra.pth", model_name=6)
    odd = {**state, "transformer.wte.weight": torch.zeros(70, 256)}
    torch.save(odd, tmp_path / "rows.pth")
    fails("has 70 rows, lm_head.weight 64", tmp_path / "rows.pth", model_name=6)
    torch.save(make_model(GPT).state_dict(), tmp_path / "custom.pth")
    fails("does not say its model, and its shapes fit no published size: give --model", tmp_path / "custom.pth")


def test_files_of_others(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "llama.safetensors")
    fails("is no model of this family: .* found model.embed_tokens.weight", tmp_path / "llama.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    fails("truncated or not a safetensors file", tmp_path / "cut.safetensors")
    model = make_model(GPT)
    whole = export.export_weights(tmp_path, "whole", model.state_dict(), run_record(model))
    whole.write_bytes(whole.read_bytes()[:-1])
    fails("truncated or not a safetensors file", whole)
    save_file(model.state_dict(), tmp_path / "later.safetensors", {"smdm": '{"kind": "xlm"}'})
    fails("record that cannot be read", tmp_path / "later.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    fails("holds a list, expected a state dict", tmp_path / "list.pth")


def with_config(model: Transformer, **change: object) -> dict[str, str]:
    """Metadata of an export whose config says something else."""
    record = run_record(model)
    record["config"] = {**record["config"], **change}
    return {"smdm": json.dumps(record)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 1000}, "holds 2 blocks, its record says n_layer 1000"),
        ({"n_layer": 2**64}, "n_layer must be at most"),
        ({"block_size": 2**31}, "block_size must be at most"),
        ({"n_embd": 2**16}, r"lm_head.weight has shape \[64, 16\], expected \[64, 65536\]"),
        ({"vocab_size": 2**22}, r"has shape \[64, 16\]"),
        ({"intermediate_size": "32"}, "intermediate_size must be a whole number"),
        ({"n_head": 0.5}, "n_head must be a whole number"),
    ],
    ids=str,
)
def test_a_records_numbers_are_not_believed(tmp_path: Path, change: dict[str, object], message: str) -> None:
    model = make_model(GPT)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path, with_config(model, **change))
    fails(message, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": ["tok"]}, "tokenizer is no object with a source"),
        ({"tokenizer": {"source": 3}}, "tokenizer is no object with a source"),
        ({"tokenizer_files": {"tokenizer.model": 3}}, "tokenizer_files are no object of texts"),
        ({"tokenizer_files": "rubbish"}, "tokenizer_files are no object of texts"),
        ({"run_id": 7}, "run_id and name are no texts"),
        ({"kind": ["arm"]}, "names no known kind"),
        ({"config": 3}, "names no known kind and config"),
    ],
    ids=str,
)
def test_a_record_of_other_types_is_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    model = make_model(GPT)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path, {"smdm": json.dumps({**run_record(model), **change})})
    fails(message, path)
    for text in ("[1]", "3", "{", "[" * 5000, '{"kind": NaN}'):
        save_file(model.state_dict(), path, {"smdm": text})
        fails("has a record that cannot be read", path)


@pytest.mark.parametrize("value", [torch.zeros(()), torch.zeros(64), torch.zeros(1, 64, 16), torch.zeros(0, 16)])
def test_an_embedding_of_another_form(tmp_path: Path, value: torch.Tensor) -> None:
    state = make_model(GPT).state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        torch.save({**state, name: value}, tmp_path / "odd.pth")
        fails(rf"{name} has shape .*, expected a matrix", tmp_path / "odd.pth")


def test_weights_that_are_no_floats(tmp_path: Path) -> None:
    model = make_model(GPT)
    for dtype in (torch.int64, torch.bool, torch.uint8):
        state = {**model.state_dict(), "transformer.ln_f.weight": torch.ones(16, dtype=dtype)}
        save_file(state, tmp_path / "odd.safetensors", with_config(model))
        fails(f"transformer.ln_f.weight has {dtype}, expected floats", tmp_path / "odd.safetensors")


# --- starting one run from another --------------------------------------------------------------------------------


def test_mdm_starts_from_arm(tmp_path: Path) -> None:
    arm, mdm = make_model(GPT), make_model(TransEncoder, seed=3)
    path = export.export_weights(tmp_path, "arm", arm.state_dict(), run_record(arm))
    state = weights.read_weights_for(mdm, path)
    digest = weights.state_hash(state)
    mdm.load_state_dict(state)
    expected = weights.adapt_arm_to_mdm(arm.state_dict(), TINY)
    assert_same(expected, mdm)
    rows = mdm.transformer["wte"].weight
    assert rows.shape == (TINY.padded_vocab_size + 1, 16)
    assert torch.equal(rows[:-1], arm.transformer["wte"].weight)
    torch.testing.assert_close(rows[TINY.mask_id], rows[:-1].mean(0))
    assert digest == weights.state_hash(mdm.state_dict())
    assert weights.adapt_arm_to_mdm(expected, TINY) is expected
    others = [weights.read_weights_for(make_model(kind, seed=4), path) for kind in (TransEncoder, GPT)]
    assert weights.state_hash(others[0]) == digest != weights.state_hash(others[1])


def test_what_a_run_cannot_start_from(tmp_path: Path) -> None:
    mdm = make_model(TransEncoder)
    path = export.export_weights(tmp_path, "mdm", mdm.state_dict(), run_record(mdm))
    with pytest.raises(ValueError, match="an autoregressive model .arm. cannot start from it"):
        weights.read_weights_for(make_model(GPT), path)
    other = Config("other", 2, 2, 16, 32, 1, block_size=16, vocab_size=50)
    with pytest.raises(ValueError, match="is of another model: rope_table_dtype float32 there, bfloat16 here"):
        weights.read_weights_for(make_model(TransEncoder, other), path)
    wide = Config("wide", 2, 2, 32, 32, 1, block_size=16, vocab_size=50, rope_table_dtype="float32")
    with pytest.raises(ValueError, match="lm_head.weight has shape"):
        weights.read_weights_for(make_model(TransEncoder, wide), path)
    longer = Config("longer", 2, 2, 16, 32, 1, block_size=32, vocab_size=50, rope_table_dtype="float32")
    weights.read_weights_for(make_model(TransEncoder, longer), path)


# --- names of exports ---------------------------------------------------------------------------------------------


def test_another_runs_name_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = make_model(GPT)
    folder = tmp_path / "new" / "models"
    assert export.claim_export(folder, "n", "run-a", overwrite=False) == folder / "n.safetensors"
    export.export_weights(folder, "n", model.state_dict(), run_record(model, "run-a"))
    export.claim_export(folder, "n", "run-a", overwrite=False)
    with pytest.raises(ValueError, match="n.safetensors exists and is another run's: .* --overwrite"):
        export.claim_export(folder, "n", "run-b", overwrite=False)
    export.claim_export(folder, "n", "run-b", overwrite=True)


def test_a_downloaded_files_name_gets_a_number(tmp_path: Path) -> None:
    """It is not replaced, and keeps nobody from training."""
    model = make_model(GPT)
    save_file(model.state_dict(), tmp_path / "released.safetensors")
    before = (tmp_path / "released.safetensors").read_bytes()
    for run_id, name in (("run-a", "released-2.safetensors"), ("run-b", "released-3.safetensors")):
        for _ in range(2):  # the second time, the file is the run's own
            assert export.claim_export(tmp_path, "released", run_id, overwrite=False) == tmp_path / name
            written = export.export_weights(tmp_path, "released", model.state_dict(), run_record(model, run_id))
            assert written == tmp_path / name
    assert (tmp_path / "released.safetensors").read_bytes() == before
    assert export.claim_export(tmp_path, "released", "run-a", overwrite=True) == tmp_path / "released.safetensors"


def test_a_name_that_is_taken_meanwhile(tmp_path: Path) -> None:
    first, second = make_model(GPT, seed=1), make_model(GPT, seed=2)
    for run_id in ("run-a", "run-b"):
        export.claim_export(tmp_path, "n", run_id, overwrite=False)
    a = export.export_weights(tmp_path, "n", first.state_dict(), run_record(first, "run-a"))
    b = export.export_weights(tmp_path, "n", second.state_dict(), run_record(second, "run-b"))
    assert (a.name, b.name) == ("n.safetensors", "n-2.safetensors")
    assert_same(weights.load_weights(a)[0], first)
    assert_same(weights.load_weights(b)[0], second)
    # Each run finds its own again, and --overwrite takes the name.
    assert export.export_weights(tmp_path, "n", second.state_dict(), run_record(second, "run-b")) == b
    assert export.export_weights(tmp_path, "n", second.state_dict(), run_record(second, "run-b"), overwrite=True) == a
    assert_same(weights.load_weights(a)[0], second)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_export_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = make_model(GPT)
    with pytest.raises(files.SaveError, match="cannot write into the folder"):
        export.claim_export(tmp_path / "file", "n", "run-a", overwrite=False)
    with pytest.raises(files.SaveError, match="cannot write into the folder"):
        export.export_weights(tmp_path / "file", "n", model.state_dict(), run_record(model))
