"""AdamW's state from a checkpoint, checked against the model before the optimizer sees it.

torch's optimizers take any state: a moment of another shape makes the fused step write past its end, which ends the
process, and NaN in a moment spoils every later step. Decision: what is returned holds nothing but what was checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Whole numbers may be larger than any float.
_LARGEST_NUMBER = 1e300
# Of a mean of gradients: the mean of the squares of larger ones is beyond float32 (about 1.8e19 squared).
_LARGEST_MEAN = 1e20
MOMENTS = ("exp_avg", "exp_avg_sq")
_ENTRIES = ("step", *MOMENTS)
# Settings of a parameter group that decide how a step is computed, not what: the current ones stay.
_MATTERS_OF_SPEED = ("fused", "foreach")


def read_optimizer_state(
    source: Path | str, saved: Any, module: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> dict[str, Any]:
    """An AdamW's state dict with parameters by number, as torch's optimizers read it.

    Args:
        source: the file, for messages.
        saved: what the file holds under `optimizer`: parameters by number, or by name as FSDP2 keeps them. Moments on
            the meta device stand for those that are read later, and then checked by `check_moment`.
        module: the model; its parameters have the shapes that the moments must have.
        optimizer: the one to restore.
        step: optimizer steps that the file says were done; only at 0 there need be no moments.

    Returns:
        `state` and `param_groups`; the moments may be mapped from the file.

    Raises:
        ValueError: an entry is missing, or is not of the parameter's shape, not finite ...; the first is named.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ordered = [names[parameter] for parameter in parameters]
    try:
        groups = _numbered_groups(saved, ordered, optimizer.param_groups)
        state = saved["state"]
        if not isinstance(state, dict):
            raise ValueError(f"its state is a {type(state).__name__}")
        by_name = any(isinstance(key, str) for key in state)
        if not state and step == 0:
            return {"state": {}, "param_groups": groups}
        unknown = [key for key in state if key not in (ordered if by_name else range(len(ordered)))]
        if unknown:
            raise ValueError(f"it has an unknown parameter {_shown(unknown[0])}")
        read = {
            number: _read_entries(name, state.get(name if by_name else number), parameter)
            for number, (name, parameter) in enumerate(zip(ordered, parameters, strict=True))
        }
    except ValueError as error:
        raise misfit(source, error) from error
    return {"state": read, "param_groups": groups}


def misfit(source: Path | str, reason: ValueError) -> ValueError:
    """The line about a state that cannot be restored."""
    return ValueError(
        f"checkpoint {source}: its optimizer state does not fit this model ({' '.join(str(reason).split())})"
    )


def keep_speed(optimizer: torch.optim.Optimizer, before: Sequence[dict[str, Any]]) -> None:
    """Give an optimizer back, after its state was loaded elsewhere, what made its steps fast.

    Args:
        optimizer: restored.
        before: its parameter groups before that.
    """
    for group, earlier in zip(optimizer.param_groups, before, strict=True):
        group.update({key: earlier[key] for key in _MATTERS_OF_SPEED if key in earlier})
        for parameter in group["params"]:
            entries = optimizer.state.get(parameter)
            if entries and group.get("fused"):
                # A fused step counts its steps on the device.
                entries["step"] = entries["step"].to(parameter.device, torch.float32)


def _numbered_groups(saved: Any, ordered: list[str], current: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved parameter groups, checked, with parameters by number."""
    if not isinstance(saved, dict) or not isinstance(saved.get("state", None), dict):
        raise ValueError("it has no state and param_groups")
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("it has no state and param_groups")
    if len(groups) != len(current):
        raise ValueError(f"it has {len(groups)} parameter groups, expected {len(current)}")
    number: dict[int | str, int] = {name: index for index, name in enumerate(ordered)}
    number |= {index: index for index in range(len(ordered))}
    result, first = [], 0
    for group, now in zip(groups, current, strict=True):
        keys, count = group.get("params"), len(now["params"])
        known = isinstance(keys, list) and all(type(key) in (int, str) and key in number for key in keys)
        if not known or sorted(number[key] for key in keys) != list(range(first, first + count)):
            raise ValueError("a parameter group names other parameters")
        first += count
        _check_settings(group, now)
        speed = {key: now[key] for key in _MATTERS_OF_SPEED if key in now}
        result.append({**group, **speed, "params": sorted(number[key] for key in keys)})
    return result


def _check_settings(group: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a group whose settings AdamW cannot compute with."""
    for key, value in now.items():
        if key == "params" or (key not in group and isinstance(value, bool | None)):
            continue
        found = group.get(key)
        if key in _MATTERS_OF_SPEED:
            good = isinstance(found, bool | None)
        elif isinstance(value, bool | None):
            good = found is value
        elif isinstance(value, tuple | list):  # shares of running means
            good = isinstance(found, tuple | list) and len(found) == len(value) and all(map(_is_share, found))
        else:
            good = _is_number(found)
        if not good:
            raise ValueError(f"its {key} is {_shown(found)}, such as {value} expected")


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number of at least 0."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and not value.is_meta:
        value = value.item()
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _LARGEST_NUMBER


def _is_share(value: Any) -> bool:
    """Whether a value is a number from 0 to below 1."""
    return _is_number(value) and value < 1


def _shown(value: Any) -> str:
    """A value for one line."""
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) and value.dim() else str(value)[:80]


def _read_entries(name: str, entries: Any, parameter: Tensor) -> dict[str, Tensor]:
    """One parameter's entries.

    Raises:
        ValueError: one is missing, unknown or wrong.
    """
    if not isinstance(entries, dict):
        raise ValueError(f"that of {name} is missing")
    if missing := [entry for entry in _ENTRIES if entry not in entries]:
        raise ValueError(f"{missing[0]} of {name} is missing")
    if unknown := [entry for entry in entries if entry not in _ENTRIES]:
        raise ValueError(f"{name} has an unknown entry {_shown(unknown[0])}")
    if not _is_number(entries["step"]):
        raise ValueError(f"step of {name} is {_shown(entries['step'])}, expected a number of steps")
    read = {"step": torch.tensor(float(entries["step"]), dtype=torch.float32)}
    for entry in MOMENTS:
        value = entries[entry]
        if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_floating_point():
            found = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"{entry} of {name} is {found}, expected a tensor of floats")
        if value.shape != parameter.shape:
            raise ValueError(f"{entry} of {name} has shape {list(value.shape)}, expected {list(parameter.shape)}")
        if not value.is_meta:
            check_moment(entry, name, value)
        read[entry] = value
    return read


def check_moment(entry: str, name: str, value: Tensor) -> None:
    """Refuse a moment (`exp_avg` or `exp_avg_sq`), or rows of one, that AdamW cannot compute with; one pass over it.

    Raises:
        ValueError: it is not finite, a square is negative, or a mean larger than its square can be.
    """
    # NaN anywhere comes out at both ends.
    low, high = (float(end) for end in torch.aminmax(value))
    finite = math.isfinite(low) and math.isfinite(high)
    possible = low >= 0 if entry == "exp_avg_sq" else max(-low, high) <= _LARGEST_MEAN
    if not (finite and possible):
        raise ValueError(f"{entry} of {name} has values from {low} to {high}")
