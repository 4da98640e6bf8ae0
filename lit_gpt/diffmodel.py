"""The published import path of `lit_gpt.model.bidirectional.TransEncoder`."""

from lit_gpt.model.bidirectional import TransEncoder

__all__ = ["TransEncoder"]
