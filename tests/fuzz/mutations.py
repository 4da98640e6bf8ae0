"""Damage to files: bytes that flip, vanish, repeat or grow, and values of a JSON document that become something else."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

# What a careless or a hostile hand puts where another value stood.
WILD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**31 - 1, 2**62, 2**64, -(2**63), 10**30, 10**400, 0.5, -0.0, 1.5, 1e308,
    float("nan"), float("inf"), float("-inf"), "", "0", "x", "nan", "../../x", "\x00", "\ud800", "\n\n", "a" * 10_000,
    [], [[]], [1, 2], ["a"], {}, {"a": {}}, {"": 1}, [None] * 50,
)  # fmt: skip
_EXTREME_BYTES = (
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff" * 8,
    b"\x00" * 8,
    b"\xff\xff\xff\x7f",
    b"\n",
    b'"',
    b"{",
    b"[",
)


def mutate_bytes(content: bytes, chance: random.Random) -> bytes:
    """One to four damages; half of them near the beginning, where headers are."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        size = len(data)
        if not size:
            return bytes(data)
        at = chance.randrange(min(size, 200) if chance.random() < 0.5 else size)
        kind = chance.randrange(7)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            value = chance.choice(_EXTREME_BYTES)
            data[at : at + len(value)] = value
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + chance.choice((1, 2, 8, 100))]
        elif kind == 4:
            data[at:at] = data[at : at + chance.choice((1, 8, 64, 1000))]
        elif kind == 5:
            data[at:at] = bytes(chance.randrange(256) for _ in range(chance.choice((1, 4, 50))))
        else:
            data[at:at] = chance.choice((b"[", b'{"a":')) * chance.choice((200, 20_000))
    return bytes(data)


def mutate_value(document: Any, chance: random.Random, wild: tuple[Any, ...] = WILD_VALUES) -> Any:
    """A copy in which one or two places hold something else, are missing, come twice or lie deep."""
    document = copy.deepcopy(document)
    for _ in range(chance.choice((1, 1, 2))):
        places = _places(document)
        if not places:
            return chance.choice(wild)
        inner, key = chance.choice(places)
        kind = chance.randrange(8)
        if kind == 0:
            del inner[key]
        elif kind == 1 and isinstance(inner, dict):
            inner[chance.choice(("", "x", str(key) + " ", "kind", "config"))] = inner[key]
        elif kind == 1:
            inner.append(inner[key])
        elif kind == 2:
            other, other_key = chance.choice(places)
            inner[key] = copy.deepcopy(other.get(other_key) if isinstance(other, dict) else _item(other, other_key))
        elif kind == 3 and isinstance(inner[key], int | float) and not isinstance(inner[key], bool):
            inner[key] = chance.choice(
                (-inner[key], inner[key] * 10**9, inner[key] + 1, float(inner[key]), str(inner[key]))
            )
        elif kind == 4:
            for _ in range(chance.choice((3, 200))):
                inner[key] = [inner[key]]
        else:
            inner[key] = copy.deepcopy(chance.choice(wild))
    return document


def mutate_json(content: bytes, chance: random.Random) -> bytes:
    """A JSON text with another value somewhere, or now and then with damaged bytes."""
    if chance.random() < 0.25:
        return mutate_bytes(content, chance)
    try:
        return json.dumps(mutate_value(json.loads(content), chance)).encode()
    except ValueError:  # a line that is empty, or holds more digits than Python writes
        return mutate_bytes(content, chance)
    except RecursionError:
        return b"[" * 5000


def mutate_lines(content: bytes, chance: random.Random) -> bytes:
    """JSON lines of which one or two are damaged."""
    lines = content.splitlines(keepends=True)
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.randrange(len(lines))
        lines[at] = mutate_json(lines[at], chance) + (b"\n" if chance.random() < 0.9 else b"")
    return b"".join(lines)


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every (dict or list, key) within a document."""
    found: list[tuple[Any, Any]] = []
    todo = [document]
    while todo:
        value = todo.pop()
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                found.append((value, key))
                todo.append(item)
    return found


def _item(values: list[Any], key: int) -> Any:
    return values[key] if key < len(values) else None
