"""Token files of other programs, read as they are: datatrove's `.ds` and Megatron's `.bin` with its `.idx`; document ends.

Sources of the formats: datatrove 0.10 (`pipeline/tokens/tokenizer.py`: tokens in 2 or 4 bytes, `.index` with the number
of tokens up to each document's end as uint64, `.metadata` whose first line ends in the bytes of a token) and
Megatron-LM (`core/datasets/indexed_dataset.py`: header, type code, lengths, pointers, documents). Little-endian.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

from lit_gpt.data.packed_format import TOKEN_TYPES, UINT32_CODE, Chunk, index_path
from lit_gpt.files import open_regular

DATATROVE_SUFFIX = ".ds"
MEGATRON_SUFFIX = ".idx"
"""Of the index beside Megatron's `.bin`."""
_BYTES_TO_CODE = {2: 8, 4: UINT32_CODE}
_MEGATRON = struct.Struct("<9sQBQQ")
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"


def datatrove_chunk(path: Path, size: int) -> Chunk:
    """The header that a `.ds` file of `size` bytes would have.

    Raises:
        ValueError: neither its index nor its metadata say how large a token is, or they do not fit the file.
    """
    index, metadata = index_path(path), path.with_name(f"{path.name}.metadata")
    if index.is_file():
        ends = document_ends(path)
        tokens = int(ends[-1]) if ends is not None and len(ends) else 0
        token_bytes = size // tokens if tokens else 2
        # A file of 4-byte tokens that was cut in half fits its index, but not its metadata.
        contradicted = metadata.is_file() and _metadata(metadata)[0] in ({2, 4} - {token_bytes})
        if token_bytes not in _BYTES_TO_CODE or tokens * token_bytes != size or contradicted:
            raise ValueError(
                f"{path}: {size} bytes, but {index.name} counts {tokens} tokens: truncated, or of another file; copy both"
            )
    elif metadata.is_file():
        token_bytes, first = _metadata(metadata)
        if not token_bytes or len(first) < 2 or first[1] != str(size // token_bytes) or size % token_bytes:
            raise ValueError(
                f"{path}: {size} bytes do not fit what {metadata.name} says ({' '.join(first)[:80]!r}); copy both"
            )
    else:
        raise ValueError(
            f"{path}: without {index.name} or {metadata.name} the size of its tokens is unknown; copy one of them"
        )
    return Chunk(path, _BYTES_TO_CODE[token_bytes], size // token_bytes)


def _metadata(path: Path) -> tuple[int, list[str]]:
    """Bytes of a token by a `.metadata` file, 0 where it does not say; its first two lines."""
    with open_regular(path) as file:
        first = file.read(1 << 12).decode(errors="replace").splitlines()[:2]
    found = first[0].rpartition("|")[2] if first else ""
    return int(found) if found in ("2", "4") else 0, first


def megatron_chunk(path: Path, size: int) -> Chunk:
    """The header that Megatron's `.bin` of `size` bytes would have, by its index.

    Raises:
        ValueError: the index is none, is truncated, or does not fit the file.
    """
    code, lengths, _ = _read_megatron(path)
    tokens = int(lengths.sum(dtype=np.int64))
    expected = tokens * TOKEN_TYPES[code].itemsize
    if expected != size:
        raise ValueError(
            f"{path}: {size} bytes, but its index counts {tokens} tokens of {TOKEN_TYPES[code].itemsize} bytes: truncated, "
            "or of another file; copy both"
        )
    return Chunk(path, code, tokens)


def document_ends(path: Path) -> np.ndarray | None:
    """Where documents end in a token file: numbers of tokens from the file's start, rising; None where nothing tells.

    Args:
        path: a packed `.bin`, a `.ds`, or Megatron's `.bin`.

    Returns:
        (documents,) uint64 or int64; of an `.index` a read-only memory map. A document that goes on in the next file has
        no end in this one.

    Raises:
        ValueError: the index is damaged.
    """
    if path.with_suffix(MEGATRON_SUFFIX).is_file():
        _, lengths, documents = _read_megatron(path)
        tokens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return tokens[documents[1:]]
    index = index_path(path)
    try:
        size = index.stat().st_size
    except FileNotFoundError:
        return None
    if size % 8:
        raise ValueError(f"{index}: {size} bytes are no whole number of 8-byte ends; make it again")
    return np.memmap(index, dtype="<u8", mode="r") if size else np.empty(0, dtype="<u8")


def _read_megatron(path: Path) -> tuple[int, np.ndarray, np.ndarray]:
    """(type code, tokens of each sequence, the number of sequences before each document and behind the last)."""
    index = path.with_suffix(MEGATRON_SUFFIX)
    with open_regular(index) as file:
        raw = file.read(_MEGATRON.size)
        size = os.fstat(file.fileno()).st_size
    if len(raw) < _MEGATRON.size or raw[:9] != _MEGATRON_MAGIC:
        raise ValueError(f"{index}: offset 0 holds {raw[:9]!r}, expected {_MEGATRON_MAGIC!r} of a Megatron index")
    _, version, code, sequences, documents = _MEGATRON.unpack(raw)
    if version != 1 or code not in TOKEN_TYPES:
        raise ValueError(f"{index}: version {version} with type code {code}; expected version 1 and an integer type")
    # Behind the tables may follow a mode of each sequence, which text does not need.
    least = _MEGATRON.size + 12 * sequences + 8 * documents
    if size < least:
        raise ValueError(f"{index}: truncated: it ends at offset {size}, expected at least {least}; copy it again")
    lengths = np.memmap(index, "<i4", "r", _MEGATRON.size, (sequences,)) if sequences else np.empty(0, "<i4")
    starts = np.memmap(index, "<i8", "r", _MEGATRON.size + 4 * sequences, (sequences,)) if sequences else lengths
    ends = (
        np.memmap(index, "<i8", "r", _MEGATRON.size + 12 * sequences, (documents,)) if documents else np.zeros(1, int)
    )
    expected = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) * TOKEN_TYPES[code].itemsize
    if (lengths < 0).any() or not np.array_equal(starts, expected[:-1]):
        raise ValueError(f"{index}: its sequences do not lie one behind the other; merge the data set again")
    if ends[0] != 0 or ends[-1] != sequences or (np.diff(ends) < 0).any():
        raise ValueError(f"{index}: its documents are not in order; write it again")
    return code, lengths, ends
