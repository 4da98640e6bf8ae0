"""The devices of a test that runs on a GPU by the same code as on a CPU."""

from __future__ import annotations

import pytest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
"""Values of a parameter `device`; the second is skipped, with its reason, where there is no GPU."""
