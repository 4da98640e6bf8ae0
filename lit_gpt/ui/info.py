"""What any file or folder of the project is, as one dictionary: kind, size, settings, tokens, hash.

What a path is follows from its contents, not from its name; a broken file is described as far as it can be read, with
the reason; hashes are computed from the bytes, never copied from a record.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from lit_gpt.checkpoints import run_files, run_record, torch_files, weights
from lit_gpt.checkpoints.export import SUFFIX, WeightsRecord, read_record
from lit_gpt.checkpoints.markers import is_sharded, marker_path
from lit_gpt.checkpoints.run_record import RUN_RECORD_NAME
from lit_gpt.checkpoints.shard_files import read_index
from lit_gpt.data import packed_foreign, packed_format
from lit_gpt.files import file_sha256, lock_holder, open_regular, read_json_object
from lit_gpt.tokenizer import Tokenizer

_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
_TORCH_SUFFIXES = (".pth", ".pt", ".ckpt")
_EXPECTED = (
    "a run folder, a checkpoint (.pth, or a folder of shards), weights (.safetensors), packed data (.bin, a folder "
    "of them, or datatrove's .ds), a manifest, or a tokenizer"
)


def path_info(path: Path | str) -> dict[str, Any]:
    """What a path is, and what there is to say about it.

    Args:
        path: a file or folder.

    Returns:
        JSON values: `what` (one of run folder, checkpoint, weights, packed data, packed folder, manifest, tokenizer,
        folder of weights), `path`, and what there is to say about such a thing; sizes in bytes.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it is nothing of this project, or damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    with open_regular(path) as file:
        start = file.read(len(packed_format.MAGIC))
    if path.suffix == packed_foreign.DATATROVE_SUFFIX:
        return _foreign_tokens(packed_foreign.datatrove_chunk(path, path.stat().st_size), "datatrove's")
    if path.suffix == ".bin" and path.with_suffix(packed_foreign.MEGATRON_SUFFIX).is_file():
        return _foreign_tokens(packed_foreign.megatron_chunk(path, path.stat().st_size), "Megatron's")
    if start == packed_format.MAGIC or path.suffix == ".bin":
        return _packed_file(path)
    if path.suffix == SUFFIX:
        return _weights(path)
    if start[:2] == b"PK" or path.suffix in _TORCH_SUFFIXES:
        return _checkpoint(path)
    if path.name in _TOKENIZER_FILES or path.suffix == ".model":
        return _tokenizer(path)
    if path.suffix == ".json":
        return _json_file(path)
    raise ValueError(f"{path} is nothing that this project writes: expected {_EXPECTED}")


def _folder(path: Path) -> dict[str, Any]:
    """A folder, by what lies in it."""
    if is_sharded(path):
        return _shards(path)
    if (path / RUN_RECORD_NAME).exists() or run_files.list_checkpoints(path):
        return _run_folder(path)
    if any((path / name).exists() for name in _TOKENIZER_FILES) and not any(path.glob("*.bin")):
        return _tokenizer(path)
    if any(path.glob("*.bin")):
        return _packed_folder(path)
    if found := sorted(path.glob(f"*{SUFFIX}")):
        return {
            "what": "folder of weights",
            "path": str(path),
            "files": {file.name: file.stat().st_size for file in found},
        }
    raise ValueError(f"the folder {path} holds nothing that this project writes: expected {_EXPECTED}")


# --- runs and weights ---------------------------------------------------------------------------------------------


