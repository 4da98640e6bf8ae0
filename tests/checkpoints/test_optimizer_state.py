"""Optimizer states that users bring: what does not fit the model is one line, before the optimizer sees it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.checkpoints import saving
from lit_gpt.training import strategies
from tests.checkpoints.test_saving import make_state, save, train_step


@pytest.fixture(scope="module")
def fabric() -> Any:
    return strategies.start_fabric("cpu", "1", 1, "auto", "32-true")


class Changed:
    """An optimizer that says it has another state."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def state_dict(self) -> Any:
        return self._state


def put(entry: str, value: Any, number: Any = 0) -> Callable[[Any], None]:
    return lambda saved: saved["state"][number].__setitem__(entry, value)


def change(entry: str, function: Callable[[torch.Tensor], Any]) -> Callable[[Any], None]:
    return lambda saved: saved["state"][0].__setitem__(entry, function(saved["state"][0][entry]))


def fill_one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def filled(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[7] = value
        return tensor

    return filled


CASES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "short": (put("exp_avg", torch.zeros(1)), r"exp_avg of lm_head.weight has shape \[1\], expected \[64, 16\]"),
    "transposed": (change("exp_avg_sq", lambda value: value.t()), r"has shape \[16, 64\], expected \[64, 16\]"),
    "integers": (change("exp_avg", lambda value: value.long()), "a tensor of torch.int64, expected a tensor of floats"),
    "sparse": (change("exp_avg", lambda value: value.to_sparse()), "exp_avg of lm_head.weight|sparse"),
    "a list": (put("exp_avg", [0.0]), "is a list, expected a tensor"),
    "missing": (lambda saved: saved["state"][0].pop("exp_avg_sq"), "exp_avg_sq of lm_head.weight is missing"),
    "another": (put("max_exp_avg_sq", torch.zeros(1)), "unknown entry max_exp_avg_sq"),
    "nan": (change("exp_avg", fill_one(math.nan)), "values from nan to nan"),
    "infinite": (change("exp_avg_sq", fill_one(math.inf)), "to inf"),
    "beyond a square": (change("exp_avg", fill_one(3e38)), r"to 3\.\d+e\+38"),
    "negative square": (change("exp_avg_sq", fill_one(-1.0)), "values from -1.0"),
    "steps": (put("step", torch.zeros(64, 16)), "step of lm_head.weight is"),
    "step nan": (put("step", torch.tensor(math.nan)), "step of lm_head.weight is"),
    "step huge": (put("step", 10**400), "step of lm_head.weight is 1000"),
    "step text": (put("step", "2"), "step of lm_head.weight is 2, expected a number"),
    "entries": (lambda saved: saved["state"].__setitem__(0, [1]), "that of lm_head.weight is missing"),
    "a parameter less": (lambda saved: saved["state"].pop(3), r"that of transformer\S+ is missing"),
    "a parameter more": (lambda saved: saved["state"].__setitem__(99, {}), "unknown parameter 99"),
    "no parameters": (lambda saved: saved["state"].clear(), "that of lm_head.weight is missing"),
    "no state": (lambda saved: saved.pop("state"), "no state and param_groups"),
    "groups": (lambda saved: saved.__setitem__("param_groups", {}), "no state and param_groups"),
    "no group": (lambda saved: saved["param_groups"].clear(), "0 parameter groups, expected 1"),
    "group's list": (lambda saved: saved["param_groups"][0].pop("params"), "names other parameters"),
    "group's members": (lambda saved: saved["param_groups"][0].update(params=[0, 0]), "names other parameters"),
    "betas": (lambda saved: saved["param_groups"][0].update(betas="ab"), "its betas is ab"),
    "decay": (lambda saved: saved["param_groups"][0].update(weight_decay=math.nan), "its weight_decay is nan"),
    "no eps": (lambda saved: saved["param_groups"][0].pop("eps"), "its eps is None"),
    "amsgrad": (lambda saved: saved["param_groups"][0].update(amsgrad=True), "its amsgrad is True"),
    "no switch": (lambda saved: saved["param_groups"][0].update(maximize=None), "its maximize is None"),
    "growing mean": (lambda saved: saved["param_groups"][0].update(betas=(1.5, 0.9)), r"its betas is \(1.5, 0.9\)"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_one_line(fabric: Any, tmp_path: Path, case: str) -> None:
    """A moment of another shape once made the optimizer write past its end, which ended the process."""
    damage, message = CASES[case]
    state = make_state(fabric)
    saved = state["optimizer"].state_dict()
    saved = {
        "state": {key: dict(value) for key, value in saved["state"].items()},
        "param_groups": saved["param_groups"],
    }
    damage(saved)
    path = save(fabric, tmp_path, {**state, "optimizer": Changed(saved)})
    restored = make_state(fabric, seed=9, steps=0)
    before = {name: value.clone() for name, value in restored["model"].state_dict().items()}
    with pytest.raises(ValueError, match=message) as raised:
        saving.load_checkpoint(fabric, path, restored)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value) and len(str(raised.value)) < 600
    assert all(torch.equal(value, before[name]) for name, value in restored["model"].state_dict().items())


def test_numbers_of_steps_and_older_groups_are_read(fabric: Any, tmp_path: Path) -> None:
    """Plain numbers as steps, and a group without the switches of later versions of torch, are what older files have."""
    state = make_state(fabric)
    saved = state["optimizer"].state_dict()
    for entries in saved["state"].values():
        entries["step"] = float(entries["step"])
    for switch in ("decoupled_weight_decay", "capturable", "foreach", "fused"):
        saved["param_groups"][0].pop(switch, None)
    path = save(fabric, tmp_path, {**state, "optimizer": Changed(saved)})
    restored = make_state(fabric, seed=9, steps=0)
    saving.load_checkpoint(fabric, path, restored)
    restored.update(step_count=2, iter_num=8)
    state = make_state(fabric)
    train_step(fabric, state)
    train_step(fabric, restored)
    for name, value in state["model"].state_dict().items():
        torch.testing.assert_close(restored["model"].state_dict()[name], value)


@pytest.mark.parametrize("content", [[1], {"model": {}}, None], ids=["list", "keys", "none"])
def test_a_file_with_other_contents(fabric: Any, tmp_path: Path, content: Any) -> None:
    state = make_state(fabric)
    path = save(fabric, tmp_path, state)
    torch.save(content, path)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="lacks model|lacks optimizer") as raised:
        saving.load_checkpoint(fabric, path, state)
    assert "\n" not in str(raised.value)
