"""What CONTRIBUTING.md sends people to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"[\w./-]+/[\w.-]*\.(?:py|sh|yaml)\b|\b[\w/]+/(?=`)", TEXT))))
def test_named_files_and_folders_exist(path):
    assert (ROOT / path).exists() or (ROOT / "lit_gpt" / path).is_dir(), path