def _run_folder(path: Path) -> dict[str, Any]:
    """The run's record, who writes it now, and the state of every checkpoint."""
    record = run_record.read_run_record(path)
    checkpoints = []
    for file in run_files.list_checkpoints(path):
        entry: dict[str, Any] = {"file": file.name, "size": file.stat().st_size}
        try:
            info = run_files.open_checkpoint(file)
            entry["size"] = info.size
            complete = "complete" if info.sha256 else "opens, but has no completion marker"
            entry |= {"step": info.step, "iter_num": info.iter_num, "sha256": info.sha256, "state": complete}
            record = record or info.record
        except ValueError as error:
            entry["state"] = f"broken: {str(error).removeprefix(f'checkpoint {file} cannot be used: ')}"
        checkpoints.append(entry)
    held = lock_holder(path)
    return {
        "what": "run folder",
        "path": str(path),
        **_model_of(record),
        "finished": record.get("finished"),
        "written by": held,
        "checkpoints": checkpoints,
        "run": {key: value for key, value in record.items() if key not in ("kind", "config", "tokenizer", "finished")},
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    """A torch file: ours, published, or another's."""
    content = torch_files.open_torch_file(path)
    described: dict[str, Any] = {"what": "checkpoint", "path": str(path), "size": path.stat().st_size}
    described["sha256"] = file_sha256(path)
    if path.name.startswith("iter-") and marker_path(path).exists():
        info = run_files.open_checkpoint(path)
        described["state"] = "complete"
    else:
        info = None
        described["state"] = "no completion marker"
    state, _ = weights.weights_of(path, content)
    record = info.record if info else content.get("record")
    described |= _model_of(record) if isinstance(record, dict) and record else _model_from_shapes(path, state)
    described |= {
        key: content[name] for key, name in {"step": "step_count", "iter_num": "iter_num"}.items() if name in content
    }
    described["keys"] = list(content) if "model" in content else ["(a bare state dict)"]
    described["parameters"] = sum(value.numel() for value in state.values())
    settings = record.get("settings") if isinstance(record, dict) else content.get("hparams")
    return {**described, "settings": settings if isinstance(settings, dict) else {}}


def _shards(path: Path) -> dict[str, Any]:
    """A checkpoint that is a folder of shards, without reading its tensors."""
    info = run_files.open_checkpoint(path)
    index = read_index(info.shards)
    sizes = [math.prod(saved.shape) for name, saved in index.items() if name.startswith("model.")]
    return {
        "what": "checkpoint",
        "path": str(path),
        "size": info.size,
        "sha256": info.sha256,
        "state": "complete",
        **_model_of(info.record),
        "step": info.step,
        "iter_num": info.iter_num,
        "shards": len(info.shards),
        "parameters": sum(sizes),
        "settings": info.settings,
    }


def _weights(path: Path) -> dict[str, Any]:
    """A safetensors file, without reading its tensors."""
    record = read_record(path)
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        dtypes = sorted({part.get_dtype() for part in slices.values()})
        state = {name: torch.empty(part.get_shape(), device="meta") for name, part in slices.items()}
    described = _model_of(record.to_dict()) if record else _model_from_shapes(path, state)
    if record and record.tokenizer_files:
        described["tokenizer"] = _held_tokenizer(path, record) | described["tokenizer"]
    return {
        "what": "weights",
        "path": str(path),
        "size": path.stat().st_size,
        "sha256": file_sha256(path),
        **described,
        "parameters": sum(value.numel() for value in state.values()),
        "tensors": len(state),
        "dtype": ", ".join(dtypes),
        "run": record.run if record else {},
    }


def _held_tokenizer(path: Path, record: WeightsRecord) -> dict[str, Any]:
    """The tokenizer inside an export: its files with their sizes, and the hash of its model."""
    try:
        tokenizer = record.held_tokenizer(path)
    except ValueError as error:
        return {"inside": f"broken: {error}"}
    assert tokenizer is not None
    return {"inside": _content_sizes(tokenizer), "sha256": tokenizer.fingerprint}


def _content_sizes(tokenizer: Tokenizer) -> dict[str, int]:
    """Bytes of a tokenizer's files."""
    return {name: len(content) for name, content in tokenizer.contents.items()}


def _model_of(record: dict[str, Any]) -> dict[str, Any]:
    """Kind, shape and tokenizer as a record gives them."""
    try:
        known = WeightsRecord.from_dict(record)
    except ValueError:
        return {"kind": record.get("kind")}
    return {
        "kind": known.kind,
        "model": known.config.name,
        "shape": known.config.describe(),
        "non-embedding parameters": known.config.non_embedding_params,
        "config": known.config.to_dict(),
        "tokenizer": known.tokenizer,
    }


def _model_from_shapes(path: Path, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Kind and shape of a file that has no record."""
    try:
        config = weights.infer_config(path, weights.of_family(path, state))
    except ValueError as error:
        return {"model": f"unknown: {error}"}
    return {
        "kind": weights.infer_kind(path, state),
        "model": f"{config.name} (by its shapes; it has no record)",
        "shape": config.describe(),
        "non-embedding parameters": config.non_embedding_params,
    }


# --- data and tokenizers ------------------------------------------------------------------------------------------


def _packed_file(path: Path) -> dict[str, Any]:
    """One file of packed tokens."""
    chunk = packed_format.read_header(path)
    manifest = _manifest_of(path)
    entry = manifest.get("files", {}).get(path.name, {})
    tokens = chunk.open()
    return {
        "what": "packed data",
        "path": str(path),
        "size": path.stat().st_size,
        "sha256": file_sha256(path),
        "dtype": chunk.dtype.name,
        "tokens": chunk.size,
        "tokens without padding": entry.get("tokens", "unknown (no manifest)"),
        "largest id": int(tokens.max()) if chunk.size else None,
        "tokenizer": manifest.get("tokenizer", {}),
    }


def _foreign_tokens(chunk: packed_format.Chunk, owner: str) -> dict[str, Any]:
    """Another program's file of tokens, which training reads as it is."""
    tokens = np.memmap(chunk.path, chunk.dtype, mode="r") if chunk.size else None
    ends = packed_foreign.document_ends(chunk.path)
    return {
        "what": "packed data",
        "format": owner,
        "path": str(chunk.path),
        "size": chunk.path.stat().st_size,
        "sha256": file_sha256(chunk.path),
        "dtype": chunk.dtype.name,
        "tokens": chunk.size,
        "documents": "unknown (no index)" if ends is None else len(ends),
        "largest id": None if tokens is None else int(tokens.max()),
    }


def _packed_folder(path: Path) -> dict[str, Any]:
    """A folder of packed files, by series."""
    series: dict[str, dict[str, Any]] = {}
    for file in sorted(path.glob("*.bin")):
        name = file.name.rpartition("_")[0] or file.stem
        entry = series.setdefault(name, {"files": 0, "tokens": 0, "size": 0, "dtype": "", "tokenizer": {}})
        try:
            chunk = packed_format.read_header(file)
        except ValueError as error:
            entry["broken"] = str(error)
            continue
        manifest = _manifest_of(file)
        entry["files"] += 1
        try:
            entry["tokens"] += int(manifest.get("files", {}).get(file.name, {}).get("tokens", chunk.size))
        except (AttributeError, TypeError, ValueError):
            entry["broken"] = f"its manifest has no number of tokens for {file.name}"
            continue
        entry["size"] += file.stat().st_size
        entry["dtype"] = chunk.dtype.name
        entry["tokenizer"] = manifest.get("tokenizer", {})
    return {
        "what": "packed folder",
        "path": str(path),
        "tokens": sum(entry["tokens"] for entry in series.values()),
        "series": series,
    }


def _manifest_of(path: Path) -> dict[str, Any]:
    """The manifest beside a packed file; empty without one, or where it cannot be read."""
    manifest = path.with_name(f"{path.name.rpartition('_')[0]}.manifest.json")
    try:
        return read_json_object(manifest)
    except (OSError, ValueError):
        return {}


def _json_file(path: Path) -> dict[str, Any]:
    """A record, a marker or a manifest."""
    value = read_json_object(path)
    if path.name == RUN_RECORD_NAME and "run_id" in value:
        return _run_folder(path.parent)
    if {"iter_num", "shards", "record"} <= value.keys():
        return _shards(path.parent)
    if {"iter_num", "sha256", "record"} <= value.keys():
        return _checkpoint(path.with_suffix(".pth"))
    if isinstance(value.get("files"), dict):
        entries = value["files"].values()
        rest = {key: item for key, item in value.items() if key != "files"}
        return {
            "what": "manifest",
            "path": str(path),
            "files": len(value["files"]),
            "tokens": sum(_token_count(path, entry) for entry in entries),
            **rest,
        }
    if "model" in value and "added_tokens" in value:
        return _tokenizer(path)
    raise ValueError(f"{path} is JSON, but nothing that this project writes: expected {_EXPECTED}")


def _token_count(path: Path, entry: Any) -> int:
    """Tokens of a packed file, as its manifest says."""
    count = entry.get("tokens", 0) if isinstance(entry, dict) else None
    if type(count) is not int:
        raise ValueError(f"{path}: a file's entry has no number of tokens")
    return count


def _tokenizer(path: Path) -> dict[str, Any]:
    """A tokenizer's folder or file."""
    tokenizer = Tokenizer(path)
    return {
        "what": "tokenizer",
        "path": str(path),
        "files": _content_sizes(tokenizer),
        "sha256": tokenizer.fingerprint,
        "vocabulary": tokenizer.vocab_size,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
    }


def info_as_json(info: dict[str, Any]) -> str:
    """The information as JSON text; what JSON does not know (dtypes in published settings ...) as text."""
    return json.dumps(info, indent=1, default=str)
