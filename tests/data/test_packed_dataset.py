"""The packed format byte for byte, and the order in which training reads it."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
import pickle
import resource
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from lit_gpt.data import packed_dataset
from lit_gpt.data.packed_dataset import PackedMixture, PackedSeries, open_mixture, open_validation, recorded_tokenizer
from lit_gpt.data.packed_files import scan_folder
from lit_gpt.data.packed_format import PackedDatasetBuilder
from lit_gpt.randomness import permute_index

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "data_and_schedule.json").read_text())["packed"]
# Property tests write small files: quick, but slower than Hypothesis's default deadline on a busy machine.
FILES = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def build(folder, prefix, documents, chunk_size, separator=1, **options):
    """Pack token lists; returns the files."""
    builder = PackedDatasetBuilder(folder, prefix, chunk_size, separator, **{"vocab_size": 32000, **options})
    for document in documents:
        builder.add_array(np.asarray(document))
    builder.write_reminder()
    return [Path(name) for name in builder.filenames]


def counting(count, start=2):
    """Distinct tokens, so that a block says where it comes from."""
    return np.arange(start, start + count)


def manifest(folder, prefix, **tokens):
    files = {f"{name}.bin": {"tokens": count} for name, count in tokens.items()}
    (folder / f"{prefix}.manifest.json").write_text(json.dumps({"files": files}))


def open_series(folder, block_length=4):
    return PackedSeries(scan_folder(folder, ["train_slim"], block_length)["train_slim"], block_length, 32000)


class Rows(Dataset):
    """The first samples as a torch data set, for DataLoader."""

    def __init__(self, mixture, count):
        self.mixture, self.count = mixture, count

    def __len__(self):
        return self.count

    def __getitem__(self, k):
        return self.mixture[k].tokens


# --- format -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["train_slim", "train_star", "validation"])
def test_golden_files(tmp_path, prefix):
    rule = GOLDEN["build"]
    documents, done = [], 0
    for i in range(rule[prefix]["docs"]):
        length = rule[prefix]["doclen"] + i % 7
        documents.append((np.arange(length) + done) % 31999 + 1)
        done += length
    paths = build(tmp_path, prefix, documents, rule["chunk_size"], rule["sep_token"])
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert hashes == {name: value for name, value in GOLDEN["files"].items() if name.startswith(prefix)}


@pytest.mark.parametrize(("vocab_size", "dtype"), [(32000, np.uint16), (65499, np.uint16), (65500, np.int32)])
def test_automatic_dtype(tmp_path, vocab_size, dtype):
    assert PackedDatasetBuilder(tmp_path, "x", 8, 1, dtype="auto", vocab_size=vocab_size).dtype is dtype


@pytest.mark.parametrize(
    ("dtype", "code"),
    [
        (np.uint8, 1),
        (np.int8, 2),
        (np.int16, 3),
        (np.int32, 4),
        (np.int64, 5),
        (np.float32, 6),
        (np.float64, 7),
        (np.uint16, 8),
    ],
)
def test_header_of_every_dtype(tmp_path, dtype, code):
    (path,) = build(tmp_path, "x", [[5, 6]], 3, dtype=dtype)
    header = b"LITPKDS" + (1).to_bytes(8, "little") + bytes([code]) + (3).to_bytes(8, "little")
    assert path.read_bytes() == header + np.asarray([5, 6, 1], dtype=np.dtype(dtype).newbyteorder("<")).tobytes()


@given(lengths=st.lists(st.integers(0, 25), max_size=12), chunk_size=st.integers(1, 30), cut=st.integers(0, 12))
@FILES
def test_files_hold_the_documents_in_order_even_across_an_interruption(tmp_path_factory, lengths, chunk_size, cut):
    folder = tmp_path_factory.mktemp("packed")
    documents = np.split(counting(sum(lengths)), np.cumsum(lengths)[:-1]) if lengths else []
    paths = build(folder / "a", "x", documents, chunk_size)
    content = b"".join(path.read_bytes()[24:] for path in paths)
    tokens = np.frombuffer(content, dtype="<u2")
    total = sum(lengths)
    assert len(paths) == max(1, -(-total // chunk_size))  # published: nothing at all is a file, too
    assert np.array_equal(tokens[:total], counting(total)) and (tokens[total:] == 1).all()

    first = PackedDatasetBuilder(folder / "b", "x", chunk_size, 1, vocab_size=32000)
    for document in documents[:cut]:
        first.add_array(document)
    second = PackedDatasetBuilder(folder / "b", "x", chunk_size, 1, vocab_size=32000)
    second.continue_from(len(first.filenames), first.pending)
    for document in documents[cut:]:
        second.add_array(document)
    second.write_reminder()
    assert [Path(name).name for name in second.filenames] == [path.name for path in paths]
    assert b"".join(Path(name).read_bytes()[24:] for name in second.filenames) == content


def test_nothing_left_is_a_file_of_separators_that_changes_no_block(tmp_path):
    """As users' preparation scripts expect; read, it is padding."""
    (empty,) = build(tmp_path / "a", "train_slim", [], 8)
    assert empty.name == "train_slim_0000000000.bin"
    assert np.frombuffer(empty.read_bytes()[24:], dtype="<u2").tolist() == [1] * 8
    for folder in (tmp_path / "b", tmp_path / "c"):
        build(folder, "train_slim", [counting(16)], 8)
    builder = PackedDatasetBuilder(tmp_path / "c", "train_slim", 8, 1, vocab_size=32000)
    builder.continue_from(2, np.asarray([], dtype=np.int64))
    builder.write_reminder()
    assert len(builder.filenames) == 3 and Path(builder.filenames[2]).is_file()
    one, other = (open_series(tmp_path / name) for name in "bc")
    assert len(one) == len(other) == 4


