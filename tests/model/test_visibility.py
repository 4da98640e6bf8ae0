"""Visibility: what it says, what the kernel is told, and what a model does with it, each against all pairs in a list."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_gpt.config import Config
from lit_gpt.model import visibility as visibilities
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.model.visibility import Visibility
from tests.support.small_models import scaled_model

TINY = Config("tiny", 3, 4, 32, 64, 4, block_size=64, vocab_size=100)
KEYS = 7
PADDING = torch.arange(KEYS) >= torch.tensor([[0], [2]])


def blocks_of_two(query: Tensor, key: Tensor) -> Tensor:
    return key // 2 <= query // 2


ALL = {
    "full": Visibility(),
    "causal": Visibility(causal=True),
    "padding": Visibility(key_mask=PADDING),
    "causal, padding": Visibility(causal=True).padded(PADDING),
    "blocks": Visibility(rule=blocks_of_two),
    "blocks, padding": Visibility(rule=blocks_of_two).padded(PADDING),
    "blocks, causal": Visibility(causal=True, rule=blocks_of_two),
}
EVERY = pytest.mark.parametrize("visibility", ALL.values(), ids=ALL)


def listed(visibility: Visibility, row: int, query: int, key: int) -> bool:
    """Whether a query attends to a key, condition by condition."""
    return (
        (not visibility.causal or key <= query)
        and (visibility.key_mask is None or bool(visibility.key_mask[row, key]))
        and (visibility.rule is None or bool(visibility.rule(torch.tensor(query), torch.tensor(key))))
    )


def pairs_told(visibility: Visibility, queries: int | Tensor) -> Tensor:
    """(2, T, S) bool: what a kernel makes of the arguments, as `kernels.attention` defines them."""
    is_causal, mask = visibility.attention_arguments(queries, KEYS)
    count = queries if isinstance(queries, int) else queries.size(1)
    if is_causal:
        assert mask is None and count == KEYS
        mask = torch.ones(KEYS, KEYS, dtype=torch.bool).tril()
    whole = torch.ones(2, 1, count, KEYS, dtype=torch.bool)
    return (whole if mask is None else whole & mask)[:, 0]


@EVERY
@pytest.mark.parametrize("queries", [1, 3, KEYS])
def test_the_last_columns_attend_as_listed(visibility: Visibility, queries: int):
    told = pairs_told(visibility, queries)
    for row, query, key in torch.cartesian_prod(torch.arange(2), torch.arange(queries), torch.arange(KEYS)).tolist():
        assert bool(told[row, query, key]) == listed(visibility, row, KEYS - queries + query, key)


@EVERY
def test_chosen_columns_attend_as_listed(visibility: Visibility):
    columns = torch.tensor([[0, 6, 3], [5, 5, 1]])
    told = pairs_told(visibility, columns)
    for row, place, key in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(KEYS)).tolist():
        assert bool(told[row, place, key]) == listed(visibility, row, int(columns[row, place]), key)


@EVERY
def test_pairs_are_counted(visibility: Visibility):
    unpadded = visibility._replace(key_mask=None)
    expected = sum(listed(unpadded, 0, query, key) for query in range(KEYS) for key in range(KEYS))
    assert visibility.pairs(KEYS) == expected
    _, mask = visibility.attention_arguments(KEYS, KEYS)
    per_query = mask is not None and mask.size(2) == KEYS
    assert visibility.mask_elements(KEYS) == (KEYS * KEYS if per_query else 0)


def test_pairs_of_a_rule_are_counted_once():
    visibilities._pairs_of_rule.cache_clear()
    for _ in range(3):
        Visibility(rule=blocks_of_two).pairs(40)
    assert visibilities._pairs_of_rule.cache_info().misses == 1


def test_fast_kernels_get_no_mask():
    assert Visibility().attention_arguments(KEYS, KEYS) == (False, None)
    assert Visibility(causal=True).attention_arguments(KEYS, KEYS) == (True, None)
    # One new token behind a cache sees all of it.
    assert Visibility(causal=True).attention_arguments(1, KEYS) == (False, None)
    assert Visibility().padded(None).attention_arguments(KEYS, KEYS) == (False, None)
    _, mask = Visibility().padded(PADDING).attention_arguments(KEYS, KEYS)
    assert mask is not None and mask.shape == (2, 1, 1, KEYS)


@torch.no_grad()
def test_a_model_reads_by_the_visibility_that_it_is_given():
    """An MDM that is told to be causal has a causal model's numbers, and the other way round."""
    ids = torch.randint(0, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    arm, mdm = scaled_model(GPT, TINY), scaled_model(TransEncoder, TINY)
    mdm.load_state_dict({**arm.state_dict(), "transformer.wte.weight": mdm.transformer.wte.weight})
    mdm.transformer.wte.weight[:-1] = arm.transformer.wte.weight[: mdm.transformer.wte.weight.size(0) - 1]
    torch.testing.assert_close(mdm(ids, visibility=arm.visibility), arm(ids), rtol=0, atol=0)
    torch.testing.assert_close(arm(ids, visibility=mdm.visibility), mdm(ids), rtol=0, atol=0)
    assert not torch.allclose(mdm(ids), arm(ids), atol=1e-2)


@torch.no_grad()
def test_blocks_hide_what_lies_behind():
    """Changing a token changes the logits of its own block and of later ones alone."""
    model = scaled_model(TransEncoder, TINY)
    ids = torch.randint(0, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 100
    visibility = Visibility(rule=blocks_of_two)
    difference = (model(ids, visibility=visibility) - model(changed, visibility=visibility)).abs().amax(-1)[0]
    assert (difference[:4] == 0).all() and (difference[4:] > 0).all()
