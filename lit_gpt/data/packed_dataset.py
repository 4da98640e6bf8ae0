"""Reading packed tokens: any sample of any epoch by its number.

Decisions: the data position of a run is one number k, and sample k is a pure function of (files, weights, seed, k). In
a mixture k falls on data set d, index j, by a deterministic rule that keeps every set's count within two samples of its
share; set d's epoch is j // n_d, and each epoch is a pseudo-random permutation computed on the fly, so nothing grows
with the corpus and seeking costs nothing. What pads the end of a series is never a real token: a manifest says where it
begins, and without one it is the trailing run of one repeated token.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import heapq
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_gpt.data.packed_files import PackedFiles, scan_folder
from lit_gpt.data.packed_foreign import document_ends
from lit_gpt.data.packed_format import VALIDATION_PREFIX
from lit_gpt.files import read_json_object
from lit_gpt.randomness import Stream, permute_index

# Files of a data set that stay open: far below the usual limit of 1024 descriptors, with thousands of files.
_OPEN_FILES = 64
# A block with a single real token predicts nothing.
_LEAST_REAL_TOKENS = 2


class Extent(NamedTuple):
    """How long a sample is."""

    length: int
    """Tokens that are real; the rest is padding."""
    prompt_length: int = 0
    """Leading tokens that are given; pretraining has none."""


@dataclass(frozen=True)
class Sample:
    """One block of tokens."""

    tokens: np.ndarray
    """(block_length,) int64."""
    length: int
    """How many tokens are real; the rest is padding."""
    prompt_length: int = 0
    """Leading tokens that are given; pretraining has none."""


class PackedSeries:
    """One data set: the blocks of some files, in order; may be read from several threads at once.

    Args:
        files: packed files; those that share a name but for the counter form one series with one padded end.
        block_length: tokens of a block; blocks do not cross files.
        vocab_size: ids must lie below.

    Raises:
        ValueError: ids beyond the vocabulary.
    """

    def __init__(self, files: PackedFiles, block_length: int, vocab_size: int) -> None:
        self.files, self.block_length, self.vocab_size = files, block_length, vocab_size
        # A chunk holds size // block_length blocks; the padded end of a series holds fewer, the last one partly filled.
        real = files.real_tokens
        started = np.where(real >= _LEAST_REAL_TOKENS, (real - _LEAST_REAL_TOKENS) // block_length + 1, 0)
        # Files of other programs end where their tokens do; what is left there is a partly filled block, too.
        self._ends = np.cumsum(np.where(files.offsets, np.minimum(files.sizes // block_length, started), started))
        self._open_file = _open_file_cache(files)
        if len(self):
            self[0]  # a foreign vocabulary is better refused before training starts

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Sample:
        file, first, real = self._locate(index)
        tokens = self._read(file, first).astype(np.int64)
        self._check_vocabulary(tokens, file, first)
        return Sample(tokens, real)

    def length(self, index: int) -> int:
        """Real tokens of a block, without reading it."""
        return self._locate(index)[2]

    def document_ends(self, index: int) -> np.ndarray | None:
        """Where documents end in a block: (n,) int64 numbers of its tokens up to each end; None where nothing tells.

        The ends come from the index beside the file (`packed_foreign.document_ends`).
        """
        file, first, real = self._locate(index)
        ends = document_ends(self.files.path(file))
        if ends is None:
            return None
        low, high = np.searchsorted(ends, [first + 1, first + real], side="left")
        high += int(high < len(ends) and int(ends[high]) == first + real)
        return np.asarray(ends[low:high], dtype=np.int64) - first

    def _locate(self, index: int) -> tuple[int, int, int]:
        """File number, first token in it, real tokens of the block."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[file - 1]) if file else 0
        first = (index - before) * self.block_length
        return file, first, min(self.block_length, int(self.files.real_tokens[file]) - first)

    def _read(self, file: int, first: int) -> np.ndarray:
        """A block's tokens in the file's own type."""
        token_type = self.files.token_type(file)
        count = min(self.block_length, int(self.files.sizes[file]) - first)
        offset, size = int(self.files.offsets[file]) + first * token_type.itemsize, count * token_type.itemsize
        try:
            opened = self._open_file(file)  # held: another thread may let it go meanwhile
            raw = os.pread(opened.descriptor, size, offset)
            if len(raw) < size:
                raise ValueError(f"it ends at offset {offset + len(raw)}, expected at least {offset + size}")
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.files.path(file)}: changed or gone since it was opened ({error})") from error
        return np.pad(np.frombuffer(raw, token_type), (0, self.block_length - count))

    def _check_vocabulary(self, tokens: np.ndarray, file: int, first: int) -> None:
        largest, smallest = int(tokens.max()), int(tokens.min())
        if largest >= self.vocab_size or smallest < 0:
            wrong = largest if largest >= self.vocab_size else smallest
            position = first + int(np.flatnonzero(tokens == wrong)[0])
            offset = int(self.files.offsets[file]) + position * self.files.token_type(file).itemsize
            raise ValueError(
                f"{self.files.path(file)}: offset {offset} holds "
                f"token {wrong}, but the model's vocabulary has {self.vocab_size} tokens: the data was packed with another "
                "tokenizer; give --vocab_size"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Data loader workers open files of their own."""
        return {name: value for name, value in self.__dict__.items() if name != "_open_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _open_file=_open_file_cache(state["files"]))


class _OpenFile:
    """A descriptor that is closed when the last thread that reads by it has let it go."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def _open_file_cache(files: PackedFiles) -> Callable[[int], _OpenFile]:
    """The open file of a number; the latest ones stay open, for all threads."""

    def open_file(file: int) -> _OpenFile:
        # Of a pipe that took the file's place the opening would not return.
        return _OpenFile(os.open(files.path(file), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))

    return functools.lru_cache(_OPEN_FILES)(open_file)


class PackedMixture:
    """Endless training data: several data sets by weight, each in a new order every epoch.

    Args:
        sets: data sets with their names.
        weights: positive; shares of the samples.
        seed: decides the orders.
    """

    def __init__(self, sets: Mapping[str, PackedSeries], weights: Sequence[float], seed: int) -> None:
        assert len(sets) == len(weights) and all(weight > 0 for weight in weights)
        self.names, self.sets, self.weights, self.seed = list(sets), list(sets.values()), list(weights), seed
        self.block_length = self.sets[0].block_length
        self._root = _split_tree(weights)

    def assign(self, k: int) -> tuple[int, int]:
        """Data set of sample k, and how many earlier samples went to that set.

        The sets are the leaves of a binary tree. Where a share of a node's samples goes left, its first n samples have
        sent round(share * n) there, and sample n goes left where that steps up. Exact in whole numbers for any k. A
        set's count differs from its share of k by at most 0.5 with two sets and by less than 1.7 with any number: the
        tree is Huffman's, in which the errors of a set's ancestors count less as the Fibonacci numbers grow.
        """
        node = self._root
        while isinstance(node, _Split):
            left = node.sent_left(k)
            if node.sent_left(k + 1) > left:
                node, k = node.left, left
            else:
                node, k = node.right, k - left
        return node, k

    def locate(self, k: int) -> tuple[int, int]:
        """Data set and block number of sample k."""
        index, position = self.assign(k)
        epoch, place = divmod(position, len(self.sets[index]))
        return index, permute_index(place, len(self.sets[index]), self.seed, int(Stream.DATA_ORDER), index, epoch)

    def __getitem__(self, k: int) -> Sample:
        index, block = self.locate(k)
        return self.sets[index][block]

    def extent(self, k: int) -> Extent:
        """Real tokens of sample k, without reading them."""
        index, block = self.locate(k)
        return Extent(self.sets[index].length(block))

    @property
    def fingerprint(self) -> str:
        """sha256 over what decides content and order, the seed apart."""
        parts = [f"{name}:{weight!r}:{one.files.fingerprint}" for name, weight, one in self._described()]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    def epochs(self, samples: int) -> float:
        """How often the most repeated data set is gone through in `samples` samples."""
        total = sum(self.weights)
        return max(samples * weight / total / len(one) for _, weight, one in self._described())

    def describe(self) -> str:
        """One line for the console."""
        parts = [
            f"{name} {len(one)} blocks, {one.files.real_tokens.sum():,} tokens in {len(one.files)} file(s), weight {weight:g}"
            for name, weight, one in self._described()
        ]
        return "; ".join(parts)

    def _described(self) -> list[tuple[str, float, PackedSeries]]:
        return list(zip(self.names, self.weights, self.sets, strict=True))


@dataclass(frozen=True)
class _Split:
    """An inner node of the mixture's tree."""

    share: Fraction
    """Of the node's samples, those that go left."""
    left: _Split | int
    right: _Split | int

    def sent_left(self, samples: int) -> int:
        """How many of the node's first samples go left: share * samples, rounded."""
        denominator = self.share.denominator
        return (2 * samples * self.share.numerator + denominator) // (2 * denominator)


def _split_tree(weights: Sequence[float]) -> _Split | int:
    """Huffman's tree over the sets: the two lightest nodes are joined until one is left."""
    # The decimal that the user typed, not the binary number nearest to it.
    nodes: list[tuple[Fraction, int, _Split | int]] = [(Fraction(str(w)), i, i) for i, w in enumerate(weights)]
    heapq.heapify(nodes)
    while len(nodes) > 1:
        lighter, heavier = heapq.heappop(nodes), heapq.heappop(nodes)
        total = lighter[0] + heavier[0]
        first = min(lighter[1], heavier[1])
        heapq.heappush(nodes, (total, first, _Split(heavier[0] / total, heavier[2], lighter[2])))
    return nodes[0][2]


def open_mixture(
    folder: Path,
    weights: Mapping[str, float],
    block_length: int,
    vocab_size: int,
    seed: int,
    found: Mapping[str, PackedFiles] | None = None,
) -> PackedMixture:
    """Open training data by file prefix.

    Args:
        folder: where the files lie.
        weights: prefix to weight; sets of weight 0 need not exist.
        block_length: tokens of a block (the model's block size and one).
        vocab_size: ids must lie below.
        seed: decides the order.
        found: the folder's scan, where another process has made it.

    Raises:
        ValueError: no data, or data that does not fit; says where it looked and how to make it.
    """
    if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"--data_weights {dict(weights)}: expected weights of at least 0, one of them above 0")
    prefixes = [prefix for prefix, weight in weights.items() if weight > 0]
    if found is None:
        found = scan_folder(folder, prefixes, block_length)
    sets: dict[str, PackedSeries] = {}
    for prefix in prefixes:
        if prefix not in found:
            missing = "" if folder.is_dir() else " (there is no such folder)"
            raise ValueError(
                f"no training data: looked for {folder / prefix}*.bin{missing}; make it with "
                "python scripts/prepare_text.py --source_path TEXT --tokenizer_path TOKENIZER "
                f"--destination_path {folder} --prefix {prefix}, or give --data_dir"
            )
        sets[prefix] = PackedSeries(found[prefix], block_length, vocab_size)
        if not len(sets[prefix]):
            raise ValueError(
                f"{folder / prefix}*.bin: the {len(found[prefix])} file(s) hold no real tokens, only padding"
            )
    return PackedMixture(sets, [weights[prefix] for prefix in sets], seed)


