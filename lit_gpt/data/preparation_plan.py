"""What a preparation of packed tokens makes, and what its destination may hold already.

Decisions: a plan's identity is everything that decides the bytes of its files, names of folders and the number of cores
apart; manifests and progress records hold it, so that the same plan is found finished or goes on, and another one is
refused before anything is touched. The tokenizer is copied beside the files, so that a manifest needs no path of the
machine that made it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lit_gpt.data.packed_format import VALIDATION_PREFIX, data_set, index_path
from lit_gpt.data.text_files import TextFile
from lit_gpt.data.text_sources import DocumentRules
from lit_gpt.files import HashingFile, make_folder, read_json_object, write_file
from lit_gpt.tokenizer import Tokenizer

TOKENIZER_FOLDER = "tokenizer"
SHARDS_FOLDER = ".shards"
"""In the destination: locks and logs of the shards of a corpus."""
# Raised when a change of the code changes the files.
_VERSION = 1
_REMEDY = "--overwrite replaces it, or give another --destination_path"


@dataclass(frozen=True)
class Shard:
    """One of the parts that a corpus is prepared in."""

    index: int
    """From 0."""
    count: int
    """Of all."""


@dataclass(frozen=True)
class PackingPlan:
    """What is to be packed, and where to."""

    sources: list[TextFile]
    rules: DocumentRules
    tokenizer: Tokenizer
    destination: Path
    prefix: str = "train_slim"
    """Of the files' names."""
    chunk_size: int = 2049 * 1024
    """Tokens per file."""
    validation_fraction: float = 0.0
    """Share of the documents, chosen by their hash, that goes to files named validation."""
    drop_last: bool = False
    """Leave out the last file of a series if it is not full."""
    shard: Shard | None = None
    """Which part of a corpus this is; the prefix then ends in its number."""

    def split(self, count: int) -> list[PackingPlan]:
        """The plans of a corpus' shards: runs of consecutive files, as many files each, or one more in the first ones."""
        each, more = divmod(len(self.sources), count)
        firsts = [index * each + min(index, more) for index in range(count + 1)]
        return [
            replace(
                self,
                sources=self.sources[firsts[index] : firsts[index + 1]],
                prefix=f"{self.prefix}_{index}",
                shard=Shard(index, count),
            )
            for index in range(count)
        ]

    @property
    def lock_folder(self) -> Path:
        """What a run locks: the destination, or a folder in it of the shard's own."""
        if self.shard is None:
            return self.destination
        return self.destination / SHARDS_FOLDER / self.prefix

    @property
    def prefixes(self) -> list[str]:
        """The series that are written."""
        if not self.validation_fraction:
            return [self.prefix]
        number = "" if self.shard is None else f"_{self.shard.index}"
        return [self.prefix, f"{VALIDATION_PREFIX}{number}"]

    @property
    def progress_path(self) -> Path:
        """The record of an unfinished run."""
        return self.destination / f"{self.prefix}.progress.json"

    def manifest_path(self, prefix: str) -> Path:
        """The manifest of a series."""
        return self.destination / f"{prefix}.manifest.json"

    @cached_property
    def source_bytes(self) -> int:
        """Of all sources, on the disk."""
        return sum(source.size for source in self.sources)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the files' bytes; JSON."""
        sources = hashlib.sha256("\n".join(source.identity() for source in self.sources).encode())
        identity = {
            "version": _VERSION,
            "tokenizer": self.tokenizer.fingerprint,
            "chunk_size": self.chunk_size,
            "document": self.rules.document,
            "text_field": self.rules.text_field,
            "skip_subsets": list(self.rules.skip_subsets),
            "validation_fraction": self.validation_fraction,
            "source_files": len(self.sources),
            "source_bytes": self.source_bytes,
            "source_identity": sources.hexdigest(),
        }
        if self.drop_last:
            identity["drop_last"] = True
        if self.shard is not None:
            identity["shard"] = [self.shard.index, self.shard.count]
        return identity

    def finished(self) -> dict[str, dict[str, Any]] | None:
        """The manifests by prefix, if an earlier run has made exactly this and its files are all there; else None."""
        manifests = {}
        for prefix in self.prefixes:
            path = self.manifest_path(prefix)
            if not path.is_file():
                return None
            manifests[prefix] = read_json_object(path)
            if manifests[prefix].get("made_from") != self.identity:
                return None
            if not all((self.destination / name).is_file() for name in manifests[prefix]["files"]):
                return None
        return manifests

    def clear_destination(self, overwrite: bool) -> dict[str, Any] | None:
        """Refuse or remove what another run left in the destination.

        Args:
            overwrite: remove it.

        Returns:
            The record of an interrupted run of this very plan, to go on from; None to begin.

        Raises:
            ValueError: the destination holds something else; names it and the remedy.
        """
        record = read_json_object(self.progress_path) if self.progress_path.is_file() else None
        if record is not None and (differences := self._differences(record)):
            if not overwrite:
                raise ValueError(f"{self.progress_path}: an unfinished run with {differences}: {_REMEDY}")
            record = None
        if record is not None and not all("sha256" in series for series in record["series"].values()):
            record = None  # of an earlier version, which kept no hashes
        files = [path for prefix in self.prefixes for path in self._own_files(prefix)]
        manifests = [path for prefix in self.prefixes if (path := self.manifest_path(prefix)).is_file()]
        if not overwrite:
            for path in manifests:
                if differences := self._differences(read_json_object(path)):
                    raise ValueError(f"{path}: another result, with {differences}: {_REMEDY}")
            if files and not manifests and record is None:
                raise ValueError(f"{files[0]}: of another preparation: {_REMEDY}")
        own = tuple(f"{prefix}{mark}" for prefix in self.prefixes for mark in "_.")
        leftovers = [p for p in self.destination.glob("*.tmp") if p.name.startswith(own)]
        if record is None:
            leftovers += [*files, *map(index_path, files), self.progress_path]
        for path in manifests + leftovers:
            path.unlink(missing_ok=True)
        return record

    def copy_tokenizer(self, overwrite: bool) -> None:
        """Put the tokenizer beside the files, where training finds it by the manifest.

        Raises:
            ValueError: another tokenizer is there, which other files need or which only `overwrite` would replace.
        """
        folder = self.destination / TOKENIZER_FOLDER
        if folder.is_dir() and any(folder.iterdir()):
            if Tokenizer(folder).fingerprint == self.tokenizer.fingerprint:
                return
            own = {self.manifest_path(prefix) for prefix in self.prefixes}
            users = sorted(set(self.destination.glob("*.manifest.json")) - own)
            if users:
                raise ValueError(
                    f"{folder}: another tokenizer, which {users[0].name} needs; use that one, or give another "
                    "--destination_path"
                )
            if not overwrite:
                raise ValueError(f"{folder}: another tokenizer: {_REMEDY}")
            for path in folder.iterdir():
                path.unlink()
        make_folder(folder)
        for name, content in self.tokenizer.contents.items():
            write_file(folder / name, partial(_write_bytes, content))

    def _own_files(self, prefix: str) -> list[Path]:
        """The packed files of a series; a file that only looks like one of them is refused."""
        own = re.compile(re.escape(prefix) + r"_\d{10}\.bin")
        read_as = data_set(prefix)
        found = sorted(path for path in self.destination.glob("*.bin") if path.name.startswith(read_as))
        files = [path for path in found if own.fullmatch(path.name)]
        foreign = next((path for path in found if not own.fullmatch(path.name)), None)
        if foreign is not None and self.shard is None:
            raise ValueError(
                f"{foreign}: training would read this file as part of {read_as}, beside {prefix}; move it, or give another "
                "--destination_path or --prefix"
            )
        return files

    def _differences(self, found: dict[str, Any]) -> str:
        """What a manifest or record was made from that this plan is not."""
        made_from = found.get("made_from") or {}
        names = [name for name in {**self.identity, **made_from} if made_from.get(name) != self.identity.get(name)]
        return ", ".join(f"{name} {made_from.get(name)} instead of {self.identity.get(name)}" for name in names)


def _write_bytes(content: bytes, file: HashingFile) -> None:
    file.write(content)
