"""The published micro batches: every training script at every size class."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_gpt.training.group_sizes import group_size, published_micro_steps

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


@pytest.mark.parametrize(
    ("batch", "script", "size", "count"),
    [(256, "train_mdm", 1028, 8), (256, "train_ar", 1028, 4), (256, "train_mdm", 6, 1), (1024, "train_mdm_rl", 1028, 32),
     (256, "finetune_mdm_gsm8k", 1028, 2), (64, "finetune_mdm_reverse", 1028, 2), (16, "train_mdm", 6, 1)],
)  # fmt: skip
def test_published_micro_steps(batch, script, size, count):
    """At 1028M step 5000 is iter-040000: 256 sequences on 8 GPUs in micro batches of 4."""
    assert published_micro_steps(batch, group_size(script, size)) == count


def test_published_scripts_take_their_own():
    scripts = {path.stem: path for path in (*ROOT.glob("pretrain/*.py"), *ROOT.glob("sft/*.py"))}
    for name in ROWS:
        assert f'group_sizes="{name}"' in scripts[name].read_text(encoding="utf-8"), name
