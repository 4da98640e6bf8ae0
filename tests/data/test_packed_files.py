"""Scanning a folder of packed files: its fingerprint, who opens which file, and what is believed at the next start."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections import Counter

import numpy as np
import pytest

from lit_gpt.data.packed_dataset import open_mixture
from lit_gpt.data.packed_files import SCAN_SUFFIX, scan_folder
from lit_gpt.data.packed_format import PackedDatasetBuilder
from tests.support.training_runs import make_packed_data, pretraining_command, start_script

PREFIX = "train_slim"
FIRST = f"{PREFIX}_0000000000.bin"
# Longer than a scan distrusts the times of files.
AGE_S = 2.1


def build(folder, prefix, tokens, chunk_size, **options):
    builder = PackedDatasetBuilder(folder, prefix, chunk_size, 1, **{"vocab_size": 32000, **options})
    builder.add_array(np.asarray(tokens))
    builder.write_reminder()
    return folder


_counting: list[list[str]] = []


def _note_opening(event, arguments):
    if event == "open" and _counting and isinstance(arguments[0], str | os.PathLike):
        _counting[-1].append(os.fspath(arguments[0]))


@contextlib.contextmanager
def opened_files():
    """The names of the packed files that are opened."""
    if not _counting:
        sys.addaudithook(_note_opening)
    paths, names = [], []
    _counting.append(paths)
    try:
        yield names
    finally:
        _counting.append([])
        names += [os.path.basename(path) for path in paths if str(path).endswith(".bin")]


def scan(folder, block_length=5):
    return scan_folder(folder, [PREFIX], block_length)[PREFIX]


def described(files):
    return (
        files.names, files.type_codes.tolist(), files.sizes.tolist(), files.real_tokens.tolist(), files.fingerprint
    )  # fmt: skip


def fresh(folder, block_length=5):
    """What a scan finds where nothing was kept."""
    for kept in kept_scans(folder):
        kept.unlink()
    return described(scan(folder, block_length))


def kept_scans(folder):
    return sorted(folder.glob(f".*{SCAN_SUFFIX}"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of the test's own: nothing else has been kept there."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def old_folders(tmp_path_factory):
    """Folders whose files were not changed lately, each for one test."""
    folders = [tmp_path_factory.mktemp("old") for _ in range(20)]
    for folder in folders:
        build(folder, PREFIX, np.arange(2, 2 + 9000), 400)
    time.sleep(AGE_S)
    return folders


@pytest.fixture
def old(old_folders):
    return old_folders.pop()


# --- what a scan finds -------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_earlier_versions(tmp_path):
    """Runs compare it on resuming: these are the values of the version that read each file on every process."""
    build(tmp_path, PREFIX, np.arange(2, 2 + 9000), 4000)
    build(tmp_path, "train_star", np.arange(2, 2 + 50), 20, dtype=np.int32)

    def mixture():
        return open_mixture(tmp_path, {PREFIX: 0.7, "train_star": 0.3}, 5, 32000, 0)

    assert mixture().fingerprint == "a569ee5553c43d410a899c928eb3e0d640e665fd615a9706453ee76bb84fda3b"
    slim, star = (one.files for one in mixture().sets)
    assert slim.fingerprint == "d3a6bb88b5988b0939195bc7dd215a629fbdc98ea3a027894ceb3404d836be7b"
    assert star.fingerprint == "830d73b3cee3920e359ec7234d7b040fb0c5c309b80dadcd6c702f2fbf597543"
    counts = {"files": {"train_star_0000000002.bin": {"tokens": 7}}}
    (tmp_path / "train_star.manifest.json").write_text(json.dumps(counts))
    assert mixture().fingerprint == "cb35369ae6e41f13a44108fe3fd172cec844d1655327aaf8712b35416c9b6cd3"
    assert mixture().sets[1].files.real_tokens.tolist() == [20, 20, 7]


def test_files_of_different_types_and_links(tmp_path):
    build(tmp_path / "elsewhere", "x", np.arange(2, 30), 10)
    build(tmp_path, PREFIX, np.arange(2, 22), 10, dtype=np.int32)
    for number in (2, 4):
        (tmp_path / f"{PREFIX}_{number:010d}.bin").symlink_to(tmp_path / "elsewhere" / "x_0000000000.bin")
    (tmp_path / f"{PREFIX}_gone.bin").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / f"{PREFIX}_pipe.bin")
    first = described(scan(tmp_path))
    time.sleep(AGE_S)
    assert first[1] == [4, 4, 8, 8]
    assert described(scan(tmp_path)) == described(scan(tmp_path)) == first and kept_scans(tmp_path)


# --- who opens what ----------------------------------------------------------------------------------------------------


def test_the_first_scan_opens_each_file_once_and_the_next_none(old):
    with opened_files() as names:
        first = described(scan(old))
    # The padded end of the last one is looked for in its tokens.
    assert Counter(names) == Counter(first[0]) + Counter([first[0][-1]])
    with opened_files() as names:
        assert described(scan(old)) == first
    assert names == []


COUNT_OPENINGS = """\
import os, sys

