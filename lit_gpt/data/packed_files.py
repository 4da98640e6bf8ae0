"""The packed files of a folder: how many tokens each holds, and a fingerprint of all; scanned once, and kept.

Decisions: a scan opens each file once, from several threads, since a file system far away answers each late. What it
found is kept beside the data, or in the user's cache where that folder cannot be written to, and the next start only
lists the folder: it is believed while name, size, times and inode of every file and manifest are what they were. A file
that changed in the moment of the scan could change again without another time, so nothing is kept of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_gpt.data.packed_foreign import DATATROVE_SUFFIX, MEGATRON_SUFFIX, datatrove_chunk, megatron_chunk
from lit_gpt.data.packed_format import ALL_TYPES, HEADER_BYTES, Chunk, parse_header
from lit_gpt.data.packed_manifests import MANIFEST_SUFFIX, recorded_tokens
from lit_gpt.files import read_json_object, write_json

SCANS_CACHE = Path("~/.cache/smdm/packed_files")
"""Where scans of folders are kept that cannot be written to."""
SCAN_SUFFIX = ".scan.json"
_PROGRESS, _INDEX = ".progress.json", ".ds.index"
_TOKEN_FILES = (".bin", DATATROVE_SUFFIX)
_KINDS = (*_TOKEN_FILES, MEGATRON_SUFFIX, MANIFEST_SUFFIX, _PROGRESS, _INDEX)
# Bytes at a file's start and end that tell whether its content changed.
_FINGERPRINT_BYTES = 4096
# Changes whenever a kept scan would be read in another way.
_VERSION = 2
# The coarsest times of a file system (FAT): two changes within them can look like one.
_TIME_RESOLUTION_NS = 2 * 10**9
# Threads of a scan, the files that one of them opens at a time, and the files whose ends are in memory at once.
_SCAN_THREADS = 8
_PIECE_FILES = 64
_WINDOW_FILES = _SCAN_THREADS * _PIECE_FILES
# A scan that takes longer shows how far it is.
_PROGRESS_DELAY_S = 3


@dataclass(frozen=True)
class PackedFiles:
    """The packed files of one data set, by name; small enough to be sent to every process."""

    folder: Path
    names: list[str]
    """Sorted."""
    type_codes: np.ndarray
    """(files,) uint8: the tokens' types, by the codes of `packed_format.ALL_TYPES`."""
    sizes: np.ndarray
    """(files,) int64: tokens, padding included."""
    real_tokens: np.ndarray
    """(files,) int64: tokens before the padding."""
    fingerprint: str
    """SHA-256 over the block length, and names, headers and both ends of every file."""
    offsets: np.ndarray
    """(files,) int64: bytes before the first token; 0 in files of other programs."""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Of a file."""
        return self.folder / self.names[index]

    def token_type(self, index: int) -> np.dtype:
        """Of a file."""
        return ALL_TYPES[int(self.type_codes[index])]


def scan_folder(folder: Path, prefixes: Sequence[str], block_length: int) -> dict[str, PackedFiles]:
    """Find the token files `{prefix}*.bin` and `{prefix}*.ds` of a folder; those whose scan was kept are not opened.

    Args:
        folder: where the files lie; it need not exist.
        prefixes: of the data sets; one without files is not in the result.
        block_length: tokens of a block.

    Raises:
        ValueError: a foreign or truncated file, a chunk smaller than a block, a broken manifest, one that names a file that
            is not there, a preparation that is not finished; names the file.
        OSError: the folder or a file cannot be read.
    """
    listings = _list_folder(folder, prefixes)
    return {prefix: _found(folder, prefix, listings[prefix], block_length) for prefix in listings}


def _found(folder: Path, prefix: str, listing: _Listing, block_length: int) -> PackedFiles:
    """The scan that was kept of a data set, or a new one."""
    identity = hashlib.sha256(os.fsencode(f"{folder.absolute()}/{prefix}:{block_length}")).hexdigest()[:32]
    beside = folder / f".{prefix}-{block_length}{SCAN_SUFFIX}"
    places = (beside, SCANS_CACHE.expanduser() / f"{identity}{SCAN_SUFFIX}")
    stamps = listing.stamps(block_length)
    for place in places:
        # Whatever is the matter with it, a scan tells.
        with contextlib.suppress(OSError, ValueError):
            return _restored(folder, listing, stamps, read_json_object(place))
    now_ns = _file_system_time(folder)
    files = _scan(folder, listing, block_length)
    if listing.newest_ns < now_ns - _TIME_RESOLUTION_NS:
        _keep(places, _record(files, stamps))
    return files


# --- what a folder says of its files without opening them ------------------------------------------------------------


class _Stamp(NamedTuple):
    """What changes with a file."""

    size: int
    modified_ns: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Stamp:
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


class _Listing(NamedTuple):
    """The files of a data set as the folder lists them."""

    files: dict[str, _Stamp]
    """By name, sorted."""
    manifests: dict[str, _Stamp]
    """Manifests, and indexes of other programs, that are there, by name, sorted."""

    def offset(self, name: str) -> int:
        """Bytes before a file's first token."""
        return 0 if name.endswith(DATATROVE_SUFFIX) or _megatron_index(name) in self.manifests else HEADER_BYTES

    @property
    def newest_ns(self) -> int:
        """When a file or manifest was changed last."""
        stamps = (*self.files.values(), *self.manifests.values())
        return max(max(stamp.modified_ns, stamp.changed_ns) for stamp in stamps)

    def stamps(self, block_length: int) -> str:
        """SHA-256 that changes whenever what a scan would find may have changed."""
        lines = [
            f"{name}\0{size}:{modified_ns}:{changed_ns}:{inode}"
            for listed in (self.files, self.manifests)
            for name, (size, modified_ns, changed_ns, inode) in listed.items()
        ]
        return hashlib.sha256(os.fsencode("\n".join([str(block_length), *lines]))).hexdigest()


