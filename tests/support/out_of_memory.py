"""What torch raises for want of memory, on either kind of device."""

from __future__ import annotations

import pytest
import torch

# The CPU allocator has no class of errors of its own.
OUT_OF_MEMORY = [
    pytest.param(torch.OutOfMemoryError("CUDA out of memory"), id="gpu"),
    pytest.param(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), id="cpu"),
]
