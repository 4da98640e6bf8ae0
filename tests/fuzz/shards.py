"""Checkpoints that are folders of shards, damaged: a shard's header, its numbers, its bytes, the marker, what lies beside.

Where the marker is to fit, it gets the sizes and hashes of the damaged files, as from somebody who means harm.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import struct
from pathlib import Path
from typing import Any

from lit_gpt.checkpoints import run_files, run_record, saving, weights
from lit_gpt.checkpoints.markers import DESCRIPTION_NAME
from lit_gpt.checkpoints.shard_files import read_index, read_tensor, write_shard
from lit_gpt.files import file_sha256
from lit_gpt.sampling.sample import sample
from lit_gpt.sampling.settings import Sampling
from lit_gpt.training import strategies
from lit_gpt.training.checkpoint_saves import CheckpointSaves
from lit_gpt.ui.info import path_info
from tests.fuzz.mutations import WILD_VALUES, mutate_bytes, mutate_json, mutate_value
from tests.fuzz.readers import TINY, FileKind, require, training_state, training_step

_PROCESSES = 3
_KEY, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
# What safetensors may hold; a run's shards hold floats.
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "x", "")
_NUMBERS = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-44, -0.0, -1.0)
_RECORD = {"kind": "mdm", "config": TINY.to_dict(), "run_id": "a", "settings": {"lr": 1.0}, "log_path": "x",
           "run": {"micro_batch_size": 2, "world_size": _PROCESSES}}  # fmt: skip


def make_shards(folder: Path) -> None:
    """A run's checkpoint, its rows shared among three files as FSDP2 shares them among processes."""
    fabric = strategies.start_fabric("cpu", "1", 1, "auto", "32-true")
    state = training_state(fabric, seed=1)
    training_step(fabric, state)
    saves = CheckpointSaves(folder, 0, lambda path: None)
    saves.save(fabric, state, _RECORD, None)
    saves.wait(fabric)
    path = _checkpoint(folder)
    (whole,) = path.glob("*.safetensors")
    tensors = {name: read_tensor(saved, name) for name, saved in read_index([whole]).items()}
    for process in range(_PROCESSES):
        parts: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if not tensor.dim():
                if process == 0:
                    parts[name] = (tensor, ())
                continue
            rows = -(-len(tensor) // _PROCESSES)
            if (part := tensor[process * rows : (process + 1) * rows]).numel():
                parts[name] = (part, (process * rows, *[0] * (tensor.dim() - 1)))
        write_shard(path / f"shard-{process + 1:05d}-of-{_PROCESSES:05d}.safetensors", parts)
    whole.unlink()
    _fit_marker(path)
    run_record.write_run_record(folder, {**_RECORD, "result": {"val_loss": 1.5}, "finished": False})


def read_shards(folder: Path) -> None:
    """Describe the run, open its checkpoint and complete a prompt, resume from it and make two steps."""
    path = _checkpoint(folder)
    path_info(folder)
    run_files.newest_complete(folder, lambda line: require("\n" not in line, f"a warning of several lines: {line}"))
    info = run_files.open_checkpoint(path)
    path_info(path)
    model, _ = weights.read_model(path)
    sample(model, [[5, 6]], Sampling(steps=2), 8)
    fabric = strategies.start_fabric("cpu", "1", 1, "auto", "32-true")
    state = training_state(fabric, seed=2)
    rest = saving.load_checkpoint(fabric, info, state)
    require(rest["step_count"] == info.step, "another step than the marker's")
    run_files.remove_temporary(folder)
    for _ in range(2):
        # As training refuses it: finite numbers may still overflow in a step.
        if not math.isfinite(loss := training_step(fabric, state)):
            raise ValueError(f"loss {loss}")
    require(all(bool(value.isfinite().all()) for value in state["model"].state_dict().values()), "weights after a step")


def damage_shards(folder: Path, chance: random.Random) -> None:
    """One damage; the marker mostly fits what the files have become."""
    path = _checkpoint(folder)
    shard = chance.choice(sorted(path.glob("*.safetensors")))
    kind = chance.randrange(8)
    if kind == 0:
        marker = chance.choice((path / DESCRIPTION_NAME, path / DESCRIPTION_NAME, folder / "run.json"))
        marker.write_bytes(mutate_json(marker.read_bytes(), chance))
        return
    if kind == 1:
        _damage_part_of_marker(path / DESCRIPTION_NAME, chance)
        return
    if kind == 2:
        shard.write_bytes(mutate_bytes(shard.read_bytes(), chance))
    elif kind == 3:
        _change_header(shard, chance)
    elif kind == 4:
        _change_offsets(shard, chance)
    elif kind == 5:
        _change_number(shard, chance)
    elif kind == 6:
        _move_tensor(path, shard, chance)
    else:
        _change_files(path, shard, chance)
        return
    if chance.random() < 0.9:
        _fit_marker(path)


def _checkpoint(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.is_dir())


def _fit_marker(path: Path) -> None:
    """Give the marker the sizes and hashes of the files as they are."""
    marker = json.loads((path / DESCRIPTION_NAME).read_text())
    files = [file for file in sorted(path.glob("*.safetensors")) if file.is_file()]
    marker["shards"] = {file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)} for file in files}
    (path / DESCRIPTION_NAME).write_text(json.dumps(marker))


