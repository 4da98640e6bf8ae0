"""Reading an old pickled list of token ids with a reader that can build nothing but non-negative integers.

Evaluation data of earlier days is `pickle.dump(list_of_ints)`. Unpickling runs whatever a file asks for, so this module
reads the bytes itself. Decisions: of the format's opcodes only those that a list of integers needs are known, and any
other ends the reading; a regular expression cuts a block into opcodes, the rest is done on arrays, so that 200 million
ids take less than a minute; structure is checked as strictly as content (a mark within a mark, an integer that is never
appended, bytes behind the end). Protocols 2 to 5, which Python 3 writes.

Source of the opcodes: CPython's Lib/pickletools.py, which documents each of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from lit_gpt.files import open_regular

# A few hundred thousand opcodes: large enough for arrays to pay, small enough to stay in the cache.
_BLOCK_BYTES = 1 << 20
# LONG1 (1 + 1) with the 8 bytes of an int64.
_LONGEST_OPCODE = 10
_STOP, _APPEND, _APPENDS, _MARK, _BININT, _BININT1, _BININT2, _LONG1, _FRAME = b".ae(JKM\x8a\x95"
_LONGS = b"|".join(b"\x8a" + bytes([size]) + b"." * size for size in range(9))
# The most frequent first. What is no opcode of ours swallows the rest of the block.
_OPCODE = rb"M..|K.|J....|[(ea.]|\x95.{8}|" + _LONGS
_ONE = re.compile(_OPCODE, re.DOTALL)
_EACH = re.compile(_OPCODE + rb"|.+", re.DOTALL)
# How the file must begin: protocol, a first frame (from protocol 4 on), the list, its number among the known objects.
_BEGINNING = (
    (re.compile(rb"\x80[\x02-\x05]", re.DOTALL), "the beginning of a pickle of protocol 2 to 5"),
    (re.compile(rb"(?:\x95.{8})?\]", re.DOTALL), "a list"),
    (re.compile(rb"(?:q.|r.{4}|\x94)?", re.DOTALL), ""),
)
_LONGEST_BEGINNING = 17
_NAMES = {
    **dict.fromkeys(b"ci\x93", "a class or function"),
    **dict.fromkeys(b"Rbo\x81\x92", "the making of an object"),
    **dict.fromkeys(b"ghj", "a reference to an earlier object"),
    **dict.fromkeys(b"SUTVX\x8c\x8d", "text"),
    **dict.fromkeys(b"BC\x8e\x96", "bytes"),
    **dict.fromkeys(b"\x88\x89", "a truth value"),
    **dict.fromkeys(b"FG", "a floating-point number"),
    **dict.fromkeys(b")t\x85\x86\x87", "a tuple"),
    **dict.fromkeys(b"}ds", "a dictionary"),
    **dict.fromkeys(b"\x8f\x90\x91", "a set"),
    **dict.fromkeys(b"]l", "another list"),
    **dict.fromkeys(b"JKML\x8a\x8b", "an integer"),
    ord("N"): "None",
    ord("("): "the beginning of a run of items",
    ord("e"): "the end of a run of items",
    ord("a"): "the appending of an item",
    ord("."): "the end of the pickle",
}


def read_token_list(path: Path, progress: Callable[[float], None] | None = None) -> np.ndarray:
    """Read a pickled list of non-negative integers without unpickling it.

    Args:
        path: the file.
        progress: told the share of the file that is read, in [0, 1], about once per megabyte.

    Returns:
        (n,) int32; int64 if an id is beyond int32.

    Raises:
        ValueError: anything but such a list; names the file, the offset, what is there and what was expected.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        reader = _Reader(path, size)
        rest = file.read(_LONGEST_BEGINNING)
        rest = rest[reader.begin(rest) :]
        while True:
            block = file.read(_BLOCK_BYTES)
            rest = reader.read(rest + block, is_last=not block)
            if progress is not None:
                progress(min(1.0, file.tell() / max(size, 1)))
            if not block:
                return reader.values[: reader.count]