def test_builder_refuses_tokens_that_would_wrap_around(tmp_path):
    builder = PackedDatasetBuilder(tmp_path, "x", 8, 1, vocab_size=100)
    with pytest.raises(ValueError, match="70000 do not fit into uint16"):
        builder.add_array(np.asarray([3, 70000]))


def test_builder_needs_a_vocabulary_for_auto(tmp_path):
    with pytest.raises(ValueError, match="dtype='auto' needs vocab_size"):
        PackedDatasetBuilder(tmp_path, "x", 8, 1)


# --- one series -----------------------------------------------------------------------------------------------------


@given(
    chunk_blocks=st.integers(1, 4),
    surplus=st.integers(0, 6),
    tokens=st.integers(1, 150),
    block=st.integers(2, 9),
    seed=st.integers(0, 9),
)
@FILES
def test_each_epoch_sees_every_block_exactly_once(tmp_path_factory, chunk_blocks, surplus, tokens, block, seed):
    folder = tmp_path_factory.mktemp("packed")
    chunk = chunk_blocks * block + surplus
    paths = build(folder, "train_slim", [counting(tokens)], chunk)
    names = {path.stem: min(chunk, tokens - i * chunk) for i, path in enumerate(paths)}
    manifest(folder, "train_slim", **names)
    # The law, from the files alone: whole blocks of a chunk, and a partly filled one where two tokens or more are real.
    starts = [i * chunk + j * block for i in range(len(paths)) for j in range(chunk // block)]
    expected = {start + 2: min(block, tokens - start) for start in starts if tokens - start >= 2}
    if not expected:
        with pytest.raises(ValueError, match="no real tokens"):
            open_mixture(folder, {"train_slim": 1.0}, block, 32000, seed)
        return
    mixture = open_mixture(folder, {"train_slim": 1.0}, block, 32000, seed)
    count = len(mixture.sets[0])
    assert count == len(expected)
    for epoch in range(3):
        samples = [mixture[epoch * count + j] for j in range(count)]
        assert {int(sample.tokens[0]): sample.length for sample in samples} == expected
        for j, sample in enumerate(samples):
            assert sample.tokens.dtype == np.int64 and sample.tokens.shape == (block,)
            assert np.array_equal(sample.tokens[: sample.length], counting(sample.length, int(sample.tokens[0])))
            assert (sample.tokens[sample.length :] == 1).all()
            assert mixture.extent(epoch * count + j).length == sample.length


def test_epochs_differ_in_order_and_seeds_too(tmp_path):
    build(tmp_path, "train_slim", [counting(400)], 100)
    first, second = (open_mixture(tmp_path, {"train_slim": 1.0}, 4, 32000, seed) for seed in (1, 2))
    orders = [[first.locate(epoch * 100 + j)[1] for j in range(100)] for epoch in range(2)]
    orders.append([second.locate(j)[1] for j in range(100)])
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_corpus_of_one_partly_filled_chunk(tmp_path):
    build(tmp_path, "train_slim", [counting(30)], 2049 * 4)
    mixture = open_mixture(tmp_path, {"train_slim": 1.0}, 2049, 32000, 0)
    assert [(sample.length, int(sample.tokens[29])) for sample in (mixture[0], mixture[10**6])] == [(30, 31)] * 2


def test_padding_without_manifest_is_the_last_run_of_a_series(tmp_path):
    # Two series of TinyLlama's naming, one a process: each has a padded end of its own.
    for process in (0, 1):
        build(tmp_path, f"train_slim_{process}", [counting(13)], 10)
    mixture = open_mixture(tmp_path, {"train_slim": 1.0}, 5, 32000, 0)
    assert mixture.sets[0].files.real_tokens.tolist() == [10, 3, 10, 3]
    assert sorted(mixture.extent(k).length for k in range(6)) == [3, 3, 5, 5, 5, 5]


def test_a_full_last_chunk_that_ends_in_one_separator_is_all_real(tmp_path):
    build(tmp_path, "train_slim", [[*counting(9), 1]], 10)
    assert open_mixture(tmp_path, {"train_slim": 1.0}, 5, 32000, 0).sets[0].files.real_tokens.tolist() == [10]


def test_manifest_wins_over_the_guess(tmp_path):
    build(tmp_path, "train_slim", [[*counting(4), 1, 1, 1]], 10)
    assert open_mixture(tmp_path, {"train_slim": 1.0}, 10, 32000, 0).extent(0).length == 4
    manifest(tmp_path, "train_slim", train_slim_0000000000=7)
    assert open_mixture(tmp_path, {"train_slim": 1.0}, 10, 32000, 0).extent(0).length == 7


def test_thousands_of_files_do_not_exhaust_descriptors(tmp_path):
    import resource

    build(tmp_path, "train_slim", [counting(2000)], 4)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (160, limit[1]))
    try:
        series = open_series(tmp_path)
        assert [int(series[index].tokens[0]) for index in range(len(series))] == list(range(2, 2002, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


# --- mixtures -------------------------------------------------------------------------------------------------------


class Blocks:
    """A set of so many blocks, without files."""

    block_length = 4

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


@given(weights=st.lists(st.sampled_from([0.01, 0.1, 0.3, 1.0, 2.5, 7.0, 69.3]), min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_mixture_keeps_every_set_near_its_share(weights):
    mixture = PackedMixture({str(i): Blocks(5) for i in range(len(weights))}, weights, seed=0)
    bound = 0.5 if len(weights) == 2 else 1.7
    counts = Counter()
    for k in range(300):
        index, before = mixture.assign(k)
        assert before == counts[index], "positions of a set are counted without gaps"
        counts[index] += 1
        for i, weight in enumerate(weights):
            assert abs(counts[i] - (k + 1) * weight / sum(weights)) <= bound + 1e-9


@given(k=st.integers(0, 10**12), weights=st.lists(st.sampled_from([0.1, 1.0, 7.0]), min_size=2, max_size=5))
@settings(deadline=None)
def test_mixture_counts_far_out(k, weights):
    mixture = PackedMixture({str(i): Blocks(5) for i in range(len(weights))}, weights, seed=0)
    index, before = mixture.assign(k)
    assert abs(before - k * weights[index] / sum(weights)) < 1.7 + 1e-3
    later = next(j for j in range(k + 1, k + 10**3) if mixture.assign(j)[0] == index)
    assert mixture.assign(later)[1] == before + 1


def test_set_of_weight_zero_need_not_exist(tmp_path):
    build(tmp_path, "train_slim", [counting(40)], 20)
    mixture = open_mixture(tmp_path, {"train_slim": 1.0, "train_star": 0.0}, 4, 32000, 0)
    assert mixture.names == ["train_slim"]


def test_epochs_and_description(tmp_path):
    build(tmp_path, "train_slim", [counting(40)], 20)
    build(tmp_path, "train_star", [counting(20)], 20)
    mixture = open_mixture(tmp_path, {"train_slim": 3.0, "train_star": 1.0}, 4, 32000, 0)
    assert mixture.epochs(40) == pytest.approx(3.0) and mixture.block_length == 4
    assert mixture.describe().startswith("train_slim 10 blocks, 40 tokens in 2 file(s), weight 3; train_star 5 blocks")


def test_fingerprint_follows_content_names_weights_and_not_the_folder(tmp_path):
    for folder in ("a", "b", "c"):
        build(tmp_path / folder, "train_slim", [counting(40)], 20)
    build(tmp_path / "c", "train_slim", [counting(40, start=3)], 20)

    def fingerprint(folder, weight=1.0, block=4):
        return open_mixture(tmp_path / folder, {"train_slim": weight}, block, 32000, 0).fingerprint

    assert fingerprint("a") == fingerprint("b")
    assert len({fingerprint("a"), fingerprint("c"), fingerprint("a", weight=2.0), fingerprint("a", block=5)}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_workers_change_nothing(tmp_path, workers):
    build(tmp_path, "train_slim", [counting(90)], 20)
    build(tmp_path, "train_star", [counting(40)], 20)
    mixture = open_mixture(tmp_path, {"train_slim": 2.0, "train_star": 1.0}, 4, 32000, 5)
    expected = np.stack([mixture[k].tokens for k in range(48)])
    loader = DataLoader(Rows(mixture, 48), batch_size=8, num_workers=workers)
    assert np.array_equal(np.concatenate([batch.numpy() for batch in loader]), expected)


def test_a_pickled_mixture_reads_the_same(tmp_path):
    build(tmp_path, "train_slim", [counting(90)], 20)
    mixture = open_mixture(tmp_path, {"train_slim": 1.0}, 4, 32000, 5)
    before = mixture[17].tokens
    assert np.array_equal(pickle.loads(pickle.dumps(mixture))[17].tokens, before)


def test_seeking_far_out_draws_nothing_before_it(tmp_path):
    build(tmp_path, "train_slim", [counting(9000)], 3000)
    build(tmp_path, "train_star", [counting(3000)], 3000)
    mixture = open_mixture(tmp_path, {"train_slim": 0.7, "train_star": 0.3}, 5, 32000, 0)
    start_s = time.process_time()
    sample = mixture[10**9]
    assert time.process_time() - start_s < 5, "a seek draws all samples before it"
    assert sample.length == 5
    assert len({mixture.locate(10**9 + j) for j in range(100)}) == 100


def bytes_and_pages_read():
    """What this process has read so far, in bytes, and the pages that it has mapped."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_opening_reads_no_tokens_of_a_large_sparse_file(tmp_path):
    (path,) = build(tmp_path, "train_slim", [[5, 6, 7]], 4)
    size = 1 << 31
    header = path.read_bytes()[:16] + size.to_bytes(8, "little")
    with path.open("wb") as file:
        file.write(header)
        file.truncate(24 + 2 * size)
    manifest(tmp_path, "train_slim", train_slim_0000000000=size)
    before = bytes_and_pages_read()
    mixture = open_mixture(tmp_path, {"train_slim": 1.0}, 2049, 32000, 0)
    mixture[10**9]
    read, pages = (now - then for now, then in zip(bytes_and_pages_read(), before, strict=True))
    assert read < 1 << 24 and pages < 500, "a small part of 4 GiB: 2048 large pages, or more small ones"


def test_validation_in_file_order_and_absent(tmp_path):
    assert open_validation(tmp_path, 4, 32000) is None
    build(tmp_path, "validation", [counting(22)], 10)
    series = open_validation(tmp_path, 4, 32000)
    assert [int(series[index].tokens[0]) for index in range(len(series))] == [2, 6, 12, 16, 22]
    with pytest.raises(IndexError):
        series[5]


def test_recorded_tokenizer(tmp_path):
    assert recorded_tokenizer(tmp_path, ["train_slim"]) == {}
    record = {"source": "tokenizer", "fingerprint": "00", "vocab_size": 10}
    (tmp_path / "train_slim.manifest.json").write_text(json.dumps({"tokenizer": record}))
    assert recorded_tokenizer(tmp_path, ["train_star", "train_slim"]) == record
    (tmp_path / "tokenizer").mkdir()
    assert recorded_tokenizer(tmp_path, ["train_slim"])["source"] == str(tmp_path / "tokenizer")


# --- errors: one line with file, place, what was expected -------------------------------------------------------------


def damaged(tmp_path, change):
    (path,) = build(tmp_path, "train_slim", [counting(20)], 20)
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"PK\x03\x04" + raw[4:], "not a packed token file: offset 0 holds"),
        (lambda raw: b"", "not a packed token file: offset 0 holds b''"),
        (lambda raw: raw[:10], "not a packed token file"),
        (lambda raw: raw[:7] + b"\x02" + raw[8:], "offset 7 holds format version 2, expected 1"),
        (lambda raw: raw[:15] + b"\x09" + raw[16:], "offset 15 holds dtype code 9"),
        (lambda raw: raw[:15] + b"\x06" + raw[16:], "offset 15 holds dtype code 6"),
        (lambda raw: raw[:-3], r"truncated: it ends at offset 61, expected 64 \(20 tokens of uint16\)"),
        (lambda raw: raw + b"\0\0", "too long: it ends at offset 66, expected 64"),
    ],
)
def test_foreign_and_truncated_files(tmp_path, change, message):
    path = damaged(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        open_mixture(tmp_path, {"train_slim": 1.0}, 4, 32000, 0)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_data_says_where_it_looked_and_how_to_make_it(tmp_path):
    with pytest.raises(ValueError, match=r"looked for .*train_slim\*\.bin; make it with .*prepare_text\.py"):
        open_mixture(tmp_path, {"train_slim": 1.0}, 4, 32000, 0)
    with pytest.raises(ValueError, match="there is no such folder"):
        open_mixture(tmp_path / "missing", {"train_slim": 1.0}, 4, 32000, 0)


def test_chunk_smaller_than_a_block(tmp_path):
    build(tmp_path, "train_slim", [counting(20)], 20)
    with pytest.raises(
        ValueError, match=r"chunk of 20 tokens is smaller than a block of 21: .*--chunk_size .*--block_size"
    ):
        open_mixture(tmp_path, {"train_slim": 1.0}, 21, 32000, 0)


@pytest.mark.parametrize("first", [True, False])
def test_token_beyond_the_vocabulary(tmp_path, first):
    build(tmp_path, "train_slim", [[*counting(20), 500] if not first else [3, 500, *counting(19)]], 24)
    message = f"offset {24 + 2 * (1 if first else 20)} holds token 500, but the model's vocabulary has 100"
    with pytest.raises(ValueError, match=message):
        mixture = open_mixture(tmp_path, {"train_slim": 1.0}, 8, 100, 0)
        for k in range(3):
            mixture[k]


@pytest.mark.parametrize("weights", [{"train_slim": 0.0}, {"train_slim": -1.0}, {"train_slim": float("nan")}, {}])
def test_impossible_weights(tmp_path, weights):
    with pytest.raises(ValueError, match="--data_weights .*: expected weights of at least 0, one of them above 0"):
        open_mixture(tmp_path, weights, 4, 32000, 0)


def test_only_padding(tmp_path):
    build(tmp_path, "train_slim", [[1] * 12], 12)
    with pytest.raises(ValueError, match="hold no real tokens, only padding"):
        open_mixture(tmp_path, {"train_slim": 1.0}, 4, 32000, 0)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"files": {"train_slim_0000000000.bin": 5}}', '{"files": {"train_slim_0000000000.bin": {}}}'],
)
def test_broken_manifest(tmp_path, content):
    build(tmp_path, "train_slim", [counting(12)], 12)
    (tmp_path / "train_slim.manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"train_slim\.manifest\.json: not a manifest"):
        open_mixture(tmp_path, {"train_slim": 1.0}, 4, 32000, 0)


IN_PLACE = [lambda path: path.write_bytes(b""), lambda path: os.truncate(path, 24 + 2 * 10)]
REPLACED = [lambda path: (path.unlink(), os.mkfifo(path)), lambda path: path.unlink()]


@pytest.mark.parametrize("change", IN_PLACE + REPLACED)
def test_file_that_changes_during_training(tmp_path, change):
    """One line, and no end of the process by the system: a read beyond the end of a memory map is its end."""
    files = build(tmp_path, "train_slim", [counting(40)], 20)
    opened, unopened = open_series(tmp_path), open_series(tmp_path)
    before = opened[7].tokens.tolist()
    change(files[1])
    with pytest.raises(ValueError, match=r"0001\.bin: changed or gone since it was opened"):
        unopened[7]
    if change in IN_PLACE:
        with pytest.raises(ValueError, match=r"0001\.bin: changed or gone since it was opened"):
            opened[7]
    else:
        assert opened[7].tokens.tolist() == before


def test_several_threads_read_what_one_reads(tmp_path):
    build(tmp_path, "train_slim", [counting(2400)], 12)
    numbers = [permute_index(k % 600, 600, 7, k // 600) for k in range(6000)]
    expected = [list(range(4 * number + 2, 4 * number + 6)) for number in numbers]
    series = open_series(tmp_path)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(series.__getitem__, numbers))
    assert [sample.tokens.tolist() for sample in found] == expected
    # 200 files, of which the latest stay open, and none of the others does.
    assert 0 < len(open_packed(tmp_path)) <= 64
    del series
    gc.collect()
    assert not open_packed(tmp_path)


def open_packed(folder):
    """The packed files below a folder that this process has open."""
    paths = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [path for path in paths if path.startswith(str(folder)) and path.endswith(".bin")]


def test_names_that_users_import():
    assert callable(packed_dataset.open_mixture) and callable(packed_dataset.open_validation)
    assert importlib.import_module("lit_gpt.packed_dataset").PackedDatasetBuilder is PackedDatasetBuilder
