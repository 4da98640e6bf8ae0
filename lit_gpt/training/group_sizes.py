"""Rows of a group by model size: the published micro batches, one table for all training scripts.

The rows of a group share a length and the loss's denominator (`data.batching`), so a group's size is part of what is
trained; it is no matter of memory.
"""

from __future__ import annotations

import math

_MDM_PRETRAINING = ((20, 32), (50, 16), (1000, 8), (math.inf, 4))
_FINETUNING = ((50, 16), (1000, 8), (math.inf, 4))

# By training script: (largest size in millions of parameters, rows), ascending; from the published script of that name.
_GROUP_SIZES: dict[str, tuple[tuple[float, int], ...]] = {
    "train_ar": ((20, 32), (50, 16), (1028, 8), (2000, 4), (math.inf, 2)),
    "train_mdm": _MDM_PRETRAINING,
    "train_mdm_rl": _MDM_PRETRAINING,
    "finetune_ar": ((50, 16), (math.inf, 8)),
    "finetune_mdm": _FINETUNING,
    "finetune_mdm_gsm8k": ((math.inf, 16),),
    "finetune_mdm_reverse": _FINETUNING,
}


# GPUs of the published commands.
_PUBLISHED_DEVICES = 8


def published_micro_steps(global_batch_size: int, group_rows: int) -> int:
    """Micro steps of an optimizer step, as the published commands count them: those of one of their eight GPUs.

    Whatever the devices and the memory are here; at least 1.

    Args:
        global_batch_size: sequences of a step.
        group_rows: the published micro batch.
    """
    return max(1, global_batch_size // (_PUBLISHED_DEVICES * group_rows))


def group_size(script: str, size_in_millions: float) -> int:
    """Rows of a group.

    Args:
        script: the published training script, a key of the table.
        size_in_millions: the model's non-embedding parameters.
    """
    return next(rows for largest, rows in _GROUP_SIZES[script] if size_in_millions <= largest)