def _damage_part_of_marker(path: Path, chance: random.Random) -> None:
    """Damage what only a folder's marker says: plain values, parameter groups, shards."""
    marker = json.loads(path.read_text())
    key = chance.choice(("values", "param_groups", "shards", "record"))
    marker[key] = mutate_value(marker[key], chance)
    path.write_text(json.dumps(marker))


def _read_shard(path: Path) -> tuple[dict[str, Any], bytearray]:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])


def _write_shard(path: Path, header: dict[str, Any], data: bytes | bytearray) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _some_tensor(header: dict[str, Any], chance: random.Random) -> str:
    """A tensor's name; as often a step or a moment as a weight."""
    names = [name for name in header if name != "__metadata__"]
    entry = chance.choice(("model.", ".step", ".exp_avg", ".exp_avg_sq"))
    return chance.choice([name for name in names if entry in name] or names)


def _change_header(shard: Path, chance: random.Random) -> None:
    """Another value in the header: any, or a dtype or shape that still has as many bytes."""
    header, data = _read_shard(shard)
    kind, name = chance.randrange(3), _some_tensor(header, chance)
    if kind == 0:
        header = mutate_value(header, chance)
    elif kind == 1:
        header[name]["dtype"] = chance.choice(_DTYPES)
    else:
        size = math.prod(header[name]["shape"])
        shapes = ([size], [1, size], [size, 1], [size, 1, 1], [], [0], [size, 0], [0, 2**62], [2**32, 2**32], [-size])
        header[name]["shape"] = chance.choice(shapes)
    _write_shard(shard, header, data)


def _change_offsets(shard: Path, chance: random.Random) -> None:
    """Another row at which a part begins."""
    header, data = _read_shard(shard)
    offsets = json.loads(header["__metadata__"][_KEY])
    name = _some_tensor(header, chance)
    if chance.random() < 0.5:
        offsets = mutate_value(offsets, chance)
    else:
        wild = (0, 1, -1, 2**31, 2**61, 2**63, 2**64, 1.0, True, None, "0", chance.choice(WILD_VALUES))
        offsets[name][_OFFSETS] = [chance.choice(wild) for _ in offsets[name][_OFFSETS]]
    header["__metadata__"][_KEY] = json.dumps(offsets)
    _write_shard(shard, header, data)


def _change_number(shard: Path, chance: random.Random) -> None:
    """Another number in a tensor."""
    header, data = _read_shard(shard)
    begin, end = header[_some_tensor(header, chance)]["data_offsets"]
    at = begin + 4 * chance.randrange((end - begin) // 4)
    data[at : at + 4] = struct.pack("<f", chance.choice(_NUMBERS))
    _write_shard(shard, header, data)


def _move_tensor(path: Path, shard: Path, chance: random.Random) -> None:
    """A tensor (or a part of one) is missing, has another name, or stands in another file too."""
    header, data = _read_shard(shard)
    name, kind = _some_tensor(header, chance), chance.randrange(3)
    entry = header.pop(name)
    moved = bytes(data[entry["data_offsets"][0] : entry["data_offsets"][1]])
    if kind < 2:
        # As a file without the tensor is written: no gap in its bytes.
        del data[entry["data_offsets"][0] : entry["data_offsets"][1]]
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= entry["data_offsets"][1]:
                other["data_offsets"] = [one - len(moved) for one in other["data_offsets"]]
    else:
        parameter, _, last = name.rpartition(".")
        names = (
            f"{parameter}.x",
            last,
            "",
            "model.",
            "optimizer.",
            "optimizer..step",
            f"x{name}",
            name.upper(),
            "a" * 9000,
        )
        other_name = chance.choice((*names, "model.\n", f"{name}.exp_avg", f"optimizer.{name}.exp_avg"))
        header[other_name] = entry
    _write_shard(shard, header, data)
    if kind == 1:
        file = chance.choice(sorted(path.glob("*.safetensors")))
        header, data = _read_shard(file)
        header[name] = {**entry, "data_offsets": [len(data), len(data) + len(moved)]}
        _write_shard(file, header, data + moved)


def _change_files(path: Path, shard: Path, chance: random.Random) -> None:
    """A file is missing, comes twice, has another name, is another's, or is no file; the folder has another name."""
    marker = path / DESCRIPTION_NAME
    kind = chance.randrange(7)
    if kind == 0:
        shard.unlink()
    elif kind == 1:
        (path / f"shard-{chance.randrange(9):05d}-of-00009.safetensors").write_bytes(shard.read_bytes())
    elif kind == 2:
        shard.rename(path / chance.choice(("shard.safetensors", "shard-00009-of-00003.safetensors", "x.tmp")))
    elif kind == 3:
        chance.choice(sorted(path.glob("*.safetensors"))).write_bytes(shard.read_bytes())
    elif kind == 4:
        path.rename(path.with_name(chance.choice(("iter-000004-ckpt.abc.tmp", "other", "iter-999999999999-ckpt"))))
        return
    elif kind == 5:
        marker.unlink()
        return
    if chance.random() < 0.7:
        _fit_marker(path)
    if kind == 6:
        odd = chance.choice((shard, marker))
        odd.unlink()
        chance.choice((os.mkfifo, Path.mkdir, _link_to_zero, _link_to_itself))(odd)
        if odd == shard and chance.random() < 0.7:
            content = json.loads(marker.read_text())
            content["shards"][shard.name] = {"size": 0, "sha256": hashlib.sha256().hexdigest()}
            marker.write_text(json.dumps(content))


def _link_to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


SHARD_KINDS = {"shards": FileKind(make_shards, damage_shards, read_shards)}
