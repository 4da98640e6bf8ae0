"""Exported weights: safetensors files that describe themselves.

Decisions: the metadata is one JSON value under one key (safetensors writes several keys in random order, and equal
models should be equal files); the same record (kind, config, tokenizer, and what the run says of itself) stands in
`run.json`, in a checkpoint's marker and in an export; a run never replaces another run's file unless told to.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_gpt.checkpoints.torch_files import clean_names
from lit_gpt.config import Config
from lit_gpt.files import SaveError, cannot_write, make_folder, open_regular, parse_json, sync_folder
from lit_gpt.tokenizer import Tokenizer

METADATA_KEY = "smdm"
SUFFIX = ".safetensors"
KINDS = ("arm", "mdm")
# A file's header is read whenever a folder is listed, and safetensors refuses one of more than 100 MB; LLaMA's
# tokenizer.model has 0.5 MB, its tokenizer.json 1.8 MB.
_LARGEST_TOKENIZER = 20_000_000


_OWN_KEYS = ("kind", "config", "tokenizer", "tokenizer_files")


@dataclass(frozen=True)
class WeightsRecord:
    """What weights say of themselves."""

    kind: str
    """`arm` or `mdm`."""
    config: Config
    """Shape of the model."""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    """Where the tokenizer came from, and its hash; empty if unknown."""
    run: dict[str, Any] = field(default_factory=dict)
    """Everything else: run_id, name, settings, result ..."""
    tokenizer_files: dict[str, str] = field(default_factory=dict)
    """The tokenizer itself, in an export: its files' bytes by name, in base64."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `from_dict` reads them back."""
        values = {**self.run, "kind": self.kind, "config": self.config.to_dict(), "tokenizer": self.tokenizer}
        return {**values, "tokenizer_files": self.tokenizer_files} if self.tokenizer_files else values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WeightsRecord:
        """Read a run's record, a marker's or an export's.

        Raises:
            ValueError: kind or config is missing or unknown, or a value is of another type.
        """
        if not isinstance(values, dict):
            raise ValueError(f"the record is a {type(values).__name__}, expected an object")
        kind, config = values.get("kind"), values.get("config")
        if kind not in KINDS or not isinstance(config, dict):
            raise ValueError(f"the record names no known kind and config (kind {str(kind)[:40]!r})")
        run = {key: value for key, value in values.items() if key not in _OWN_KEYS}
        tokenizer, files = (values.get(key) or {} for key in ("tokenizer", "tokenizer_files"))
        if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
            raise ValueError("the record's tokenizer_files are no object of texts")
        if not isinstance(tokenizer, dict) or not _are_texts(tokenizer, ("source", "fingerprint")):
            raise ValueError("the record's tokenizer is no object with a source and a fingerprint")
        if not _are_texts(run, ("run_id", "name")):
            raise ValueError("the record's run_id and name are no texts")
        return cls(kind, Config.from_dict(config), tokenizer, run, files)

    @property
    def run_id(self) -> str | None:
        """The run that made the weights."""
        return self.run.get("run_id")

    def with_tokenizer(self, tokenizer: Tokenizer) -> WeightsRecord:
        """The record that holds a tokenizer whole, or only names it where it is too large for a file's header."""
        fits = sum(map(len, tokenizer.contents.values())) <= _LARGEST_TOKENIZER
        contents = tokenizer.contents if fits else {}
        files = {name: base64.b64encode(content).decode() for name, content in contents.items()}
        return replace(self, tokenizer=tokenizer_name(tokenizer), tokenizer_files=files)

    def held_tokenizer(self, path: Path | str) -> Tokenizer | None:
        """The tokenizer that a file's record holds; None if it only names one.

        Args:
            path: the file, which is the tokenizer's source.

        Raises:
            ValueError: it is damaged, or not the one that the record names.
        """
        if not self.tokenizer_files:
            return None
        try:
            contents = {name: base64.b64decode(text, validate=True) for name, text in self.tokenizer_files.items()}
            tokenizer = Tokenizer.from_contents(contents, str(path))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"the tokenizer inside {path} cannot be read: {error}") from error
        if tokenizer.fingerprint != self.tokenizer.get("fingerprint", tokenizer.fingerprint):
            raise ValueError(f"the tokenizer inside {path} is not the one that its record names: the file is damaged")
        return tokenizer


def tokenizer_name(tokenizer: Tokenizer) -> dict[str, Any]:
    """How a record names a tokenizer: source, fingerprint, and `hub` where the source is a name on the hub."""
    named = {"source": tokenizer.source, "fingerprint": tokenizer.fingerprint}
    return named if Path(tokenizer.source).exists() else {**named, "hub": True}


