"""The networks, and asking them for logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_gpt.model.causal import GPT

__all__ = ["GPT"]


def __getattr__(name: str) -> Any:
    # `lit_gpt.model.GPT` is a published import path; looked up when it is used, so that importing a package stays light.
    if name == "GPT":
        from lit_gpt.model.causal import GPT

        return GPT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
