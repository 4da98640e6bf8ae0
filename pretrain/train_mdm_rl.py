r"""Pretrain a masked diffusion model (MDM) with stochastic sequence length.

    python pretrain/train_mdm_rl.py --model 6 --flops 0.001 --ssl_ratio 0.01 --data_dir DIR
    lightning run model --node-rank=0 --accelerator=cuda --devices=8 --num-nodes=1 \
        pretrain/train_mdm_rl.py --model 170 --flops 60. --ssl_ratio 0.01

As `train_mdm.py`, but a share `ssl_ratio` of the groups is cut to a random length, uniform in [1, 2048], so that the model
also reads short texts. Checkpoints in workdir/scaling_debug/mdm-<size>M-<flops>-ssl-<ratio>, export
models/mdm-<...>-rsl-<ratio>.safetensors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run
from lit_gpt.training.settings import PretrainConfig


@dataclass
class Flags(PretrainConfig):
    """Pretraining flags and the share of random lengths."""

    ssl_ratio: float = 0.01
    """Share of the groups that are cut to a random length."""

    def problems(self) -> list[str]:
        """What is impossible about these values, one line each."""
        wrong = [] if 0 <= self.ssl_ratio <= 1 else [f"--ssl_ratio {self.ssl_ratio:g}: expected between 0 and 1"]
        return super().problems() + wrong


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, describe, fit."""
    flags = parse(Flags, argv, __doc__)

    from lit_gpt.model.bidirectional import TransEncoder
    from lit_gpt.training.objectives import MaskedDiffusion
    from lit_gpt.training.pretraining import PretrainingRecipe, pretrain

    recipe = PretrainingRecipe(
        group_sizes="train_mdm_rl",
        model_class=TransEncoder,
        objective=lambda config: MaskedDiffusion(
            block_size=config.block_size,
            mask_id=config.mask_id,
            seed=flags.seed,
            global_batch_size=flags.batch_size,
            ssl_ratio=flags.ssl_ratio,
        ),
        ssl_ratio=flags.ssl_ratio,
    )
    pretrain(recipe, flags)


if __name__ == "__main__":
    run(main)
