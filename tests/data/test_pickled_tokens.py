"""Old pickled token lists: read exactly, and nothing but integers ever comes out of one."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lit_gpt.data import pickled_tokens
from lit_gpt.data.pickled_tokens import read_token_list

PROTOCOLS = (2, 3, 4, 5)
ran: list[str] = []


def run_code(word: str) -> int:
    """What an evil pickle would call."""
    ran.append(word)
    return 1


class Evil:
    def __reduce__(self):
        return run_code, ("ran",)


def write(folder: Path, content: bytes) -> Path:
    path = folder / "tokens.pkl"
    path.write_bytes(content)
    return path


def ids_of_all_widths(count: int) -> list[int]:
    borders = [0, 1, 255, 256, 65535, 65536, 2**31 - 1, 31999, 10, ord("("), ord("e"), ord("."), ord("M")]
    random = np.random.default_rng(count)
    return [*borders, *random.integers(0, 32000, count).tolist()][:count]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001, 5000, 100_000])
@pytest.mark.parametrize("dump", [pickle.dumps, pickle._dumps], ids=["c", "python"])
def test_round_trip(tmp_path, protocol, count, dump):
    ids = ids_of_all_widths(count)
    found = read_token_list(write(tmp_path, dump(ids, protocol=protocol)))
    assert found.dtype == np.int32 and found.ndim == 1
    assert found.tolist() == ids


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("block", [1, 2, 7, 64, 1001])
def test_blocks_change_nothing(tmp_path, protocol, block, monkeypatch):
    monkeypatch.setattr(pickled_tokens, "_BLOCK_BYTES", block)
    ids = [*ids_of_all_widths(1300), 2**31, 2**40, 2**62]
    assert read_token_list(write(tmp_path, pickle.dumps(ids, protocol=protocol))).tolist() == ids


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_large_ids_are_int64(tmp_path, protocol):
    ids = [1, 2**31, 2**63 - 1, 3]
    found = read_token_list(write(tmp_path, pickle.dumps(ids, protocol=protocol)))
    assert found.dtype == np.int64 and found.tolist() == ids


def test_progress_reaches_one(tmp_path):
    shares: list[float] = []
    read_token_list(write(tmp_path, pickle.dumps(list(range(10**6)), protocol=4)), shares.append)
    assert len(shares) > 2 and shares == sorted(shares) and shares[-1] == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (-1, "the integer -1"),
        (-(2**31), "the integer -2147483648"),
        (-(2**40), "the integer -1099511627776"),
        (2**63, "an integer that is cut off or too long"),
        (True, "a truth value"),
        (None, "None"),
        (1.5, "a floating-point number"),
        ("text", "text"),
        (b"bytes", ""),
        ({}, "a dictionary"),
        ((), "a tuple"),
        ([1, 2], "another list"),
        (np.int64(7), ""),
        (Evil(), "a class or function|text"),
    ],
    ids=lambda value: str(type(value).__name__),
)
@pytest.mark.parametrize("beside", [[], [5, 6]], ids=["alone", "among integers"])
def test_anything_else_is_refused_and_nothing_runs(tmp_path, protocol, value, found, beside):
    path = write(tmp_path, pickle.dumps([*beside, value, *beside], protocol=protocol))
    with pytest.raises(
        ValueError, match=rf"tokens\.pkl: not a pickled list of integers: offset \d+ .*({found})"
    ) as error:
        read_token_list(path)
    assert "\n" not in str(error.value)
    assert not ran


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", [5, {}, {"a": 1}, (1, 2), "text", Evil(), None], ids=lambda v: type(v).__name__)
def test_no_list_is_refused(tmp_path, protocol, value):
    with pytest.raises(ValueError, match="expected a list"):
        read_token_list(write(tmp_path, pickle.dumps(value, protocol=protocol)))
    assert not ran


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_truncation_is_refused(tmp_path, protocol):
    content = pickle.dumps([1, 300, 70000, 2**40, 5], protocol=protocol)
    for length in range(len(content)):
        with pytest.raises(ValueError, match="not a pickled list of integers"):
            read_token_list(write(tmp_path, content[:length]))
    with pytest.raises(ValueError, match="offset 0 holds the end of the file, expected the beginning of a pickle"):
        read_token_list(write(tmp_path, b""))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02].x", "offset 4 holds 1 bytes behind the end of the list, expected the end of the file"),
        (b"\x80\x02]..", "offset 4 holds 1 bytes behind"),
        (b"\x80\x02](K\x01(K\x02ee.", r"offset 6 holds byte 0x28 \(the beginning of a run of items\)"),
        (b"\x80\x02](K\x01.", r"offset 6 holds byte 0x2e \(the end of the pickle\)"),
        (b"\x80\x02]K\x01.", "expected the appending of the integer before it"),
        (b"\x80\x02]K\x01K\x02aa.", "offset 5 .*expected the appending of the integer before it"),
        (b"\x80\x02]a.", "offset 3 holds byte 0x61"),
        (b"\x80\x02]e.", "offset 3 holds byte 0x65"),
        (b"\x80\x02](K\x01ae.", "offset 6 holds byte 0x61"),
        (b"\x80\x02]h\x00.", r"offset 3 holds byte 0x68 \(a reference to an earlier object\)"),
        (b"\x80\x02]\x8a\x09123456789a.", "offset 3 holds byte 0x8a"),
        (b"\x80\x06].", "offset 0 holds byte 0x80, expected the beginning of a pickle of protocol 2 to 5"),
        (b"]q\x00.", "offset 0 holds"),
        (b"\x80\x04\x95" + struct.pack("<Q", 900) + b"]\x94.", "offset 2 holds a frame of 900 bytes"),
        (b"LITPKDS" + bytes(50), "offset 0 holds byte 0x4c"),
    ],
)
def test_malformed_files_say_where(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_token_list(write(tmp_path, content))


def test_runs_may_be_mixed_with_single_items(tmp_path):
    content = b"\x80\x02]q\x05K\x01a(e(K\x02M\x00\x01eJ\x05\x00\x00\x00a\x8a\x00a."
    assert read_token_list(write(tmp_path, content)).tolist() == pickle.loads(content) == [1, 2, 256, 5, 0]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([b"", b"\x80\x02]q\x00", b"\x80\x04]\x94", b"\x80\x02](K\x01", b"\x80\x02]K\x01"]),
    st.binary(max_size=60)
    | st.lists(st.sampled_from([b"K\x01", b"M..", b"J....", b"(", b"e", b"a", b"."])).map(b"".join),
    st.sampled_from([b"", b".", b"e."]),
)
@example(b"\x80\x02]", b"", b".")
def test_random_bytes_give_what_pickle_gives_or_are_refused(tmp_path, beginning, middle, end):
    content = beginning + middle + end
    try:
        found = read_token_list(write(tmp_path, content))
    except ValueError as error:
        assert "not a pickled list of integers" in str(error)
    else:
        # Safe: what we accept holds no opcode that can build anything but a list of integers.
        assert pickle.loads(content) == found.tolist()