def note(event, arguments):
    path = arguments[0] if event == "open" else None
    if isinstance(path, (str, os.PathLike)) and os.fspath(path).endswith(".bin"):
        with open(os.path.join({folder!r}, "opened-" + os.environ.get("LOCAL_RANK", "0")), "a") as log:
            log.write(os.path.basename(os.fspath(path)) + "\\n")

sys.addaudithook(note)
"""


def test_of_two_processes_one_opens_the_files(tmp_path):
    make_packed_data(tmp_path / "data")
    build(tmp_path / "data", PREFIX, np.arange(66 * 33 * 60) % 60 + 2, 33 * 66, vocab_size=64)
    files = len(list((tmp_path / "data").glob("*.bin")))
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(COUNT_OPENINGS.format(folder=str(tmp_path)))
    command = pretraining_command("train_mdm.py", tmp_path, devices=2, max_steps=1, val_samples=2, val_draws=1)
    path = os.pathsep.join([str(tmp_path / "hooks"), os.environ.get("PYTHONPATH", "")])
    process = start_script(["-c", RUN_WITH_PATH, path, *command], tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    first, second = (len((tmp_path / f"opened-{rank}").read_text().splitlines()) for rank in (0, 1))
    # The other reads the first block of each set, 4 samples of the step, and a sequence for validation, or 2.
    assert files >= 60 and first >= files and second <= 2 + 4 + 2


RUN_WITH_PATH = """\
import os, sys
os.environ["PYTHONPATH"] = sys.argv[1]
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


# --- what is believed --------------------------------------------------------------------------------------------------


def change_content(folder):
    """Another token, with the times as they were."""
    path = folder / FIRST
    status = path.stat()
    raw = bytearray(path.read_bytes())
    raw[30] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_file(folder):
    """Another file of the same size and time under the name."""
    path = folder / FIRST
    shutil.copy2(path, folder / "other")
    change_content(folder)
    os.replace(folder / "other", folder / f"{PREFIX}_0000000001.bin")


def add_file(folder):
    shutil.copy2(folder / FIRST, folder / f"{PREFIX}_0000000099.bin")


def remove_file(folder):
    (folder / FIRST).unlink()


def rename_file(folder):
    (folder / FIRST).rename(folder / f"{PREFIX}_0000000098.bin")


def add_manifest(folder):
    (folder / f"{PREFIX}.manifest.json").write_text(json.dumps({"files": {FIRST: {"tokens": 12}}}))


CHANGES = [change_content, replace_file, add_file, remove_file, rename_file, add_manifest]


@pytest.mark.parametrize("change", CHANGES)
def test_a_kept_scan_is_not_believed_of_changed_files(old, change):
    before = described(scan(old))
    assert kept_scans(old)
    change(old)
    found = described(scan(old))
    assert found == fresh(old) and found != before


