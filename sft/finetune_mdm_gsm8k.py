r"""Fine-tune a masked diffusion model (MDM) on grade-school mathematics (GSM8K).

    python sft/finetune_mdm_gsm8k.py --pretrain_path models/mdm-170M-10e18.safetensors \
        --data_file data/gsm8k/train_no_aug.txt --bs 64 --epoch 3 --max_steps 20                 a look, on a CPU
    lightning run model --node-rank=0 --accelerator=cuda --devices=8 --num-nodes=1 \
        sft/finetune_mdm_gsm8k.py --model 1028 --pretrain_path models/mdm-1028M-3300e18-rsl-0.01-bs-1024.safetensors

Each line `question||thought #### answer` of data/gsm8k/train.txt gives two examples: the thought from the question, and
the answer from both. Rows are padded to 256 tokens; everything behind the prompt, padding included, is masked at rate p;
the loss is the sum of CE / p over (rows * 256 - prompt tokens). Checkpoints in workdir/finetune/mdm-gsm8k-<size>M, export
models/<the start's name>-gsm8k.safetensors, for evaluate_gsm8k.py. Published: 40 epochs of 256.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run
from lit_gpt.training.settings import FinetuneConfig

# Tokens of a padded example, as published.
_ROW_LENGTH = 256


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, describe, fit."""
    flags = parse(FinetuneConfig, argv, __doc__, defaults={"epochs": 40})

    from lit_gpt.data.sft_formats import GSM8K
    from lit_gpt.training.finetuning import FinetuningRecipe, finetune
    from lit_gpt.training.objectives import MaskedResponse

    recipe = FinetuningRecipe(
        group_sizes="finetune_mdm_gsm8k",
        kind="mdm",
        data_format=GSM8K,
        max_length=_ROW_LENGTH,
        objective=lambda model: MaskedResponse(
            model.config.mask_id, flags.seed, flags.batch_size, row_length=min(_ROW_LENGTH, model.config.block_size)
        ),
        warmup_steps=lambda steps: steps // 100,
        run_name=lambda model: f"mdm-gsm8k-{model.config.size_label}M",
        suffix="gsm8k",
    )
    finetune(recipe, flags)


if __name__ == "__main__":
    run(main)
