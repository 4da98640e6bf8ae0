r"""Fine-tune a masked diffusion model (MDM), or an ARM beside it, on facts told in one order (the reversal curse).

    python sft/finetune_mdm_reverse.py --pretrain_path models/mdm-170M-10e18.safetensors
    lightning run model --node-rank=0 --accelerator=cuda --devices=8 --num-nodes=1 \
        sft/finetune_mdm_reverse.py --model 1028 --pretrain_path models/mdm-1028M-1600e18.safetensors

Each line of data/reverse_experiments/june_version_7921032488/all_prompts_train.jsonl (from
github.com/lukasberglund/reversal_curse) is a prompt and its completion; nothing is given, everything is masked at rate p.
A group is cut to its longest text; the loss is the sum of CE / p over (rows * longest). An ARM's checkpoint is trained
on the mean cross-entropy of the next token instead. Checkpoints in workdir/reverse/{mdm,arm}-reverse-<size>M, export
models/<the start's name>-reverse.safetensors, for evaluate_reverse.py.
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
    defaults = {"epochs": 10, "batch_size": 64, "out_dir": "workdir/reverse"}
    flags = parse(FinetuneConfig, argv, __doc__, defaults=defaults)

    from lit_gpt.data.sft_formats import REVERSE
    from lit_gpt.training.finetuning import FinetuningRecipe, finetune
    from lit_gpt.training.objectives import MaskedResponse, NextResponseToken

    masked = {"seed": flags.seed, "global_batch_size": flags.batch_size}
    recipe = FinetuningRecipe(
        group_sizes="finetune_mdm_reverse",
        kind=None,
        data_format=REVERSE,
        max_length=2048,
        objective=lambda model: (
            NextResponseToken() if model.kind == "arm" else MaskedResponse(model.config.mask_id, **masked)
        ),
        warmup_steps=lambda _: 200,
        run_name=lambda model: f"{model.kind}-reverse-{model.config.size_label}M",
        suffix="reverse",
    )
    finetune(recipe, flags)


if __name__ == "__main__":
    run(main)
