"""Token files of datatrove and Megatron are read as they are, and where documents end is known in every kind."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
from datatrove.pipeline.tokens.tokenizer import TokenizedFile

from lit_gpt.data.packed_dataset import PackedSeries, open_mixture
from lit_gpt.data.packed_files import scan_folder
from lit_gpt.data.packed_foreign import document_ends
from lit_gpt.data.packed_format import PackedDatasetBuilder
from lit_gpt.ui.info import path_info

BLOCK = 16
GENERATOR = np.random.default_rng(5)
DOCUMENTS = [GENERATOR.integers(3, 400, size).tolist() for size in (5, 16, 1, 90, 16, 7, 32, 0, 40)]
TOKENS = np.concatenate([np.asarray(document, dtype=np.int64) for document in DOCUMENTS])
ENDS = np.cumsum([len(document) for document in DOCUMENTS])


def write_datatrove(folder, token_size, index=True, metadata=False):
    file = TokenizedFile(
        str(folder), "00000_corpus.ds", save_index=index, token_size=token_size, save_final_metadata=metadata
    )
    for document in DOCUMENTS:
        file.write(document, None)
    file.close()


def write_megatron(folder, token_size):
    file = MegatronTokenizedFile(str(folder), "00000_corpus", token_size=token_size)
    for document in DOCUMENTS:
        file.write(document)
    file.close()


def write_packed(folder, chunk_size=64):
    builder = PackedDatasetBuilder(folder, "00000", chunk_size, 1, vocab_size=400)
    for start in range(0, len(DOCUMENTS), 4):
        part = DOCUMENTS[start : start + 4]
        tokens = np.asarray([token for document in part for token in document], dtype=np.int64)
        builder.add_documents(tokens, np.cumsum([len(document) for document in part]))
    builder.write_rest()
    entries = {f"00000_{i:010d}.bin": {"tokens": min(64, len(TOKENS) - 64 * i)} for i in range(len(builder.filenames))}
    (folder / "00000.manifest.json").write_text(json.dumps({"files": entries}))


WRITERS = {
    "datatrove, 2 bytes": lambda folder: write_datatrove(folder, 2),
    "datatrove, 4 bytes": lambda folder: write_datatrove(folder, 4),
    "Megatron, 2 bytes": lambda folder: write_megatron(folder, 2),
    "Megatron, 4 bytes": lambda folder: write_megatron(folder, 4),
    "packed": write_packed,
}


def open_series(folder, vocab_size=400):
    return PackedSeries(scan_folder(folder, ["00000"], BLOCK)["00000"], BLOCK, vocab_size)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(params=WRITERS)
def folder(request, tmp_path):
    (tmp_path / "data").mkdir()
    WRITERS[request.param](tmp_path / "data")
    return tmp_path / "data"


def test_all_tokens_and_document_ends_are_read(folder):
    series = open_series(folder)
    assert len(series) == -(-len(TOKENS) // BLOCK)
    samples = [series[number] for number in range(len(series))]
    assert all(sample.tokens.shape == (BLOCK,) and sample.tokens.dtype == np.int64 for sample in samples)
    assert np.concatenate([sample.tokens[: sample.length] for sample in samples]).tolist() == TOKENS.tolist()
    ends = np.concatenate([series.document_ends(number) + BLOCK * number for number in range(len(series))])
    # An empty document ends where the one before it does.
    assert sorted(set(ends.tolist())) == sorted(set(ENDS.tolist()))


def test_training_reads_them_and_the_kept_scan_says_the_same(folder):
    time.sleep(2.1)  # what has just changed is not kept
    first = open_mixture(folder, {"00000": 1.0}, BLOCK, 400, seed=3)
    assert list(folder.glob(".*.scan.json"))
    second = open_mixture(folder, {"00000": 1.0}, BLOCK, 400, seed=3)
    assert first.fingerprint == second.fingerprint
    assert [first[k].tokens.tolist() for k in range(20)] == [second[k].tokens.tolist() for k in range(20)]


def test_metadata_tell_the_size_where_there_is_no_index(tmp_path):
    write_datatrove(tmp_path, 4, index=False, metadata=True)
    series = open_series(tmp_path)
    assert series.document_ends(0) is None
    assert series[0].tokens.tolist() == TOKENS[:BLOCK].tolist()
    (tmp_path / "00000_corpus.ds.metadata").unlink()
    with pytest.raises(ValueError, match=r"without 00000_corpus\.ds\.index or .*\.metadata the size of its tokens"):
        open_series(tmp_path)


@pytest.mark.parametrize("kind", ["datatrove, 2 bytes", "datatrove, 4 bytes", "Megatron, 2 bytes", "Megatron, 4 bytes"])
def test_truncated_files_are_refused(tmp_path, kind):
    WRITERS[kind](tmp_path)
    (path,) = [path for path in tmp_path.iterdir() if path.suffix in (".ds", ".bin")]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="truncated, or of another file; copy both"):
        open_series(tmp_path)


def test_a_file_of_4_byte_tokens_that_was_cut_in_half_is_not_one_of_2_byte_tokens(tmp_path):
    """Its index fits, its metadata does not."""
    write_datatrove(tmp_path, 4, metadata=True)
    assert open_series(tmp_path)[0].tokens.tolist() == TOKENS[:BLOCK].tolist()
    path = tmp_path / "00000_corpus.ds"
    path.write_bytes(path.read_bytes()[: 2 * len(TOKENS)])
    with pytest.raises(ValueError, match="truncated, or of another file; copy both"):
        open_series(tmp_path)


def test_a_truncated_megatron_index_is_refused(tmp_path):
    write_megatron(tmp_path, 2)
    index = tmp_path / "00000_corpus.idx"
    whole = index.read_bytes()
    for cut in range(1, len(whole)):
        index.write_bytes(whole[:-cut])
        with pytest.raises(ValueError, match=r"00000_corpus\.idx: "):
            open_series(tmp_path)


def test_tokens_beyond_the_vocabulary_are_named(tmp_path):
    write_datatrove(tmp_path, 2)
    with pytest.raises(ValueError, match=r"offset \d+ holds token \d+, but the model's vocabulary has 100 tokens"):
        open_series(tmp_path, vocab_size=100)


def test_files_of_earlier_days_have_no_index(tmp_path):
    builder = PackedDatasetBuilder(tmp_path, "00000", 64, 1, vocab_size=400)
    builder.add_array(TOKENS)
    builder.write_rest()
    assert open_series(tmp_path).document_ends(0) is None
    assert document_ends(tmp_path / "00000_0000000000.bin") is None


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "packed"])
def test_info_describes_what_training_reads(tmp_path, name):
    WRITERS[name](tmp_path)
    (path,) = [one for one in tmp_path.iterdir() if one.suffix in (".ds", ".bin")]
    found = path_info(path)
    assert (found["what"], found["format"]) == ("packed data", f"{name.split(',')[0]}'s")
    assert (found["tokens"], found["largest id"]) == (len(TOKENS), TOKENS.max())
    assert found["documents"] == len(document_ends(path)) >= 8
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="truncated, or of another file"):
        path_info(path)
