"""The model family: the 30 published sizes, shapes of one's own, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lit_gpt.config import SIZES, Config

FAMILY = json.loads((Path(__file__).parent / "golden" / "model_family.json").read_text())
SHAPE = ("n_layer", "n_head", "n_embd", "intermediate_size", "n_query_groups")


@pytest.mark.parametrize("row", FAMILY["sizes"], ids=lambda row: str(row["model"]))
def test_published_size(row: dict):
    config = Config.from_name(row["model"])
    assert {field: getattr(config, field) for field in SHAPE} == {field: row[field] for field in SHAPE}
    assert config.size_in_millions == pytest.approx(row["non_embedding_params_millions"], abs=5e-7)
    assert config.name == f"Diff_LLaMA_{row['model']}M"
    assert config.size_label == str(row["model"])


def test_the_family_is_complete_and_shares_the_rest():
    assert sorted(SIZES) == sorted(row["model"] for row in FAMILY["sizes"])
    assert len(SIZES) == 30
    config, common = Config.from_name(170), FAMILY["common"]
    for field in ("block_size", "vocab_size", "padded_vocab_size", "padding_multiple", "norm_eps"):
        assert getattr(config, field) == common[field]
    assert config.rope_theta == 10000
    assert config.rope_table_dtype == "bfloat16"


@pytest.mark.parametrize("name", [170, "170", "170M", "Diff_LLaMA_170M", " 170 "])
def test_spellings_of_a_name(name):
    assert Config.from_name(name) == Config.from_name(170)


@pytest.mark.parametrize(
    ("vocab_size", "padded"), [(32000, 32000), (4096, 4096), (4097, 4160), (50, 64), (50257, 50304)]
)
def test_mask_id_is_the_padded_vocabulary(vocab_size: int, padded: int):
    config = Config.from_name(6, vocab_size=vocab_size)
    assert (config.padded_vocab_size, config.mask_id) == (padded, padded)


def test_overrides_keep_the_published_name_only_for_the_published_shape():
    assert Config.from_name(6, vocab_size=4096, block_size=256).name == "Diff_LLaMA_6M"
    custom = Config.from_name(6, n_layer=2)
    assert custom.n_layer == 2
    assert custom.name == "Diff_LLaMA_2.1M"
    assert custom.size_label == "2.1"


def test_survives_json():
    config = Config.from_name(19, vocab_size=4096, rope_table_dtype="float32")
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("change", [{"of_a_later_version": 1}, {"n_layer": None}])
def test_foreign_config_is_refused(change: dict):
    values = Config.from_name(6).to_dict() | change
    values = {key: value for key, value in values.items() if value is not None}
    with pytest.raises(ValueError, match=next(iter(change))):
        Config.from_dict(values)


def test_unknown_size_lists_the_sizes():
    with pytest.raises(ValueError, match=r"171.*6, 19, 34.*2121"):
        Config.from_name(171)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_layer": 0}, "n_layer"),
        ({"n_embd": 255}, "n_embd 255"),
        ({"n_embd": 12}, "even"),
        ({"n_query_groups": 3}, "n_query_groups 3"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"rope_table_dtype": "float16"}, "rope_table_dtype"),
        ({"width": 3}, "width"),
    ],
)
def test_impossible_shapes_are_refused(change: dict, words: str):
    with pytest.raises(ValueError, match=words):
        Config.from_name(6, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_size": 2**31}, "block_size must be at most 1048576, not 2147483648"),
        ({"n_layer": 2**64}, "n_layer must be at most"),
        ({"n_embd": 10**400}, "n_embd must be at most"),
        ({"vocab_size": 10**5000}, "vocab_size must be at most"),
        ({"intermediate_size": -1}, "intermediate_size must be a whole number above 0, not -1"),
        ({"n_head": True}, "n_head must be a whole number above 0, not True"),
        ({"n_embd": "256"}, "n_embd must be a whole number above 0, not '256'"),
        ({"n_layer": 6.0}, "n_layer must be a whole number above 0, not 6.0"),
        ({"padding_multiple": [64]}, "padding_multiple must be a whole number"),
        (
            {"block_size": 1 << 20, "n_embd": 8192, "n_head": 1, "n_query_groups": 1},
            "block_size 1048576 times head size",
        ),
        ({"norm_eps": math.nan}, "norm_eps must be a finite number above 0 and at most 1e\\+15, not nan"),
        ({"norm_eps": 10**29}, "norm_eps must be a finite number above 0 and at most 1e\\+15, not 1000"),
        ({"norm_eps": "1e-5"}, "norm_eps must be a finite number"),
        ({"rope_theta": math.inf}, "rope_theta must be a finite number"),
        ({"rope_theta": 10**400}, "rope_theta must be a finite number"),
        ({"rope_theta": True}, "rope_theta must be a finite number"),
        ({"rope_theta": 0}, "rope_theta must be a finite number above 0"),
        ({"rope_table_dtype": ["float32"]}, "rope_table_dtype must be"),
        ({"name": 3}, "name must be a short printable text without /, not 3"),
        ({"name": "../../x"}, "name must be"),
        ({"name": "x\n"}, "name must be"),
        ({"name": "x" * 500}, "name must be"),
        ({7: 3}, "unknown fields"),
    ],
    ids=lambda value: next(map(str, value)) if isinstance(value, dict) else value[-20:],
)
def test_a_config_from_a_file_is_checked(change: dict, words: str):
    """A file's numbers decide what is allocated: each is bounded and of its type."""
    with pytest.raises(ValueError, match=words) as raised:
        Config.from_dict(Config.from_name(6).to_dict() | change)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("values", [[], "config", None, 3])