def open_validation(
    folder: Path, block_length: int, vocab_size: int, found: Mapping[str, PackedFiles] | None = None
) -> PackedSeries | None:
    """The validation blocks in file order, or None where there are none; arguments and errors as `open_mixture`."""
    if found is None:
        found = scan_folder(folder, [VALIDATION_PREFIX], block_length)
    series = PackedSeries(found[VALIDATION_PREFIX], block_length, vocab_size) if VALIDATION_PREFIX in found else None
    return series if series is not None and len(series) else None


def recorded_tokenizer(folder: Path, prefixes: Sequence[str]) -> dict[str, Any]:
    """What the data's manifest says of its tokenizer: source, fingerprint, vocab_size; empty without a manifest.

    A source that lies in the data's own folder is given as a path from here.
    """
    for prefix in prefixes:
        for path in sorted(folder.glob(f"{glob.escape(prefix)}*.manifest.json"))[:1]:
            found = read_json_object(path).get("tokenizer", {})
            if not isinstance(found, dict) or not isinstance(found.get("source"), str | None):
                raise ValueError(f"{path}: its tokenizer is no object with a source; make it again or delete it")
            found = dict(found)
            if (folder / str(found.get("source"))).exists():
                found["source"] = str(folder / found["source"])
            return found
    return {}
