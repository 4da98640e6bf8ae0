"""The published import path of `lit_gpt.data.packed_format.PackedDatasetBuilder`, for TinyLlama's preparation scripts."""

from lit_gpt.data.packed_format import PackedDatasetBuilder

__all__ = ["PackedDatasetBuilder"]
