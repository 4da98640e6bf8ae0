"""FLOPs of a forward pass: what training's speed, and the cost of an evaluation, are counted from."""

from __future__ import annotations

from lit_gpt.config import Config


def forward_flops(config: Config, tokens: int, pairs: int, scored: int) -> int:
    """2 per weight and token that uses it, and 4 C per layer and pair of tokens in attention, C being the width.

    As Chowdhery et al. 2022 (arXiv 2204.02311, appendix B) count; but only pairs that are visible and rows of the head
    that are computed.

    Args:
        config: the model.
        tokens: that the blocks read.
        pairs: (query, key) pairs that are visible, over all rows.
        scored: positions on which the head runs.
    """
    head = config.padded_vocab_size * config.n_embd * scored
    return 2 * (config.non_embedding_params * tokens + head) + 4 * config.n_layer * config.n_embd * pairs