def _list_folder(folder: Path, prefixes: Sequence[str]) -> dict[str, _Listing]:
    """One pass over a folder; data sets without files are left out."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        listed = {entry.name: entry for entry in entries if entry.name.endswith(_KINDS)}
    found: dict[str, _Listing] = {}
    for prefix in prefixes:
        own = sorted(name for name in listed if name.startswith(prefix) and name not in _KINDS)
        files = {name: _Stamp.of(listed[name].stat()) for name in own
                 if name.endswith(_TOKEN_FILES) and listed[name].is_file()}  # fmt: skip
        if files:
            unfinished = next((name for name in own if name.endswith(_PROGRESS)), None)
            if unfinished is not None:
                raise ValueError(
                    f"{folder / unfinished}: the preparation of this data is not finished: the same command goes on with it "
                    "(deleting this file leaves what there is)"
                )
            beside = {name for name in own if name.endswith((MANIFEST_SUFFIX, _INDEX))} | set(
                map(_megatron_index, files)
            )
            kept = sorted(beside & listed.keys())
            found[prefix] = _Listing(files, {n: _Stamp.of(listed[n].stat()) for n in kept if listed[n].is_file()})
    return found


def _file_system_time(folder: Path) -> int:
    """Nanoseconds on the clock that gives a folder's files their times; on ours where that cannot be asked."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return time.time_ns()


def _series_name(name: str) -> str:
    """A file's name without its counter."""
    return name.rpartition("_")[0]


def _megatron_index(name: str) -> str:
    """What Megatron's index of a file would be called."""
    return name.rpartition(".")[0] + MEGATRON_SUFFIX


# --- scanning ---------------------------------------------------------------------------------------------------------


class _Ends(NamedTuple):
    """What a scan reads of a file."""

    chunk: Chunk
    start: bytes
    end: bytes


def _scan(folder: Path, listing: _Listing, block_length: int) -> PackedFiles:
    """Open every file of a data set, once."""
    names = list(listing.files)
    manifests = [name for name in listing.manifests if name.endswith(MANIFEST_SUFFIX)]
    recorded = recorded_tokens(folder, manifests, names)
    digest = hashlib.sha256(str(block_length).encode())
    codes, sizes, real_tokens = [], [], []
    offsets = [listing.offset(name) for name in names]
    ends = _read_ends([folder / name for name in names], offsets)
    for name, following, offset, (chunk, start, end) in zip(names, [*names[1:], ""], offsets, ends, strict=True):
        if chunk.size < block_length and offset:
            raise ValueError(
                f"{chunk.path}: a chunk of {chunk.size} tokens is smaller than a block of {block_length}: pack "
                f"with --chunk_size of at least {block_length}, or train with a smaller --block_size"
            )
        if name in recorded:
            recorded[name].check(chunk.path, chunk.size, chunk.dtype)
            real = recorded[name].tokens
        else:
            is_last = not following or _series_name(following) != _series_name(name)
            real = _tokens_before_padding(chunk) if is_last and offset else chunk.size
        digest.update(f"{name}:{chunk.dtype.str}:{chunk.size}:{real};".encode())
        digest.update(start)
        digest.update(end)
        codes.append(chunk.type_code)
        sizes.append(chunk.size)
        real_tokens.append(real)
    numbers = (np.array(codes, np.uint8), np.array(sizes, np.int64), np.array(real_tokens, np.int64))
    return PackedFiles(folder, names, *numbers, digest.hexdigest(), np.array(offsets, np.int64))


