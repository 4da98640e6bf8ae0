"""The published micro batches: every training script at every size class."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_gpt.training.group_sizes import group_size

ROOT = Path(__file__).resolve().parents[2]
SIZES = (6, 19, 34, 48, 66, 170, 1000, 1028, 1233, 2121)
ROWS = {
    "train_ar": (32, 32, 16, 16, 8, 8, 8, 8, 4, 2),
    "train_mdm": (32, 32, 16, 16, 8, 8, 8, 4, 4, 4),
    "train_mdm_rl": (32, 32, 16, 16, 8, 8, 8, 4, 4, 4),
    "finetune_ar": (16, 16, 16, 16, 8, 8, 8, 8, 8, 8),
    "finetune_mdm": (16, 16, 16, 16, 8, 8, 8, 4, 4, 4),
    "finetune_mdm_gsm8k": (16, 16, 16, 16, 16, 16, 16, 16, 16, 16),
    "finetune_mdm_reverse": (16, 16, 16, 16, 8, 8, 8, 4, 4, 4),
}


@pytest.mark.parametrize("script", ROWS)
def test_published_group_sizes(script):
    assert tuple(group_size(script, size) for size in SIZES) == ROWS[script]


def test_every_training_script_names_itself():
    scripts = [*ROOT.glob("pretrain/*.py"), *ROOT.glob("sft/*.py")]
    assert {path.stem for path in scripts} == set(ROWS)
    for path in scripts:
        assert f'script="{path.stem}"' in path.read_text(encoding="utf-8"), path