def test_a_kept_scan_is_not_believed_when_a_manifest_changes_or_goes(old):
    add_manifest(old)
    time.sleep(AGE_S)
    counted = described(scan(old))
    assert kept_scans(old)
    manifest = old / f"{PREFIX}.manifest.json"
    manifest.write_text(manifest.read_text().replace("12", "13"))
    recounted = described(scan(old))
    manifest.unlink()
    plain = described(scan(old))
    assert [found[3][0] for found in (counted, recounted, plain)] == [12, 13, 400]


def test_a_truncated_file_is_refused_whatever_was_kept(old):
    scan(old)
    with (old / FIRST).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=f"{FIRST}: truncated"):
        scan(old)


def test_block_lengths_are_kept_beside_each_other(old):
    found = {length: described(scan(old, length)) for length in (5, 7)}
    assert len(kept_scans(old)) == 2 and found[5] != found[7]
    with opened_files() as names:
        assert {length: described(scan(old, length)) for length in (5, 7)} == found
    assert names == []


def test_of_files_that_have_just_changed_nothing_is_kept(tmp_path):
    build(tmp_path, PREFIX, np.arange(2, 300), 100)
    scan(tmp_path)
    assert not kept_scans(tmp_path)


def test_where_the_folder_takes_no_file_the_user_s_cache_does(old, home):
    (old / f".{PREFIX}-5{SCAN_SUFFIX}").mkdir()
    first = described(scan(old))
    assert len(list((home / ".cache" / "smdm" / "packed_files").iterdir())) == 1
    with opened_files() as names:
        assert described(scan(old)) == first
    assert names == []


def test_where_nothing_can_be_kept_every_start_scans(old, home):
    (old / f".{PREFIX}-5{SCAN_SUFFIX}").mkdir()
    home.write_text("no folder")
    assert described(scan(old)) == described(scan(old))


def broken(value):
    """The record with its hash made right, as one who wants to be believed would."""
    from lit_gpt.data.packed_files import _json_hash

    return json.dumps({"found": value, "sha256": _json_hash(value)})


DAMAGES = {
    "empty": lambda text, found: "",
    "cut off": lambda text, found: text[: len(text) // 2],
    "no JSON": lambda text, found: "\x80\x04K\x01.",
    "a list": lambda text, found: "[1, 2]",
    "nested": lambda text, found: "[" * 100_000,
    "a list found": lambda text, found: broken([1]),
    "another version": lambda text, found: broken(found | {"version": 99}),
    "no fingerprint": lambda text, found: broken(found | {"fingerprint": 5}),
    "no types": lambda text, found: broken(found | {"type_codes": None}),
    "unknown type": lambda text, found: broken(found | {"type_codes": [[6, 23]]}),
    "too few types": lambda text, found: broken(found | {"type_codes": [[8, 22]]}),
    "too many types": lambda text, found: broken(found | {"type_codes": [[8, 2**62]]}),
    "another type": lambda text, found: broken(found | {"type_codes": [[5, 23]]}),
    "a type of text": lambda text, found: broken(found | {"type_codes": [["8", 23]]}),
    "half a pair": lambda text, found: broken(found | {"padded": [[22]]}),
    "a file too many": lambda text, found: broken(found | {"padded": [[23, 1]]}),
    "a file before the first": lambda text, found: broken(found | {"padded": [[-1, 1]]}),
    "more real tokens than tokens": lambda text, found: broken(found | {"padded": [[22, 2**70]]}),
}


def test_a_damaged_scan_is_made_again(old):
    correct = fresh(old)
    (kept,) = kept_scans(old)
    text = kept.read_text()
    found = json.loads(text)["found"]
    for name, damage in DAMAGES.items():
        kept.write_text(damage(text, found), encoding="latin-1")
        with opened_files() as names:
            assert described(scan(old)) == correct, name
        assert names, name
        assert kept.read_text() == text, name


def test_a_scan_with_any_byte_changed_is_made_again(old):
    correct = fresh(old)
    (kept,) = kept_scans(old)
    raw = kept.read_bytes()
    changed = 0
    for place in range(0, len(raw), 7):
        kept.write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        assert described(scan(old)) == correct
        changed += kept.read_bytes() == raw
    assert changed > 20
