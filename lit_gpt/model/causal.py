"""The autoregressive model (ARM): a transformer in which a token attends to itself and the tokens before it."""

from __future__ import annotations

from lit_gpt.model.layers import Transformer
from lit_gpt.model.visibility import Visibility


class GPT(Transformer):
    """Predicts the next token from those before it: logits (B, T, V), position i predicts token i + 1."""

    kind = "arm"
    visibility = Visibility(causal=True)
