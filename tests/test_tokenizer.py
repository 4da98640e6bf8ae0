"""Texts come back exactly, both file forms agree, and the byte counts add up."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt import Tokenizer
from tests.support.small_tokenizers import CORPUS, convert_to_tokenizer_json, train_small_tokenizer

TEXTS = [
    "",
    "\n",
    " ",
    "Hello world",
    " leading",
    "trailing ",
    "  two\n\n\n  lines\t\r\n",
    "<s>typed by an author</s><unk>",
    "<0x41>",
    "déjà vu \u2028 日本 𝕏 \x00",
    "2048 tokens",
]
# Anything UTF-8 can hold, but for the sign that LLaMA's models use for a space.
ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    source = train_small_tokenizer(root / "model")
    return source, convert_to_tokenizer_json(source, root / "json")


@pytest.fixture(scope="module")
def both(folders):
    return [Tokenizer(folder) for folder in folders]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_and_both_forms_agree(both, text):
    first, second = both
    ids = first.encode_ids(text)
    assert second.encode_ids(text) == ids
    assert [tokenizer.decode(ids) for tokenizer in both] == [text, text]


@given(text=ANY_TEXT)
@settings(deadline=None, max_examples=150)
def test_any_text_comes_back_and_its_bytes_add_up(both, text):
    first, second = both
    ids = first.encode_ids(text)
    assert second.encode_ids(text) == ids
    assert first.decode(ids) == second.decode(ids) == text
    # One dummy space in front of a text that is not empty.
    assert first.token_bytes()[ids].sum() == len(text.encode()) + bool(text)


# What `transformers` 5.23 gives for LLaMA's tokenizer.json, without bos.
SPECIAL_IDS = {
    "a </s> b": [263, 29871, 2, 29871, 289],
    "x<unk>y": [921, 0, 343],
    "<s>hi": [1, 7251],
    "hi</s></s>  two": [7251, 2, 2, 259, 1023],
    "</s>": [2],
    "a</s>\nb": [263, 2, 29871, 13, 29890],
    "a < /s>": [263, 529, 847, 29879, 29958],
    "": [],
}


@pytest.mark.parametrize("text", SPECIAL_IDS)
def test_special_tokens_inside_a_text_become_their_ids_where_asked_for(text):
    plain = Tokenizer(CORPUS.parents[1] / "tokenizer")
    reading = plain.reading("ids")
    assert reading.encode_ids(text) == SPECIAL_IDS[text]
    assert (plain.encode_ids(text) == reading.encode_ids(text)) == (
        "<s>" not in text and "</s>" not in text and "<unk>" not in text
    )
    assert (plain.special_tokens, reading.special_tokens, reading.fingerprint) == ("text", "ids", plain.fingerprint)


@pytest.mark.parametrize("text", TEXTS)
def test_both_forms_read_special_tokens_alike(both, text):
    first, second = (tokenizer.reading("ids") for tokenizer in both)
    assert first.encode_ids(text) == second.encode_ids(text)
    assert [tokenizer.reading("text").encode_ids(text) for tokenizer in (first, second)] == [
        tokenizer.encode_ids(text) for tokenizer in both
    ]


def test_other_processes_read_special_tokens_alike(both):
    for tokenizer in both:
        travelled = pickle.loads(pickle.dumps(tokenizer.reading("ids")))
        assert travelled.encode_ids("a</s>b") == tokenizer.reading("ids").encode_ids("a</s>b")
        assert travelled.encode_ids("a</s>b") != tokenizer.encode_ids("a</s>b")
    with pytest.raises(ValueError, match="special_tokens yes: choose from ids, text"):
        both[0].reading("yes")


def test_encode_appends_the_end_and_no_begin(both):
    for tokenizer in both:
        ids = tokenizer.encode_ids("Hello world")
        encoded = tokenizer.encode("Hello world")
        assert encoded.dtype == torch.int64 and encoded.tolist() == [*ids, tokenizer.eos_id]
        assert tokenizer.encode("Hello world", bos=True, eos=False).tolist() == [tokenizer.bos_id, *ids]
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 500)


def test_decode_takes_tensors_and_arrays_and_leaves_special_tokens_out(both):
    for tokenizer in both:
        encoded = tokenizer.encode("a\nb", bos=True)
        assert tokenizer.decode(encoded) == tokenizer.decode(encoded.numpy()) == "a\nb"
        assert tokenizer.decode([1, 0, 2, 2]) == ""


def test_decode_refuses_ids_that_have_no_text(both):
    for number in (500, -1):
        with pytest.raises(ValueError, match=f"token id {number} has no text: .* ids from 0 to 499"):
            both[0].decode([5, number])


def test_half_a_surrogate_pair_becomes_the_replacement_character(both):
    for tokenizer in both:
        assert tokenizer.decode(tokenizer.encode_ids("a\ud800b")) == "a\ufffdb"


def test_token_bytes(both):
    first, second = (tokenizer.token_bytes() for tokenizer in both)
    assert np.array_equal(first, second) and first.dtype == np.int64 and first.shape == (500,)
    assert first[:3].tolist() == [0, 0, 0] and (first[3:259] == 1).all() and (first[259:] >= 1).all()


def test_fingerprint_is_the_files_hash(folders, both):
    for folder, tokenizer, name in zip(folders, both, ("tokenizer.model", "tokenizer.json"), strict=True):
        assert tokenizer.fingerprint == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert tokenizer.source == str(folder) and tokenizer.contents[name] == (folder / name).read_bytes()
        assert Tokenizer(folder / name).encode_ids("abc") == tokenizer.encode_ids("abc")


def test_byte_level_tokenizer(tmp_path):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        ["déjà vu here and there"] * 5,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet),
    )
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "bos_token": None}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.bos_id == tokenizer.eos_id == 0
    text = "déjà vu\n  日本"
    ids = tokenizer.encode_ids(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode()) and tokenizer.token_bytes()[0] == 0


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_damaged_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00not a tokenizer")
    with pytest.raises(ValueError, match=f"{name}: not a"):
        Tokenizer(tmp_path)


def test_places_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"this folder has no tokenizer\.model or tokenizer\.json"):
        Tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such tokenizer: expected a folder"):
        Tokenizer(tmp_path / "missing")


def test_hub_name_without_the_hub_is_one_line(tmp_path):
    script = "from lit_gpt import Tokenizer\ntry: Tokenizer('nobody/nothing')\nexcept FileNotFoundError as e: print(e)"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("nobody/nothing: no such folder or file here, and the hub could not give it (offline")
    assert done.stdout.count("\n") == 1


def test_import_loads_nothing_compiled():
    libraries = ("torch", "sentencepiece", "tokenizers", "huggingface_hub")
    script = f"import sys, lit_gpt, lit_gpt.tokenizer; print([m for m in {libraries} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def set_in(value: object, *names: str):
    """Change one value of a tokenizer.json."""

    def change(description: dict) -> object:
        inner = description
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = value
        return description

    return change


DAMAGED = {
    "a list": (lambda description: [description], "not a tokenizer of the tokenizers library"),
    "no model": (set_in(None, "model"), "not a tokenizer of the tokenizers library"),
    "model's type": (set_in([1], "model"), "not a tokenizer of the tokenizers library"),
    "vocabulary": (set_in(["a"], "model", "vocab"), "not a tokenizer of the tokenizers library"),
    "no vocabulary": (lambda _: {"model": {"type": "BPE", "vocab": {}, "merges": []}}, "has no end-of-text token"),
    "no pieces": (set_in({}, "model", "vocab"), "not a tokenizer of the tokenizers library"),
    "a huge id": (set_in(4_000_000_000, "model", "vocab", "zebra"), "have ids up to 4000000000"),
    "an id of text": (set_in("4", "model", "vocab", "zebra"), "not a tokenizer of the tokenizers library"),
    "added": (set_in({"a": 1}, "added_tokens"), "not a tokenizer of the tokenizers library"),
    "added numbers": (set_in([1, 2], "added_tokens"), "not a tokenizer of the tokenizers library"),
    "byte_fallback": (set_in("yes", "model", "byte_fallback"), "not a tokenizer of the tokenizers library"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_tokenizer_json_of_other_types_is_one_line(folders, tmp_path, case):
    change, message = DAMAGED[case]
    description = json.loads((folders[1] / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(change(description)))
    with pytest.raises(ValueError, match=message) as raised:
        Tokenizer(tmp_path).token_bytes()
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "content",
    ["[]", "3", "null", "[" * 5000, '{"eos_token": ["a"]}', '{"eos_token": {"content": 3}}',
     '{"eos_token": NaN}', '{"eos_token": 7}'],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_settings_of_other_types_are_one_line(folders, tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes((folders[1] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match="not a tokenizer of the tokenizers library|no end-of-text token") as raised:
        Tokenizer(tmp_path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