def test_what_is_no_object_is_no_config(values: object):
    with pytest.raises(ValueError, match="model config: expected an object"):
        Config.from_dict(values)  # type: ignore[arg-type]


def test_a_size_in_other_digits_is_unknown():
    with pytest.raises(ValueError, match="unknown model size"):
        Config.from_name("\u00b2")


@pytest.mark.parametrize("row", FAMILY["sizes"], ids=lambda row: str(row["model"]))
def test_layers_and_width_give_the_published_sizes(row: dict):
    """The family's rule derives heads, MLP and query groups of 29 of 30 sizes; 75M alone has others."""
    derived = Config.from_shape(n_layer=row["n_layer"], n_embd=row["n_embd"])
    differs = {field for field in SHAPE if getattr(derived, field) != row[field]}
    assert differs == ({"n_head", "intermediate_size", "n_query_groups"} if row["model"] == 75 else set())


def test_a_shape_takes_what_is_given_and_derives_the_rest():
    config = Config.from_shape(n_layer=2, n_embd=96, vocab_size=512, block_size=64)
    assert (config.n_head, config.head_size, config.intermediate_size, config.n_query_groups) == (2, 48, 384, 2)
    assert (config.name, config.vocab_size, config.block_size) == ("Diff_LLaMA_0.295M", 512, 64)
    config = Config.from_shape(n_layer=2, n_embd=96, n_head=6, n_query_groups=3, intermediate_size=100)
    assert (config.head_size, config.n_query_groups, config.intermediate_size) == (16, 3, 100)
    assert config.describe() == (
        "2 layers, width 96, 6 heads of 16 in 3 query groups, MLP 100, context 2048, vocabulary 32000"
    )
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_layer": 2}, "missing n_embd"),
        ({"n_layer": 2, "n_embd": 64, "depth": 3}, "unknown depth"),
        ({"n_layer": 2, "n_embd": 63}, "must be even for rotary"),
        ({"n_layer": 2, "n_embd": 0}, "n_embd must be a whole number above 0"),
        ({"n_layer": 2, "n_embd": 10**30}, "n_embd must be at most"),
        ({"n_layer": 0, "n_embd": 64}, "n_layer must be a whole number above 0"),
        ({"n_layer": 2, "n_embd": 64, "n_head": 5}, "n_embd 64 does not divide by n_head 5"),
        ({"n_layer": 2, "n_embd": 64, "n_head": 0}, "n_head must be a whole number above 0"),
    ],
)
def test_an_impossible_shape_is_refused(fields: dict, words: str):
    with pytest.raises(ValueError, match=words) as raised:
        Config.from_shape(**fields)
    assert "\n" not in str(raised.value)
