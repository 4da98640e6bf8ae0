r"""Pretrain an autoregressive model (ARM) on packed text.

    python pretrain/train_ar.py --model 6 --flops 0.001 --data_dir DIR
    lightning run model --node-rank=0 --accelerator=cuda --devices=8 --num-nodes=1 \
        pretrain/train_ar.py --model 1028 --flops 100.

It learns to predict the next token: mean cross-entropy. Prints the loss every 10 steps, keeps checkpoints in
workdir/scaling_debug/arm-<size>M-<flops>, goes on from them when started again, and exports models/ar-<...>.safetensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run
from lit_gpt.training.settings import PretrainConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, describe, fit."""
    flags = parse(PretrainConfig, argv, __doc__)

    from lit_gpt.model.causal import GPT
    from lit_gpt.training.objectives import NextToken
    from lit_gpt.training.pretraining import PretrainingRecipe, pretrain

    recipe = PretrainingRecipe(
        group_sizes="train_ar",
        model_class=GPT,
        objective=lambda config: NextToken(block_size=config.block_size),
    )
    pretrain(recipe, flags)


if __name__ == "__main__":
    run(main)
