r"""Fine-tune a masked diffusion model (MDM) to answer questions (ShareGPT dialogues).

    python sft/finetune_mdm.py --pretrain_path models/mdm-170M-10e18.safetensors \
        --data_file data/sharegpt/dummy_conversation.json --bs 32 --epoch 3                      a look, on a CPU
    lightning run model --node-rank=0 --accelerator=cuda --devices=8 --num-nodes=1 \
        sft/finetune_mdm.py --model 1028 --pretrain_path models/mdm-1028M-1600e18.safetensors --cfg 0.

The first round of each dialogue, in the chat template, up to 2048 tokens. A group is cut to its longest example;
everything behind the prompt, padding included, is masked at rate p; the loss is the sum of CE / p over (rows * longest -
prompt tokens). With --cfg c a prompt becomes [MASK] with probability c, for classifier-free guidance. Checkpoints in
workdir/finetune/mdm-sharegpt-<size>M-cfg=<c>, export models/<the start's name>-sharegpt.safetensors
(-sharegpt-cfg-<c> with dropped prompts).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run
from lit_gpt.training.settings import FinetuneConfig


@dataclass
class Flags(FinetuneConfig):
    """Fine-tuning flags and the share of dropped prompts."""

    cfg: float = 0.0
    """Probability that an example's prompt is masked."""

    def problems(self) -> list[str]:
        """What is impossible about these values, one line each."""
        wrong = [] if 0 <= self.cfg <= 1 else [f"--cfg {self.cfg:g}: expected a probability"]
        return super().problems() + wrong


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, describe, fit."""
    flags = parse(Flags, argv, __doc__)

    from lit_gpt.data.sft_formats import SHAREGPT
    from lit_gpt.training.finetuning import FinetuningRecipe, finetune
    from lit_gpt.training.objectives import MaskedResponse

    recipe = FinetuningRecipe(
        group_sizes="finetune_mdm",
        kind="mdm",
        data_format=SHAREGPT,
        max_length=2048,
        objective=lambda model: MaskedResponse(
            model.config.mask_id, flags.seed, flags.batch_size, prompt_drop=flags.cfg
        ),
        warmup_steps=lambda _: 200,
        run_name=lambda model: f"mdm-sharegpt-{model.config.size_label}M-cfg={flags.cfg}",
        suffix=f"sharegpt-cfg-{flags.cfg:g}" if flags.cfg else "sharegpt",
    )
    finetune(recipe, flags)


if __name__ == "__main__":
    run(main)
