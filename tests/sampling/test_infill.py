"""Typed text with gaps: what becomes of it as tokens, and that samplers keep what was given."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoints.loaded import LoadedModel
from lit_gpt.config import Config
from lit_gpt.data.sft_formats import CHAT_TEMPLATE
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.model.layers import Transformer
from lit_gpt.sampling.infill import (
    has_gaps,
    infill_row,
    infill_states,
    spaced_positions,
    split_gaps,
    with_typed_spaces,
)
from lit_gpt.sampling.sample import sample_states
from lit_gpt.sampling.settings import ALGORITHMS, Sampling
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.ui.completion import Completer
from tests.support.small_tokenizers import convert_to_tokenizer_json, train_small_tokenizer

TINY = Config("tiny", 2, 2, 32, 64, 2, block_size=64, vocab_size=500)
MASK = TINY.mask_id


@pytest.fixture(scope="module", params=["sentencepiece", "tokenizers"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = train_small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")
    return Tokenizer(
        folder if request.param == "sentencepiece" else convert_to_tokenizer_json(folder, folder.parent / "json")
    )


def tiny(kind: type):
    model = kind(TINY)
    model.init_weights(3)
    return model.eval()


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("the ___ sat on the ___", ["the", 8, " sat on the", 8]),
        ("the ___5 sat", ["the", 5, " sat"]),
        ("_____12, he said", [12, ", he said"]),
        ("a___b", ["a", 8, "b"]),
        ("___ ___3", [8, 3]),
        ("x  ___\ny", ["x ", 8, "\ny"]),
        ("__init__ and snake_case", ["__init__ and snake_case"]),
        ("", []),
    ],
)
def test_pieces(text, pieces):
    assert split_gaps(text) == pieces
    assert has_gaps(text) == any(isinstance(piece, int) for piece in pieces)


def test_a_gap_of_no_token_is_refused():
    with pytest.raises(ValueError, match="___0 has 0 tokens: at least 1"):
        split_gaps("a ___0 b")


def test_a_gap_of_more_digits_than_any_context_is_refused():
    with pytest.raises(ValueError, match="^a gap's number has 5000 digits: no context has room for it$"):
        split_gaps(f"a ___{'9' * 5000} b")
    assert split_gaps("___0005") == [5]


@pytest.mark.parametrize("text", ["the king sat on the throne", "To be, or not to be\nthat is", "what news, my lord?"])
def test_a_filled_gap_is_the_text_itself(tokenizer, text):
    """Cut words out and put their own tokens into the gap: the row is the text's own."""
    whole = tokenizer.encode_ids(text)
    words = text.split(" ")
    for cut in range(1, len(words)):
        before, after = " ".join(words[:cut]), " " + " ".join(words[cut + 1 :])
        if cut + 1 == len(words):
            after = ""
        size = len(whole) - len(tokenizer.encode_ids(before))
        size -= len(tokenizer.encode_ids("a" + after)) - len(tokenizer.encode_ids("a"))
        row = infill_row(f"{before} ___{size}{after}", tokenizer, MASK, 64)
        assert row.count(MASK) == size
        assert [own if token == MASK else token for token, own in zip(row, whole, strict=True)] == whole


@pytest.mark.parametrize(
    ("text", "spaced"), [("To ___2 be ___", 2), ("___2 be ___3", 1), ("To___2 be", 0), (" ___", 0)]
)
def test_a_typed_space_is_in_the_text_whatever_fills_the_gap(tokenizer, text, spaced):
    """One space where one was typed, whether the gap's first token has one or not; none where none was."""
    row, positions = infill_row(text, tokenizer, MASK, 64), spaced_positions(text, tokenizer)
    assert len(positions) == spaced and all(row[place] == MASK and row[place - 1] != MASK for place in positions)
    for word in ("a king", "king"):
        tokens = tokenizer.encode_ids(word)[-1:] if word == "king" else tokenizer.encode_ids("a king")[1:2]
        ids = [tokens[0] if token == MASK else token for token in row]
        plain, kept = tokenizer.decode(ids), with_typed_spaces(ids, positions, tokenizer)
        assert kept.replace(" ", "") == plain.replace(" ", "")
        own = tokenizer.decode([*tokenizer.encode_ids("a"), *tokens]).startswith("a ")
        assert len(kept) - len(plain) == (0 if own else spaced)


