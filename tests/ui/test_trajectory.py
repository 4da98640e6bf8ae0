"""Denoising trajectories: the text of single tokens, and the order in which they were revealed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
import torch

from lit_gpt.sampling.sequence import State
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.ui.trajectory import DenoisingTrajectory, token_texts

MASK = 400
TEXT = "To be, or not to be:\n that is  the question\n\nWhether 'tis nobler é in the mind to suffer\n"


@pytest.fixture(scope="module", params=[True, False], ids=["dummy prefix", "no dummy prefix"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With and without the space that LLaMA-style tokenizers put before a text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT, *TEXT.split("\n")] * 3), model_writer=model, vocab_size=300, model_type="bpe",
        normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True,
        add_dummy_prefix=request.param, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return Tokenizer(folder)


def states(ids: list[int]) -> list[State]:
    """One row with a padded column: two tokens given, then every second one in step 2, the rest in step 4 of 5."""
    row = torch.tensor([0, *ids])
    keep = torch.tensor([[False, *[True] * len(ids)]])
    result = []
    for step in range(6):
        shown = row.clone()
        for position in range(3, len(row)):
            if step < (2 if position % 2 else 4):
                shown[position] = MASK
        result.append(State(step, shown[None], torch.zeros(1, len(row)), keep))
    return result


def test_token_texts_join_to_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_ids(TEXT)
    plain_ids = [
        token for token in ids if len(tokenizer.decode([token]).encode()) and "�" not in tokenizer.decode([token])
    ]
    joined = "".join(token_texts(tokenizer, plain_ids))
    assert joined.removeprefix(" ") == tokenizer.decode(plain_ids)
    assert token_texts(tokenizer, [MASK, tokenizer.eos_id], MASK) == ["", ""]


def test_trajectory_is_what_the_states_show(tokenizer: Tokenizer) -> None:
    text = "To be, or not\n"
    ids = tokenizer.encode_ids(text)
    trajectory = DenoisingTrajectory.from_states(states(ids), 0, MASK, tokenizer)
    assert trajectory.revealed == [0, 0, *(2 if position % 2 else 4 for position in range(3, len(ids) + 1))]
    assert trajectory.plain_text(5) == trajectory.plain_text(4) == text
    hidden = sum(at == 4 for at in trajectory.revealed)
    assert trajectory.plain_text(2).count("__") == trajectory.plain_text(3).count("__") == hidden
    assert trajectory.plain_text(0).count("__") == len(ids) - 2
    assert trajectory.styled_text(4).plain == text
    assert trajectory.styled_text(0).plain.count("▒▒") == len(ids) - 2


def test_selected_steps_begin_before_and_end_after(tokenizer: Tokenizer) -> None:
    trajectory = DenoisingTrajectory(["a"] * 41, [0, *range(1, 41)], 50)
    picked = trajectory.select_steps(6)
    assert picked[0] == 0 and picked[-1] == 40 and len(picked) == 6 and picked == sorted(set(picked))
    assert trajectory.select_steps(50) == list(range(41))
    assert DenoisingTrajectory(["a"], [0], 3).select_steps(6) == [0]
