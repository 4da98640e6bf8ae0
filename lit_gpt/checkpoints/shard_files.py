"""The files of a sharded checkpoint: safetensors, in which a tensor may be there in part.

The format is the one of torch.distributed.checkpoint's HuggingFaceStorageWriter, so that torch's reader reads them, too:
a tensor's part has the tensor's name, and where it begins in the whole tensor is under `DCP_SHARDING_INFO` in the file's
metadata. Decisions: written tensor by tensor and hashed on the way (torch's writer builds the file in memory); parts are
rows, as FSDP2 makes them, so that a gap or an overlap is easily seen; nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_gpt.files import FileStamp, HashingFile, open_regular, parse_json, write_file

# Source: torch.distributed.checkpoint._hf_utils.
_OFFSETS_KEY, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
_METADATA = {"format": "pt", "DCP_VERSION": "1.0"}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Part:
    """Some rows of a tensor in a file."""

    file: Path
    first_row: int
    """In the whole tensor; 0 for a tensor without rows (a number)."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that lies in one file or in several."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]
    """In the order of their rows; together they are the tensor."""


def write_shard(path: Path, parts: Mapping[str, tuple[Tensor, Sequence[int]]]) -> FileStamp:
    """Write a file durably.

    Args:
        path: the file.
        parts: by the tensor's name: a part of it in host memory, of floats, and where it begins in the whole tensor.

    Returns:
        Its size and the SHA-256 of what was meant to be written.

    Raises:
        SaveError: it could not be written; nothing is left of it.
    """
    # Larger elements first, so that each tensor is aligned to its elements.
    ordered = sorted(parts, key=lambda name: (-parts[name][0].element_size(), name))
    offsets = {name: {_OFFSETS: list(parts[name][1])} for name in ordered}
    header: dict[str, Any] = {"__metadata__": {**_METADATA, _OFFSETS_KEY: json.dumps(offsets)}}
    end = 0
    for name in ordered:
        tensor = parts[name][0]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file: HashingFile) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            file.write(parts[name][0].detach().contiguous().view(-1).view(torch.uint8).numpy())

    return write_file(path, write)


def read_index(files: Iterable[Path]) -> dict[str, SavedTensor]:
    """Which tensors some files hold, from their headers.

    Raises:
        ValueError: a file is no safetensors or is truncated, or its tensors are no floats, lack rows or overlap.
        OSError: a file cannot be read.
    """
    parts: dict[str, list[Part]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path in files:
        for name, dtype, part in _read_header(path):
            if dtypes.setdefault(name, dtype) != dtype:
                raise ValueError(f"{path}: {name} has {dtype}, {dtypes[name]} in another file")
            parts.setdefault(name, []).append(part)
    return {name: _joined(name, dtypes[name], found) for name, found in parts.items()}


def _read_header(path: Path) -> list[tuple[str, torch.dtype, Part]]:
    """Name, dtype and place of every part in a file."""
    found = []
    try:
        with open_regular(path), safe_open(path, framework="pt") as file:
            offsets = _read_offsets(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                part = file.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if dtype not in _DTYPES:
                    raise ValueError(f"{name} has {dtype}, expected floats")
                found.append((name, _DTYPES[dtype], Part(path, _first_row(name, offsets, shape), shape)))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no part of a checkpoint, or damaged: {str(error)[:200]}") from error
    return found


def _read_offsets(metadata: dict[str, str]) -> dict[str, Any]:
    """Where the parts begin; empty if all are whole."""
    offsets = parse_json(metadata.get(_OFFSETS_KEY, "{}"))
    if not isinstance(offsets, dict):
        raise ValueError(f"its {_OFFSETS_KEY} is no object")
    return offsets


def _first_row(name: str, offsets: dict[str, Any], shape: tuple[int, ...]) -> int:
    entry = offsets.get(name, {_OFFSETS: [0] * len(shape)})
    begin = entry.get(_OFFSETS) if isinstance(entry, dict) else None
    if not isinstance(begin, list) or len(begin) != len(shape) or not all(type(one) is int for one in begin):
        raise ValueError(f"{name} does not say where it begins")
    if any(begin[1:]) or any(not 0 <= one < 1 << 62 for one in begin):
        raise ValueError(f"{name} begins at {str(begin)[:40]}, expected whole rows")
    return begin[0] if begin else 0


def _joined(name: str, dtype: torch.dtype, parts: list[Part]) -> SavedTensor:
    """Parts that are rows of one tensor, none missing and none twice."""
    ordered = sorted(parts, key=lambda part: part.first_row)
    row, end = ordered[0].shape[1:], 0
    if not ordered[0].shape:
        if len(ordered) > 1:
            raise ValueError(f"{ordered[1].file} holds {name} once more")
        return SavedTensor((), dtype, tuple(ordered))
    for part in ordered:
        if part.shape[1:] != row or not part.shape:
            raise ValueError(f"{part.file}: {name} has shape {list(part.shape)}, its other rows {list(row)}")
        if part.first_row != end:
            what = "are missing" if part.first_row > end else "are there twice"
            raise ValueError(f"{part.file}: rows of {name} {what} before row {part.first_row}")
        end += part.shape[0]
    return SavedTensor((end, *row), dtype, tuple(ordered))


def read_tensor(tensor: SavedTensor, name: str) -> Tensor:
    """The whole of a tensor, in host memory.

    Raises:
        ValueError: a file is damaged.
    """
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for part in tensor.parts:
        read = read_parts(part.file, [name], lambda file: file.get_tensor(name))
        if tensor.shape:
            whole[part.first_row : part.first_row + part.shape[0]] = read
        else:
            whole.copy_(read)
    return whole


def read_parts(path: Path, names: Iterable[str], read: Callable[[Any], Any]) -> Any:
    """What `read` makes of an open safetensors file; an error in it becomes one line.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with open_regular(path), safe_open(path, framework="pt") as file:
            return read(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {', '.join(names)[:80]} cannot be read ({str(error)[:120]})") from error


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """What tensors take, whole: a sharded one counts with all its shards."""
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)
