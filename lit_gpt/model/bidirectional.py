"""The masked diffusion model (MDM): a bidirectional transformer that fills in [MASK].

It differs from the ARM in two facts: every token attends to every other, and the embedding has one more row, for [MASK], whose
id is the padded vocabulary size and which the head cannot predict.
"""

from __future__ import annotations

from lit_gpt.config import Config
from lit_gpt.model.layers import Transformer
from lit_gpt.model.visibility import Visibility


class TransEncoder(Transformer):
    """Predicts every masked token from all tokens that are not: logits (B, T, V), position i predicts token i."""

    kind = "mdm"
    visibility = Visibility()

    @classmethod
    def embedding_rows(cls, config: Config) -> int:
        """The head's rows and one for [MASK]."""
        return config.padded_vocab_size + 1
