"""The LITPKDS file format of packed tokens: header, chunks, builder. Byte for byte what TinyLlama's scripts write.

A file is 24 bytes of header (magic `LITPKDS`, uint64 version 1, uint8 dtype code, uint64 chunk size, little-endian) and
exactly chunk-size tokens; the builder pads the last file of a series with the separator. Files appear under their name
only when complete. The whole layout: docs/formats.md.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_gpt.files import open_regular

VALIDATION_PREFIX = "validation"
"""What the names of validation's files begin with."""
DATA_SETS = ("train_slim", "train_star", VALIDATION_PREFIX)
"""What the names of the files that training reads as one begin with, by its settings' defaults."""
MAGIC = b"LITPKDS"
_VERSION = 1
_HEADER = struct.Struct("<7sQBQ")
HEADER_BYTES = _HEADER.size
# Codes of the format; they are part of every file ever written.
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float32,
    7: np.float64,
    8: np.uint16,
}
TOKEN_TYPES = {
    code: np.dtype(known).newbyteorder("<") for code, known in _DTYPES.items() if np.issubdtype(known, np.integer)
}
"""By the codes of the format, the types that tokens may have in a file."""
UINT32_CODE = 132
"""Our own code of datatrove's tokens of 4 bytes: the format has none for uint32."""
ALL_TYPES = TOKEN_TYPES | {UINT32_CODE: np.dtype("<u4")}
"""By code, the types that tokens may have in a file of any program."""
# Vocabularies up to here are stored in two bytes per token (TinyLlama's limit).
_UINT16_VOCABULARY = 65500


@dataclass(frozen=True)
class Chunk:
    """One packed file's header."""

    path: Path
    type_code: int
    """One of `ALL_TYPES`."""
    size: int
    """Tokens in the file, padding included."""

    @property
    def dtype(self) -> np.dtype:
        """NumPy's type of a token in the file."""
        return ALL_TYPES[self.type_code]

    def open(self) -> np.memmap:
        """The tokens (size,) as a read-only memory map."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=HEADER_BYTES, shape=(self.size,))


def data_set(prefix: str) -> str:
    """What training reads the files of a series as part of: one of `DATA_SETS`, or the series itself."""
    return next((name for name in DATA_SETS if prefix.startswith(name)), prefix)


def read_header(path: Path) -> Chunk:
    """Read and check one file's header and length.

    Raises:
        ValueError: not a packed file, or a truncated one; says file, offset, what was found and expected.
    """
    with open_regular(path) as file:
        return parse_header(file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size, path)


def parse_header(raw: bytes, found: int, path: Path) -> Chunk:
    """`read_header` of a file's first bytes and its size in bytes."""
    raw = raw[:HEADER_BYTES]
    if len(raw) < HEADER_BYTES or raw[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"{path}: not a packed token file: offset 0 holds {raw[: len(MAGIC)]!r}, expected {MAGIC!r} and "
            f"{HEADER_BYTES} header bytes; make such files with scripts/prepare_text.py"
        )
    _, version, code, size = _HEADER.unpack(raw)
    if version != _VERSION:
        raise ValueError(f"{path}: offset 7 holds format version {version}, expected {_VERSION}")
    if code not in TOKEN_TYPES:
        raise ValueError(f"{path}: offset 15 holds dtype code {code}, expected one of the integer codes 1-5 or 8")
    chunk = Chunk(path, code, size)
    expected = HEADER_BYTES + size * chunk.dtype.itemsize
    if found != expected:
        kind = "truncated" if found < expected else "too long"
        raise ValueError(
            f"{path}: {kind}: it ends at offset {found}, expected {expected} ({size} tokens of {chunk.dtype.name}); "
            "make it again"
        )
    return chunk


