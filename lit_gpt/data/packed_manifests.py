"""What the manifests of packed files say, and whether all that they name is there.

Only names and counts are compared here, and sizes where files are opened: a start must not read terabytes. Hashes are for
`scripts/check_data.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lit_gpt.data.packed_foreign import document_ends
from lit_gpt.data.packed_format import index_path
from lit_gpt.files import read_json_object

MANIFEST_SUFFIX = ".manifest.json"


class RecordedFile(NamedTuple):
    """What a manifest says of a packed file."""

    tokens: int
    """Real ones."""
    size: int | None
    """Tokens, padding included; None where it does not say."""
    dtype: str | None
    """NumPy's name of the tokens' type; None where it does not say."""

    def check(self, path: Path, size: int, dtype: np.dtype) -> None:
        """Refuse a file of other size or type with ValueError."""
        if self.tokens > size or self.size not in (None, size) or self.dtype not in (None, dtype.name):
            expected = (
                f"{self.tokens if self.size is None else self.size} tokens{f' of {self.dtype}' if self.dtype else ''}"
            )
            raise ValueError(
                f"{path}: {size} tokens of {dtype.name}, but its manifest says {expected}: not the file that was made; make or "
                "copy it again"
            )


def recorded_tokens(folder: Path, manifests: Iterable[str], files: Collection[str]) -> dict[str, RecordedFile]:
    """What manifests say of the files that they name (`files: {name: {tokens: n}}`).

    Args:
        folder: where all lie.
        manifests: names of manifests, those that cannot be read are refused.
        files: names of the packed files that are there.

    Raises:
        ValueError: a broken manifest, a file that is not there, a shard that is not; says what to do.
    """
    recorded: dict[str, RecordedFile] = {}
    shards: dict[str, tuple[int, set[int]]] = {}
    for manifest in manifests:
        values = _manifest_values(folder / manifest)
        missing = sorted(values.files.keys() - set(files))
        if missing:
            raise ValueError(
                f"{folder / manifest}: names {len(missing)} file(s) that are not there, such as {missing[0]}: make or copy "
                "them again (deleting the manifest leaves what there is)"
            )
        recorded |= values.files
        if values.shard is not None:
            shards.setdefault(manifest.rpartition("_")[0], (values.shard[1], set()))[1].add(values.shard[0])
    for series, (count, made) in shards.items():
        unfinished = sorted(set(range(count)) - made)
        if unfinished:
            raise ValueError(
                f"{folder / series}*: {len(unfinished)} of {count} shards are not finished, such as {unfinished[0]}: the same "
                "command of the preparation goes on with them"
            )
    return recorded


class _ManifestValues(NamedTuple):
    """What training needs of a manifest."""

    files: dict[str, RecordedFile]
    """By name."""
    shard: tuple[int, int] | None
    """Number and count of the shards, if it is one of several."""


def _manifest_values(manifest: Path) -> _ManifestValues:
    try:
        values = read_json_object(manifest)
        size, dtype = values.get("chunk_size"), values.get("dtype")
        size = None if size is None else int(size)
        found = {
            name: RecordedFile(int(entry["tokens"]), size, dtype)
            for name, entry in values.get("files", {}).items()
            if entry is not None
        }
        shard = values.get("shard")
        if any(file.tokens < 0 for file in found.values()):
            raise ValueError("it counts fewer than 0 tokens")
        return _ManifestValues(found, None if shard is None else (int(shard["index"]), int(shard["count"])))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{manifest}: not a manifest of scripts/prepare_text.py ({error}); make it again or delete it"
        ) from None


def recorded_hashes(manifest: Path) -> dict[str, str]:
    """SHA-256 by file name, '' where a manifest has none; ValueError as `recorded_tokens`."""
    entries = read_json_object(manifest).get("files", {})
    return {name: str((entry or {}).get("sha256", "")) for name, entry in entries.items()}


def index_problems(manifest: Path) -> list[str]:
    """What is wrong with the indexes beside the files of a manifest with hashes, a line each.

    A document ends in one file alone, so that the ends of all files are as many as the documents, but those of a last file
    that was left out.
    """
    values = read_json_object(manifest)
    found, total = [], 0
    for name, entry in values.get("files", {}).items():
        if not (entry or {}).get("sha256"):
            return []  # of an earlier version, or of scripts/prepare_fineweb.py, which write none
        path = manifest.parent / name
        try:
            ends = document_ends(path)
        except ValueError as error:
            found.append(str(error))
            continue
        if ends is None:
            found.append(f"{index_path(path)}: missing")
        elif len(ends) and (ends[-1] > entry["tokens"] or (ends[1:] < ends[:-1]).any()):
            found.append(f"{index_path(path)}: not the ends of documents in {entry['tokens']} tokens")
        else:
            total += len(ends)
    documents = values.get("documents")
    short = documents is not None and total < documents and not values.get("dropped_tokens")
    if not found and documents is not None and (short or total > documents):
        found.append(f"{manifest}: counts {documents} documents, the indexes of its files {total}")
    return found
