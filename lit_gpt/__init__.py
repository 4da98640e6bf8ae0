"""SMDM: masked diffusion and autoregressive language models in one package.

Names are looked up when they are used, so that `import lit_gpt` costs nothing and needs no compiled extension.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_gpt.checkpoints.loaded import load_model
    from lit_gpt.config import Config
    from lit_gpt.model.bidirectional import TransEncoder
    from lit_gpt.model.causal import GPT
    from lit_gpt.tokenizer import Tokenizer

__all__ = ["GPT", "Config", "Tokenizer", "TransEncoder", "load_model"]

_HOMES = {
    "Config": "lit_gpt.config",
    "GPT": "lit_gpt.model.causal",
    "Tokenizer": "lit_gpt.tokenizer",
    "TransEncoder": "lit_gpt.model.bidirectional",
    "load_model": "lit_gpt.checkpoints.loaded",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
