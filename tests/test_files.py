"""Reading what users bring: JSON of any depth and size, numbers that are none, pipes where files are expected."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import pytest

from lit_gpt import files

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("depth", [101, 500, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deep_json_is_refused(depth: int, opening: str, closing: str) -> None:
    text = opening * depth + "1" + closing * depth
    for content in (text, text.encode()):
        with pytest.raises(ValueError, match="nested deeper than 100 times"):
            files.parse_json(content)


def test_what_is_nested_as_deep_as_it_may_be_is_read() -> None:
    text = '{"a":[' * 50 + "1" + "]}" * 50
    assert files.parse_json(text) == json.loads(text)
    wide = "[" + ",".join(["[[]]"] * 1000) + "]"
    assert files.parse_json(wide) == json.loads(wide)
    brackets = json.dumps("[" * 1000)
    assert files.parse_json(brackets) == "[" * 1000


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_not_finite_are_refused(number: str) -> None:
    with pytest.raises(ValueError, match="is not finite|the number"):
        files.parse_json(f'{{"a": [{number}]}}')
    assert not math.isfinite(files.parse_json(number, finite=False))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"{", b"[1,]", b"\x80", b"1" * 5000, b'{"a": }'], ids=repr)
def test_what_is_no_json_is_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError) as raised:
        files.parse_json(content)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_are_those_of_json(encoding: str) -> None:
    assert files.parse_json('{"ä": [1, 2.5, "😀", null, true]}'.encode(encoding)) == {"ä": [1, 2.5, "😀", None, True]}


def test_a_file_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text("[" * 5000)
    with pytest.raises(ValueError, match=re.escape(f"{path} is not readable as JSON: it is nested deeper")):
        files.read_json_object(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds a JSON list, expected an object"):
        files.read_json_object(path)
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="too large to be read as JSON: 1,099,511,627,776 bytes"):
        files.read_json_object(path)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    files.write_json(path, {"a": math.inf, "b": [math.nan, (1.5, -math.inf)], "c": {"d": 1}})
    assert files.read_json_object(path) == {"a": None, "b": [None, [1.5, None]], "c": {"d": 1}}


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe.json"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is no regular file but a pipe"):
        files.read_json_object(path)
    with pytest.raises(ValueError, match="is no regular file but a pipe"):
        files.open_regular("/dev/zero")
    with pytest.raises(IsADirectoryError):
        files.open_regular(tmp_path)


def test_json_is_read_by_one_reader() -> None:
    """Values that the package has made itself may go through JSON; what files and requests hold is bounded."""
    found = {
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "lit_gpt").rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"json\.loads?\(", line) and "json.loads(json.dumps(" not in line
    }
    assert not found
