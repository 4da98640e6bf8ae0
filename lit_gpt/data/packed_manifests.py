"""What the manifests of packed files say, and whether all that they name is there.

Only names and counts are compared here, and sizes where files are opened: a start must not read terabytes. Hashes are for
`scripts/check_data.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from lit_gpt.files import read_json_object

MANIFEST_SUFFIX = ".manifest.json"


def recorded_tokens(folder: Path, manifests: Iterable[str], files: Collection[str]) -> dict[str, int]:
    """Real tokens of the files that manifests name (`files: {name: {tokens: n}}`).

    Args:
        folder: where all lie.
        manifests: names of manifests, those that cannot be read are refused.
        files: names of the packed files that are there.

    Raises:
        ValueError: a broken manifest, a file that is not there, a shard that is not; says what to do.
    """
    recorded: dict[str, int] = {}
    shards: dict[str, tuple[int, set[int]]] = {}
    for manifest in manifests:
        values = _manifest_values(folder / manifest)
        missing = sorted(values.tokens.keys() - set(files))
        if missing:
            raise ValueError(
                f"{folder / manifest}: names {len(missing)} file(s) that are not there, such as {missing[0]}: make or copy "
                "them again (deleting the manifest leaves what there is)"
            )
        recorded |= values.tokens
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

    tokens: dict[str, int]
    """Real tokens by file."""
    shard: tuple[int, int] | None
    """Number and count of the shards, if it is one of several."""


def _manifest_values(manifest: Path) -> _ManifestValues:
    try:
        values = read_json_object(manifest)
        found = {name: int(entry["tokens"]) for name, entry in values.get("files", {}).items() if entry is not None}
        shard = values.get("shard")
        if any(tokens < 0 for tokens in found.values()):
            raise ValueError("it counts fewer than 0 tokens")
        return _ManifestValues(found, None if shard is None else (int(shard["index"]), int(shard["count"])))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{manifest}: not a manifest of scripts/prepare_text.py ({error}); make it again or delete it"
        ) from None


def recorded_hashes(manifest: Path) -> dict[str, str]:
    """SHA-256 by file name, of those files that have one in a manifest; ValueError as `recorded_tokens`."""
    entries = read_json_object(manifest).get("files", {})
    return {name: str(entry["sha256"]) for name, entry in entries.items() if "sha256" in entry}