class PackedDatasetBuilder:
    """Writes a series of packed files `{prefix}_{counter:010d}.bin`; users' preparation scripts import this.

    Args:
        outdir: folder, made if it is missing.
        prefix: of the file names.
        chunk_size: tokens of a file.
        sep_token: what the unfilled end of the last file is padded with.
        dtype: numpy type of a token, or "auto" to choose by the vocabulary.
        vocab_size: needed for "auto".

    Attributes:
        filenames: paths of the files written so far, as strings.
        hashes: their SHA-256, in hexadecimal.

    Raises:
        ValueError: "auto" without vocab_size, or a dtype that the format does not know.
    """

    def __init__(
        self,
        outdir: str | Path,
        prefix: str,
        chunk_size: int,
        sep_token: int,
        dtype: str | type[np.generic] = "auto",
        vocab_size: int | None = None,
    ) -> None:
        if dtype == "auto":
            if vocab_size is None:
                raise ValueError("PackedDatasetBuilder: dtype='auto' needs vocab_size")
            dtype = np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32
        codes = [code for code, known in _DTYPES.items() if np.dtype(known) == np.dtype(dtype)]
        if not codes:
            raise ValueError(f"PackedDatasetBuilder: the format has no code for dtype {dtype}")
        if chunk_size < 1:
            raise ValueError(f"PackedDatasetBuilder: chunk_size {chunk_size}: at least 1")
        self.filenames: list[str] = []
        self.hashes: list[str] = []
        self._code = codes[0]
        self._dtype = np.dtype(_DTYPES[codes[0]])
        self._outdir, self._prefix, self._chunk_size, self._sep_token = Path(outdir), prefix, chunk_size, sep_token
        self._tokens = np.full(chunk_size, sep_token, dtype=self._dtype)
        self._filled = 0
        self._counter = 0
        self._ends = np.empty(0, dtype=np.int64)
        self._keeps_ends = False

    @property
    def dtype(self) -> type[np.generic]:
        """NumPy type of the tokens."""
        return self._dtype.type

    @property
    def pending(self) -> np.ndarray:
        """The tokens that wait for the next file: (n,), a copy."""
        return self._tokens[: self._filled].copy()

    @property
    def pending_ends(self) -> list[int]:
        """Where documents end among them."""
        return self._ends.tolist()

    def continue_from(
        self, counter: int, pending: np.ndarray, hashes: Sequence[str] = (), ends: Sequence[int] | None = None
    ) -> None:
        """Go on where an interrupted builder was.

        Args:
            counter: the next file's number.
            pending: its first tokens (n,).
            hashes: of the files before it.
            ends: where documents end among the pending tokens; None where no index is kept.
        """
        self._counter = counter
        self.filenames = [str(self._path(number)) for number in range(counter)]
        self.hashes = list(hashes)
        self._filled = 0
        self._tokens.fill(self._sep_token)
        self.add_array(pending)
        self._keeps_ends = ends is not None
        self._ends = np.asarray(ends or (), dtype=np.int64)

    def add_documents(self, array: np.ndarray, ends: np.ndarray) -> None:
        """`add_array` of whole documents; beside each file then lies an index of where its documents end.

        Args:
            array: the tokens (n,) of some documents, one behind the other.
            ends: (documents,) the number of tokens up to the end of each.
        """
        self._keeps_ends = True
        # Counted from the first token of the file that is being filled, which these may lie behind.
        self._ends = np.concatenate([self._ends, np.asarray(ends, dtype=np.int64) + self._filled])
        self.add_array(array)

    def add_array(self, array: np.ndarray) -> None:
        """Append tokens (n,); a full chunk is written when the next token comes.

        Raises:
            ValueError: a token that the dtype cannot hold (NumPy would wrap it around without a word).
        """
        array = np.asarray(array)
        if array.size and self._dtype.kind in "iu":
            smallest, largest, limits = int(array.min()), int(array.max()), np.iinfo(self._dtype)
            if smallest < limits.min or largest > limits.max:
                raise ValueError(
                    f"PackedDatasetBuilder: token ids from {smallest} to {largest} do not fit into {self._dtype.name}: "
                    "give the tokenizer's true vocab_size, or a wider dtype"
                )
        while self._filled + array.shape[0] > self._chunk_size:
            part = self._chunk_size - self._filled
            self._tokens[self._filled :] = array[:part]
            self._filled = self._chunk_size
            self._write_chunk()
            array = array[part:]
        self._tokens[self._filled : self._filled + array.shape[0]] = array
        self._filled += array.shape[0]

    def write_reminder(self) -> None:
        """Write what is left, padded with the separator (the name is TinyLlama's); nothing left is a file of separators."""
        self._write_chunk()

    def write_rest(self) -> None:
        """`write_reminder`, if anything is left."""
        if self._filled:
            self._write_chunk()

    def _write_chunk(self) -> None:
        path = self._path(self._counter)
        self._outdir.mkdir(parents=True, exist_ok=True)
        header = _HEADER.pack(MAGIC, _VERSION, self._code, self._chunk_size)
        tokens = self._tokens.astype(self._dtype.newbyteorder("<"), copy=False).tobytes()
        if self._keeps_ends:
            in_file = self._ends <= self._chunk_size
            _write_whole(index_path(path), self._ends[in_file].astype("<u8").tobytes())
            self._ends = self._ends[~in_file] - self._chunk_size
        _write_whole(path, header, tokens)
        digest = hashlib.sha256(header)
        digest.update(tokens)
        self.hashes.append(digest.hexdigest())
        self.filenames.append(str(path))
        self._counter += 1
        self._filled = 0
        self._tokens.fill(self._sep_token)

    def _path(self, number: int) -> Path:
        return self._outdir / f"{self._prefix}_{number:010d}.bin"


def index_path(path: Path) -> Path:
    """Where the ends of a packed file's documents are kept: uint64 numbers of tokens, as datatrove's `.index`."""
    return path.with_name(f"{path.name}.index")


def _write_whole(path: Path, *parts: bytes) -> None:
    """Write a file that is there only when it is whole and on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