def _read_ends(paths: Sequence[Path], offsets: Sequence[int]) -> Iterator[_Ends]:
    """Header, start and end of every file, in order."""
    from tqdm import tqdm

    def read(piece: Sequence[int]) -> list[_Ends]:
        return [_file_ends(paths[number], offsets[number]) for number in piece]

    numbers = range(len(paths))
    description = f"opening the files of {paths[0].parent}" if paths else ""
    bar = tqdm(total=len(paths), desc=description, delay=_PROGRESS_DELAY_S, leave=False)
    with bar, ThreadPoolExecutor(_SCAN_THREADS, "scan") as pool:
        for first in range(0, len(paths), _WINDOW_FILES):
            window = numbers[first : first + _WINDOW_FILES]
            pieces = [window[start : start + _PIECE_FILES] for start in range(0, len(window), _PIECE_FILES)]
            for ends in pool.map(read, pieces):
                yield from ends
                bar.update(len(ends))


def _file_ends(path: Path, offset: int) -> _Ends:
    # Five system calls and no file object: each call hands the interpreter's lock over, which costs more than the call.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: no regular file")
        start = os.pread(descriptor, _FINGERPRINT_BYTES, 0)
        end = os.pread(descriptor, _FINGERPRINT_BYTES, max(0, status.st_size - _FINGERPRINT_BYTES))
    finally:
        os.close(descriptor)
    if offset:
        return _Ends(parse_header(start, status.st_size, path), start, end)
    of_other_program = datatrove_chunk if path.suffix == DATATROVE_SUFFIX else megatron_chunk
    return _Ends(of_other_program(path, status.st_size), start, end)


def _tokens_before_padding(chunk: Chunk) -> int:
    """Tokens of a series' last file before the run of one repeated token that it ends with."""
    tokens = chunk.open()
    different = np.flatnonzero(tokens[::-1] != tokens[-1])
    run = int(different[0]) if len(different) else chunk.size
    # A single last token is as likely a document's end as padding.
    return chunk.size - run if run > 1 else chunk.size


# --- keeping what was found -------------------------------------------------------------------------------------------


def _record(files: PackedFiles, stamps: str) -> dict[str, Any]:
    """A scan as JSON: of most files the type says everything, since their sizes are the folder's and nothing is padded."""
    starts = np.flatnonzero(np.diff(files.type_codes, prepend=0))
    lengths = np.diff(starts, append=len(files))
    padded = np.flatnonzero(files.real_tokens < files.sizes)
    found = {
        "version": _VERSION,
        "stamps": stamps,
        "fingerprint": files.fingerprint,
        "type_codes": [
            [int(files.type_codes[start]), int(length)] for start, length in zip(starts, lengths, strict=True)
        ],
        "padded": [[int(index), int(files.real_tokens[index])] for index in padded],
    }
    return {"found": found, "sha256": _json_hash(found)}


def _restored(folder: Path, listing: _Listing, stamps: str, record: Mapping[str, Any]) -> PackedFiles:
    """A kept scan; ValueError if it is damaged, or of other files."""
    found = record.get("found")
    if not isinstance(found, dict) or record.get("sha256") != _json_hash(found):
        raise ValueError("damaged")
    if found.get("version") != _VERSION or found.get("stamps") != stamps:
        raise ValueError("of other files")
    runs, padded, fingerprint = _pairs(found, "type_codes"), _pairs(found, "padded"), found.get("fingerprint")
    count = len(listing.files)
    if not all(code in ALL_TYPES and 0 < length <= count for code, length in runs):
        raise ValueError("unknown types")
    if sum(length for _, length in runs) != count or not isinstance(fingerprint, str):
        raise ValueError("not as many types as files")
    codes = np.repeat(np.array([code for code, _ in runs], np.uint8), [length for _, length in runs])
    token_bytes = np.array([ALL_TYPES[code].itemsize if code in ALL_TYPES else 0 for code in range(256)])[codes]
    offsets = np.array([listing.offset(name) for name in listing.files], np.int64)
    sizes, surplus = np.divmod(np.array([stamp.size for stamp in listing.files.values()]) - offsets, token_bytes)
    real_tokens = sizes.copy()
    for index, real in padded:
        if not (0 <= index < count and 0 <= real < sizes[index]):
            raise ValueError("more real tokens than tokens")
        real_tokens[index] = real
    if surplus.any():
        raise ValueError("no whole number of tokens")
    return PackedFiles(folder, list(listing.files), codes, sizes, real_tokens, fingerprint, offsets)


def _pairs(found: Mapping[str, Any], name: str) -> list[tuple[int, int]]:
    """A list of pairs of whole numbers out of JSON; ValueError if it is none."""
    value = found.get(name)
    if not isinstance(value, list) or not all(isinstance(one, list) and len(one) == 2 for one in value):
        raise ValueError(f"{name}: no pairs")
    if not all(type(number) is int for one in value for number in one):
        raise ValueError(f"{name}: no whole numbers")
    return [(first, second) for first, second in value]


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _keep(places: Sequence[Path], record: Mapping[str, Any]) -> None:
    """Write a scan to the first place that takes it; without any, the next start scans again."""
    for place in places:
        with contextlib.suppress(OSError):
            # The data's folder is there; the cache's may not be.
            place.parent.mkdir(parents=True, exist_ok=True)
            write_json(place, record)
            return