@dataclass
class _Reader:
    """Where the reading is."""

    path: Path
    size: int
    """Bytes of the file."""
    offset: int = 0
    """Of the next byte."""
    depth: int = 0
    """1 between MARK and APPENDS, else 0."""
    is_loose: bool = False
    """The last opcode was an integer outside of a run, which APPEND must follow."""
    is_over: bool = False
    """STOP was read."""
    count: int = 0
    values: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    """Room for all; the first `count` are read."""

    def begin(self, raw: bytes) -> int:
        """Check the first bytes of the file; returns how many they are."""
        # An integer takes 2 bytes or more. Room that is never written to costs no memory.
        self.values = np.empty(self.size // 2 + 1, dtype=np.int32)
        for pattern, expected in _BEGINNING:
            found = pattern.match(raw, self.offset)
            if found is None:
                self._refuse(self.offset, raw[self.offset :], expected)
            if found[0][:1] == b"\x95":
                self._check_frame(self.offset, found[0][:9])
            self.offset = found.end()
        return self.offset

    def read(self, block: bytes, is_last: bool) -> bytes:
        """Read a block; returns the part of an opcode that it ends with."""
        pieces = _EACH.findall(block)
        rest = b""
        if pieces and _ONE.fullmatch(pieces[-1]) is None:
            rest = pieces.pop()
        if pieces:
            self._read_opcodes(np.frombuffer(block, dtype=np.uint8), pieces)
        if rest and (is_last or len(rest) >= _LONGEST_OPCODE or rest[0] not in b"JKM\x8a\x95"):
            self._refuse(self.offset, rest, "an integer, or the end of the list")
        if is_last and not self.is_over:
            self._refuse(self.offset, b"", "the end of the list")
        return rest

    def _read_opcodes(self, raw: np.ndarray, pieces: list[bytes]) -> None:
        lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
        ends = np.cumsum(lengths)
        starts = ends - lengths
        opcodes = raw[starts]
        for index in np.flatnonzero(opcodes == _FRAME).tolist():
            self._check_frame(self.offset + int(starts[index]), pieces[index])
        kept = opcodes != _FRAME
        if not kept.all():
            starts, opcodes = starts[kept], opcodes[kept]
        self._check_structure(opcodes, starts, raw)
        items = (opcodes != _MARK) & (opcodes != _APPENDS) & (opcodes != _APPEND) & (opcodes != _STOP)
        self._add_values(raw, opcodes[items], starts[items])
        self.offset += int(ends[-1])

    def _check_structure(self, opcodes: np.ndarray, starts: np.ndarray, raw: np.ndarray) -> None:
        """Marks alternate with APPENDS; an integer outside of a run is appended at once; STOP is the last byte."""
        if not len(opcodes):
            return
        marks, ends, appends, stops = (opcodes == code for code in (_MARK, _APPENDS, _APPEND, _STOP))
        depths = self.depth + np.cumsum(marks.astype(np.int64) - ends)
        loose = ~(marks | ends | appends | stops) & (depths == 0)
        before = np.concatenate([[self.is_loose], loose[:-1]])
        wrong = (depths < 0) | (depths > 1) | (appends != before) | (stops & (depths != 0))
        wrong |= stops & (self.offset + starts + 1 != self.size)
        if wrong.any():
            first = int(np.argmax(wrong))
            at = int(starts[first])
            if stops[first] and depths[first] == 0 and not before[first]:
                behind = self.offset + at + 1
                self._fail(behind, f"{self.size - behind} bytes behind the end of the list", "the end of the file")
            expected = (
                "the appending of the integer before it" if before[first] else "an integer, or the end of the list"
            )
            self._refuse(self.offset + at, raw[at : at + 1].tobytes(), expected)
        self.depth, self.is_loose, self.is_over = int(depths[-1]), bool(loose[-1]), bool(stops[-1])

    def _add_values(self, raw: np.ndarray, opcodes: np.ndarray, starts: np.ndarray) -> None:
        values = np.zeros(len(opcodes), dtype=np.int64)
        for opcode, width in ((_BININT1, 1), (_BININT2, 2), (_BININT, 4)):
            chosen = np.flatnonzero(opcodes == opcode)
            begins = starts[chosen] + 1
            number = np.zeros(len(chosen), dtype=np.uint32)
            for place in range(width):
                number |= raw[begins + place].astype(np.uint32) << np.uint32(8 * place)
            values[chosen] = number.view(np.int32)
        for index in np.flatnonzero(opcodes == _LONG1).tolist():
            begin = int(starts[index]) + 2
            values[index] = int.from_bytes(raw[begin : begin + int(raw[begin - 1])].tobytes(), "little", signed=True)
        if not len(values):
            return
        if values.min() < 0:
            index = int(np.argmax(values < 0))
            self._fail(self.offset + int(starts[index]), f"the integer {values[index]}", "integers of at least 0")
        if values.max() > np.iinfo(self.values.dtype).max:
            self.values = self.values.astype(np.int64)
        self.values[self.count : self.count + len(values)] = values
        self.count += len(values)

    def _check_frame(self, offset: int, opcode: bytes) -> None:
        length = int.from_bytes(opcode[1:], "little")
        if offset + len(opcode) + length > self.size:
            found = f"a frame of {length} bytes, of which the file has {self.size - offset - len(opcode)}"
            self._fail(offset, found, "a whole frame")

    def _refuse(self, offset: int, raw: bytes, expected: str) -> NoReturn:
        """Say what the bytes at an offset are."""
        if not raw:
            self._fail(offset, "the end of the file", expected)
        name = _NAMES.get(raw[0])
        cut = " that is cut off or too long" if len(raw) > 1 and name == "an integer" else ""
        self._fail(offset, f"byte 0x{raw[0]:02x}{f' ({name}{cut})' if name else ''}", expected)

    def _fail(self, offset: int, found: str, expected: str) -> NoReturn:
        raise ValueError(
            f"{self.path}: not a pickled list of integers: offset {offset} holds {found}, expected {expected}; "
            "nothing else is read from such a file: make the data again with scripts/prepare_fineweb.py"
        )
