r"""Fine-tune an autoregressive model (ARM) to answer questions (ShareGPT dialogues).

    python sft/finetune_ar.py --pretrain_path models/ar-170M-10e18.safetensors \
        --data_file data/sharegpt/dummy_conversation.json --bs 32 --epoch 3                      a look, on a CPU
    lightning run model --node-rank=0 --accelerator=cuda --devices=8 --num-nodes=1 \
        sft/finetune_ar.py --model 1028 --pretrain_path models/ar-1028M-100e18.safetensors

The first round of each dialogue, in the chat template, up to 2048 tokens; the loss is the mean cross-entropy over the
answer's tokens, its end token included. Checkpoints in workdir/finetune/arm-sharegpt-<size>M, export
models/<the start's name>-sharegpt.safetensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run
from lit_gpt.training.settings import FinetuneConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, describe, fit."""
    flags = parse(FinetuneConfig, argv, __doc__)

    from lit_gpt.data.sft_formats import SHAREGPT
    from lit_gpt.training.finetuning import FinetuningRecipe, finetune
    from lit_gpt.training.objectives import NextResponseToken

    recipe = FinetuningRecipe(
        group_sizes="finetune_ar",
        kind="arm",
        data_format=SHAREGPT,
        max_length=2048,
        objective=lambda _: NextResponseToken(),
        warmup_steps=lambda _: 200,
        run_name=lambda model: f"arm-sharegpt-{model.config.size_label}M",
        suffix="sharegpt",
    )
    finetune(recipe, flags)


if __name__ == "__main__":
    run(main)