def test_a_text_without_gaps_is_a_prompt(tokenizer):
    assert infill_row("To be, or", tokenizer, MASK, 64) == tokenizer.encode_ids("To be, or")
    assert infill_row("___", tokenizer, MASK, 3, gap=3) == [MASK] * 3


def test_gaps_beyond_the_context_are_refused_before_anything_of_their_size_exists(tokenizer):
    mdm = completer(tiny(TransEncoder), tokenizer)
    tracemalloc.start()
    try:
        for text in ("To ___999999999 be", "___40 ___40", "___64 be"):
            with pytest.raises(ValueError, match="prompt 0 has [0-9]+ tokens, more than the context length 64"):
                mdm.request(text, 64)
            with pytest.raises(ValueError, match="more than the context length 64"):
                mdm.loaded.fill(text)
        # A context that the model does not have makes no room.
        with pytest.raises(ValueError, match="more than the context length 64"):
            mdm.request("To ___20000000 be", 10**9)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 0.7}, {"block_length": 2}], ids=str)
def test_what_is_given_stays(algorithm, settings):
    rows = [[3, MASK, MASK, 4, 5, MASK], [7, 8], [MASK, 9]]
    sampling = Sampling(algorithm, 12, **settings)
    states = list(infill_states(tiny(TransEncoder), rows, sampling, (6, 5, 8)))
    for state in states:
        for row, ids in zip(rows, state.tokens(), strict=True):
            assert all(token in (MASK, int(own)) for token, own in zip(row, ids, strict=False))
    last = states[-1].tokens()
    assert [len(ids) for ids in last] == [6, 5, 8]
    assert all(int(ids.max()) < TINY.vocab_size for ids in last)


def test_gaps_at_the_end_are_a_completion():
    model, sampling = tiny(TransEncoder), Sampling(steps=9)
    typed = [state.input_ids for state in infill_states(model, [[5, 6, *[MASK] * 8]], sampling, 10)]
    known = [state.input_ids for state in sample_states(model, [[5, 6]], sampling, 10)]
    assert all(torch.equal(one, other) for one, other in zip(typed, known, strict=True))


def test_mistakes():
    sampling = Sampling()
    with pytest.raises(ValueError, match="an ARM writes from left to right and cannot fill gaps"):
        infill_states(tiny(GPT), [[4, MASK, 5]], sampling, 8)
    with pytest.raises(ValueError, match="prompt 0 has 9 tokens, more than the context length 8"):
        infill_states(tiny(TransEncoder), [[MASK] * 9], sampling, 8)
    with pytest.raises(ValueError, match="ids from 0 to 505"):
        infill_states(tiny(TransEncoder), [[MASK, 505]], sampling, 8)


# --- the request of a person ------------------------------------------------------------------------------------------


def completer(model: Transformer, tokenizer: Tokenizer) -> Completer:
    return Completer(LoadedModel(model, lambda: tokenizer))


def test_requests(tokenizer):
    mdm, arm = (completer(tiny(kind), tokenizer) for kind in (TransEncoder, GPT))
    assert mdm.request("To be", 40).context_length == 40
    filled = mdm.request("To ___2 be", 40)
    assert filled.context_length == len(filled.row) < 40
    assert mdm.text(next(mdm.states(filled, Sampling(steps=4))), filled) == "To __ __ be"
    assert arm.request("", 40).row == [tokenizer.bos_id]
    assert mdm.request("", 40).row == []
    for one in (mdm, arm):
        # Underscores are text in a chat, so an ARM takes them too.
        request = one.request("Fill ___ in", 64 * 4, chat=True)
        assert MASK not in request.row and request.row[0] == tokenizer.bos_id
        assert tokenizer.decode(request.row) == CHAT_TEMPLATE.format(question="Fill ___ in")
        assert request.start == len(request.row)


def test_an_answer_ends_at_its_end_token(tokenizer):
    arm = completer(tiny(GPT), tokenizer)
    request = dataclasses.replace(arm.request("Speak", 60), start=1)
    state = next(arm.states(request, Sampling()))
    answer = [tokenizer.bos_id, *tokenizer.encode_ids("I am"), tokenizer.eos_id, *tokenizer.encode_ids("never")]
    ids = torch.tensor([[request.row[0], *answer]])
    state = dataclasses.replace(state, input_ids=ids, key_mask=torch.ones_like(ids, dtype=torch.bool))
    assert arm.text(state, request) == "I am"
