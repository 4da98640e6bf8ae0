r"""Pretrain a masked diffusion model (MDM) on packed text.

    python pretrain/train_mdm.py --model 6 --flops 0.001 --data_dir DIR
    lightning run model --node-rank=0 --accelerator=cuda --devices=8 --num-nodes=1 \
        pretrain/train_mdm.py --model 170 --flops 10.

Each sequence gets a time t ~ U(0, 1), each token is masked with probability p = (1 - 0.001) t + 0.001, and the loss is the
sum over masked tokens of CE / p, divided by batch * length. Prints the loss every 10 steps, keeps checkpoints in
workdir/scaling_debug/mdm-<size>M-<flops>, goes on from them when started again, and exports models/mdm-<...>.safetensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run
from lit_gpt.training.settings import MaskedPretrainConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, describe, fit."""
    flags = parse(MaskedPretrainConfig, argv, __doc__)

    from lit_gpt.model.bidirectional import TransEncoder
    from lit_gpt.training.objectives import MaskedDiffusion
    from lit_gpt.training.pretraining import PretrainingRecipe, pretrain
    from lit_gpt.training.schedule import parse_row_lengths

    recipe = PretrainingRecipe(
        group_sizes="train_mdm",
        model_class=TransEncoder,
        objective=lambda config: MaskedDiffusion(
            block_size=config.block_size,
            mask_id=config.mask_id,
            seed=flags.seed,
            global_batch_size=flags.batch_size,
            loss_weight=flags.loss_weight,
            row_lengths=parse_row_lengths(flags.row_lengths),
        ),
    )
    pretrain(recipe, flags)


if __name__ == "__main__":
    run(main)
