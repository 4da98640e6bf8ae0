"""Tensors that users' files may hold and that no model can be: each is one line, for every way in."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.checkpoints import saving, torch_files, weights
from lit_gpt.checkpoints.export import export_weights
from lit_gpt.model.causal import GPT
from lit_gpt.training import strategies
from tests.checkpoints.test_saving import make_state, save
from tests.support.checkpoint_files import make_model, run_record, write_run_checkpoint

NAME = "transformer.h.1.mlp.swiglu.w1.weight"


def fails(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


ODD: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "sparse": (lambda value: value.to_sparse(), "holds a sparse tensor"),
    "compressed rows": (lambda value: value.to_sparse_csr(), "holds a sparse tensor"),
    "meta": (lambda value: value.to("meta"), "without data"),
    "quantized": (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "holds a quantized tensor"),
    "expanded": (lambda value: torch.zeros(1).expand(1 << 14, 1 << 14), "is expanded beyond its data"),
    "overlapping": (lambda value: torch.zeros(2000).as_strided((1000, 1001), (1, 1)), "is expanded beyond its data"),
    "complex": (lambda value: value.to(torch.complex64), "has torch.complex64, expected floats"),
    "integers": (lambda value: value.long(), "has torch.int64, expected floats"),
    "a number": (lambda value: 3, "is missing"),
    "nan": (lambda value: value * math.nan, f"{NAME} has NaN"),
    "infinite": (lambda value: value.index_fill(0, torch.tensor([3]), math.inf), f"{NAME} has infinite values"),
    "half infinite": (lambda value: (value * 1e38).half(), f"{NAME} has infinite values"),
    "empty": (lambda value: value[:0], r"has shape \[0, 16\]"),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_tensor_is_named(tmp_path: Path, case: str) -> None:
    change, message = ODD[case]
    model = make_model(GPT)
    state = model.state_dict()
    state[NAME] = change(state[NAME])
    path = tmp_path / "model.pth"
    torch.save({"model": state, "record": run_record(model)}, path)
    fails(message, lambda: weights.read_model(path))
    fails(message, lambda: weights.load_into(make_model(GPT), path))


def test_names_that_are_no_text(tmp_path: Path) -> None:
    state = make_model(GPT).state_dict()
    torch.save({**state, 3: torch.zeros(1)}, tmp_path / "odd.pth")
    fails("odd.pth: a parameter's name is 3, expected text", lambda: weights.read_model(tmp_path / "odd.pth"))
    torch.save({**state, f"module.{NAME}": state[NAME]}, tmp_path / "twice.pth")
    fails("two parameters have the same name", lambda: weights.read_model(tmp_path / "twice.pth"))


def test_many_views_of_one_storage(tmp_path: Path) -> None:
    """A small file may say that it holds a terabyte; every copy of such a tensor would take its full size."""
    storage = torch.zeros(1 << 18)
    torch.save({f"w{number}": storage.view(512, 512) for number in range(50)}, tmp_path / "views.pth")
    fails("they overlap", lambda: torch_files.open_torch_file(tmp_path / "views.pth"))
    tied = {"a": storage, "b": storage}
    torch.save(tied, tmp_path / "tied.pth")
    assert torch_files.open_torch_file(tmp_path / "tied.pth").keys() == tied.keys()


def test_lists_within_lists_do_not_multiply(tmp_path: Path) -> None:
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    torch.save({"model": value}, tmp_path / "lists.pth")
    fails("no model of this family", lambda: weights.read_model(tmp_path / "lists.pth"))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(make_model(GPT).state_dict(), path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    fails("is not a torch file as torch writes them", lambda: weights.read_model(tmp_path / "packed.pth"))


def test_files_of_old_torch_are_read(tmp_path: Path) -> None:
    state = make_model(GPT).state_dict()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = torch_files.open_torch_file(tmp_path / "old.pth")
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_export_with_numbers_that_are_not_finite(tmp_path: Path, value: float) -> None:
    model = make_model(GPT)
    state = model.state_dict()
    state[NAME][1, 2] = value
    path = export_weights(tmp_path, "bad", state, run_record(model))
    fails(f"bad.safetensors cannot be used: {NAME} has", lambda: weights.read_model(path))
    fails(f"bad.safetensors cannot be used: {NAME} has", lambda: weights.load_into(make_model(GPT), path))


def test_resuming_with_numbers_that_are_not_finite(tmp_path: Path) -> None:
    fabric = strategies.start_fabric("cpu", "1", 1, "auto", "32-true")
    state = make_state(fabric)
    with torch.no_grad():
        state["model"].transformer["ln_f"].weight[3] = math.nan
    path = save(fabric, tmp_path, state)
    fails("transformer.ln_f.weight has NaN", lambda: saving.load_checkpoint(fabric, path, make_state(fabric)))


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.pth"):
        os.mkfifo(tmp_path / name)
        fails("is no regular file but a pipe", lambda name=name: weights.read_model(tmp_path / name))  # type: ignore[misc]
    path = write_run_checkpoint(tmp_path, make_model(GPT))
    path.with_suffix(".json").unlink()
    os.mkfifo(path.with_suffix(".json"))
    fails("its marker iter-000004-ckpt.json is damaged: .* is no regular file", lambda: weights.read_model(path))