def _are_texts(values: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Whether named values are texts, or not there."""
    return all(isinstance(values.get(name), str | None) for name in names)


def read_record(path: Path | str) -> WeightsRecord | None:
    """An exported file's record; None for safetensors of other programs and released ones.

    Raises:
        ValueError: the file is truncated or no safetensors, or its record is damaged.
    """
    try:
        with open_regular(path), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error
    if METADATA_KEY not in metadata:
        return None
    try:
        return WeightsRecord.from_dict(parse_json(metadata[METADATA_KEY]))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has a record that cannot be read: {error}") from error


def claim_export(models_dir: Path, name: str, run_id: str, overwrite: bool) -> Path:
    """Refuse, before the first step, an export that could not be written at the end.

    Args:
        models_dir: made if it is missing.
        name: from `names.export_name`.
        run_id: of the run that asks.
        overwrite: whether another run's file may be replaced.

    Returns:
        The file that the export will be: under a name of its own where the name is a downloaded file's.

    Raises:
        ValueError: another run's file has that name.
        SaveError: the folder cannot be written.
    """
    make_folder(models_dir)
    path = models_dir / f"{name}{SUFFIX}"
    for leftover in models_dir.glob(f"{path.name}.{_tag(run_id)}.tmp"):
        leftover.unlink(missing_ok=True)
    if overwrite or not path.exists() or _belongs_to(path, run_id):
        return path
    if _run_of(path) is None:
        return _beside(path, run_id)
    raise ValueError(
        f"{path} exists and is another run's: move it, give --overwrite true to replace it at the end of this run, "
        "or another --models_dir"
    )


def export_weights(
    models_dir: Path,
    name: str,
    state: dict[str, Tensor],
    record: WeightsRecord | dict[str, Any],
    overwrite: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write weights as flat float32 safetensors with their record and their tokenizer, durably.

    Args:
        models_dir: where to.
        name: without `.safetensors`.
        state: parameters by the published names, any dtype and device.
        record: what they are; its run_id decides whose file of that name may be replaced.
        overwrite: whether another run's may, too.
        tokenizer: goes into the file, so that this alone can be taken elsewhere; None leaves the record as it is.

    Returns:
        The file: `{name}.safetensors`, or `{name}-2.safetensors` (3 ...) if another run's file has appeared there.

    Raises:
        SaveError: it could not be written; nothing is left of it.
    """
    record = record if isinstance(record, WeightsRecord) else WeightsRecord.from_dict(record)
    record = record if tokenizer is None else record.with_tokenizer(tokenizer)
    tensors = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in clean_names(state).items()}
    metadata = {METADATA_KEY: json.dumps(record.to_dict(), sort_keys=True)}
    run_id = record.run_id or ""
    target = models_dir / f"{name}{SUFFIX}"
    make_folder(models_dir)
    temporary = target.with_name(f"{target.name}.{_tag(run_id)}.tmp")
    try:
        # safetensors gives its files to their owner alone: a new file of our own has what the umask leaves.
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        target = _give_name(temporary, target, run_id, overwrite)
        sync_folder(models_dir)
    except OSError as error:
        raise cannot_write(target, error) from error
    except SafetensorError as error:
        raise SaveError(f"cannot write {target}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return target


def _give_name(temporary: Path, target: Path, run_id: str, overwrite: bool) -> Path:
    """Put a whole file under its name, or under a free one beside another run's file."""
    number = 1
    wanted = target
    while not overwrite and not (target.exists() and _belongs_to(target, run_id)):
        try:
            # Unlike a rename, a link never replaces what appeared a moment ago.
            os.link(temporary, target)
            return target
        except OSError as error:
            if not isinstance(error, FileExistsError) and not target.exists():
                break  # a file system without links
            number += 1
            target = wanted.with_name(f"{wanted.stem}-{number}{SUFFIX}")
    os.replace(temporary, target)
    return target


def _belongs_to(path: Path, run_id: str) -> bool:
    """Whether an exported file is a run's own."""
    return bool(run_id) and _run_of(path) == run_id


def _run_of(path: Path) -> str | None:
    """The run that made a file; None for what was downloaded, made by another program, or is damaged."""
    try:
        record = read_record(path)
    except ValueError:
        return None
    return None if record is None else record.run_id or ""


def _beside(path: Path, run_id: str) -> Path:
    """The first of `NAME-2`, `NAME-3` ... that is free or the run's own."""
    number = 2
    while (other := path.with_name(f"{path.stem}-{number}{SUFFIX}")).exists() and not _belongs_to(other, run_id):
        number += 1
    return other


def _tag(run_id: str) -> str:
    return hashlib.sha256(run_id.encode()).hexdigest()[:8]
