"""What the tensors of a user's file must be before anything is computed with them, one line for each that is not.

A torch file may hold tensors whose bytes are elsewhere or that stand for many more bytes than it has (sparse, meta,
expanded), and weights with NaN load like any others: whatever is computed with them later fails far from the cause, or
passes for a result.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Tied weights stand twice in a model and once in its file.
_LARGEST_SHARE_OF_FILE = 2
_SLACK_BYTES = 1 << 20


def check_archive(path: Path) -> None:
    """Refuse a torch file (a ZIP archive) with compressed entries, which torch never writes: they may unpack to anything.

    Raises:
        ValueError: an entry is compressed, or the archive cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is truncated or not a torch file ({str(error)[:120]})") from error
    if packed:
        raise ValueError(f"{path} is not a torch file as torch writes them: {packed[0][:80]} in it is compressed")


def check_plain_tensors(path: Path, content: Any) -> None:
    """Refuse tensors that are not plain arrays within the file; looks at no numbers.

    Args:
        path: the file that was read.
        content: tensors and plain values, nested in any way.

    Raises:
        ValueError: a tensor is sparse, quantized, without data or larger than what the file holds of it.
    """
    total, seen = 0, set()
    todo: list[tuple[str, Any]] = [("", content)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, Tensor):
            if reason := _odd(value):
                raise ValueError(f"{path} holds {reason}{f' in {name}' if name else ''}; expected plain arrays")
            total += value.numel() * value.element_size()
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            # What is referred to twice is looked at once, so that references to references do not multiply.
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else ((name, item) for item in value)
            todo += [
                (str(key)[:80], item) for key, item in items if isinstance(item, Tensor | Mapping | list | tuple | set)
            ]
    if total > _LARGEST_SHARE_OF_FILE * path.stat().st_size + _SLACK_BYTES:
        raise ValueError(f"{path} holds tensors of {total:,} bytes in {path.stat().st_size:,}: they overlap")


def _odd(value: Tensor) -> str | None:
    """What keeps a tensor from being a plain array."""
    if value.is_meta:
        return "a tensor without data (meta)"
    if value.layout != torch.strided or value.is_nested:
        return f"a sparse tensor ({value.layout})"
    if value.is_quantized:
        return f"a quantized tensor ({value.dtype})"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"a tensor of shape {list(value.shape)} that is expanded beyond its data"
    return None


def check_finite(source: Path | str, state: Mapping[str, Tensor]) -> None:
    """Refuse weights of which one is NaN or infinite; one pass over them.

    Raises:
        ValueError: names the first such parameter.
    """
    for name, value in state.items():
        if value.is_floating_point() and value.numel():
            # NaN anywhere comes out at both ends; the smallest types have no such operation of their own.
            low, high = torch.aminmax(value if value.element_size() > 1 else value.float())
            if not math.isfinite(low) or not math.isfinite(high):
                found = "NaN" if math.isnan(low) else "infinite values"
                raise ValueError(f"{source} cannot be used: {name} has {found} (a run that diverged, or damage)")


def check_state(source: Path | str, state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a file's parameters with a model's.

    Raises:
        ValueError: a parameter is missing, unknown, of another shape or no floats; the first is named.
    """
    for name, shape in expected.items():
        if name not in state:
            raise ValueError(f"{source} does not fit the model: {name} is missing (another model or kind?)")
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"{source} does not fit the model: {name} has shape {list(state[name].shape)}, expected {list(shape)}"
            )
        if not state[name].is_floating_point():
            raise ValueError(f"{source} does not fit the model: {name} has {state[name].dtype}, expected floats")
    unknown = [name for name in state if name not in expected]
    if unknown:
        raise ValueError(f"{source} does not fit the model: {len(unknown)} unknown parameters, the first {unknown[0]}")
