"""Say what a pretraining run will take before it is started: steps, tokens, time, memory of a GPU, file sizes, price.

    python scripts/plan_run.py --model 1028 --flops 1600 --gpus 16 --gpu h100
    python scripts/plan_run.py --model 170 --flops 10 --gpus 8 --gpu a100 --kind arm --mfu 0.35 --price_per_gpu_hour 2

Steps and tokens are what training will print. Memory is an estimate from above for a run without torch.compile, with the
largest micro batch that fits; the time is that of the model's FLOPs at the share --mfu of the GPUs' peak.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run
from lit_gpt.training.settings import LARGEST_BATCH


@dataclass
class Flags:
    """What is planned."""

    model: str = ""
    """Size in millions of non-embedding parameters, such as 1028. Required."""
    flops: float = 0.0
    """Compute budget in units of 1e18 FLOPs. Required."""
    gpus: int = 8
    """GPUs, over all machines."""
    gpu: str = "h100"
    """Their kind: a100-40, a100, h100, h200, b200, l40s, a6000, 4090."""
    gpus_per_node: int = 8
    """GPUs of a machine."""
    kind: str = "mdm"
    """mdm or arm."""
    batch_size: int = 256
    """Sequences of one optimizer step, over all GPUs."""
    ssl_ratio: float = 0.0
    """Share of groups with a random length (train_mdm_rl.py)."""
    block_size: int = 2048
    """Context length in tokens."""
    vocab_size: int = 32000
    """Pieces of the tokenizer."""
    precision: str = "bf16-mixed"
    """bf16-mixed or bf16-true."""
    mfu: float = 0.4
    """Share of the GPUs' peak that training reaches."""
    price_per_gpu_hour: float | None = None
    """Price of a GPU for an hour, in any currency."""

    def problems(self) -> list[str]:
        """What is impossible about these values, one line each."""
        found = [] if self.model else ["--model is missing: a size in millions, such as --model 1028"]
        found += [] if self.flops > 0 else ["--flops is missing: a budget in 1e18 FLOPs, such as --flops 1600"]
        found += [f"--{name} {getattr(self, name)}: at least 1" for name in ("gpus", "gpus_per_node", "batch_size")
                  if getattr(self, name) < 1]  # fmt: skip
        if self.batch_size > LARGEST_BATCH:
            found.append(f"--batch_size {self.batch_size}: at most {LARGEST_BATCH}")
        if not found and self.batch_size % self.gpus:
            found.append(f"--batch_size {self.batch_size} does not split over {self.gpus} GPUs")
        if not found and self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            found.append(f"--gpus {self.gpus}: expected whole machines of {self.gpus_per_node} (--gpus_per_node)")
        if not 0 < self.mfu <= 1:
            found.append(f"--mfu {self.mfu:g}: expected more than 0 and at most 1")
        if not 0 <= self.ssl_ratio <= 1:
            found.append(f"--ssl_ratio {self.ssl_ratio:g}: expected between 0 and 1")
        if (self.price_per_gpu_hour or 0) < 0:
            found.append(f"--price_per_gpu_hour {self.price_per_gpu_hour:g}: expected 0 or more")
        choices = {"kind": ("mdm", "arm"), "precision": ("bf16-mixed", "bf16-true")}
        found += [f"--{name} {getattr(self, name)}: choose from {', '.join(allowed)}" for name, allowed in choices.items()
                  if getattr(self, name) not in allowed]  # fmt: skip
        return found


def main() -> None:
    """Parse, plan, print."""
    flags = parse(Flags, None, __doc__)
    if problems := flags.problems():
        raise ValueError("; ".join(problems))

    from lit_gpt.config import Config
    from lit_gpt.model.bidirectional import TransEncoder
    from lit_gpt.model.causal import GPT
    from lit_gpt.training.run_plan import GPU_KINDS, PretrainingPlan

    if flags.gpu not in GPU_KINDS:
        raise ValueError(f"--gpu {flags.gpu}: choose from {', '.join(GPU_KINDS)}")
    plan = PretrainingPlan.of_budget(
        flags.flops,
        Config.from_name(flags.model, block_size=flags.block_size, vocab_size=flags.vocab_size),
        flags.batch_size,
        flags.ssl_ratio,
        model_class=GPT if flags.kind == "arm" else TransEncoder,
        gpus=flags.gpus,
        gpus_per_node=flags.gpus_per_node,
        gpu=GPU_KINDS[flags.gpu],
        precision=flags.precision,
    )
    for line in plan.lines(flags.mfu, flags.price_per_gpu_hour):
        print(line)


if __name__ == "__main__":
    run(main)
