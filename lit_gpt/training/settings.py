"""The settings of a training run, as flags: every field is a flag of the training scripts, its docstring the help text.

Plain dataclasses and nothing heavy to import, so that `--help` is quick.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from lit_gpt.cli import below_least
from lit_gpt.tokenizer import SPECIAL_TOKENS
from lit_gpt.training import skipped_steps
from lit_gpt.training.schedule import MOST_STEPS, parse_row_lengths

STRATEGIES = ("auto", "ddp", "fsdp", "hybrid")
SHAPE_FLAGS = ("block_size", "n_layer", "n_head", "n_embd", "intermediate_size", "n_query_groups")
LARGEST_BATCH = 1 << 20
"""Sequences of one optimizer step. All divisors of a device's are tried; no run comes near."""
_MOST_EPOCHS = 10**6
_RUN_NAME = re.compile(r"[\w=+][\w.=+-]{0,99}")
# A file's name has at most 255 bytes of UTF-8, endings such as that of an unfinished export's included.
_LONGEST_NAME_BYTES = 200
PRECISIONS = ("auto", "bf16-mixed", "bf16-true", "32-true")


@dataclass
class TrainConfig:
    """What every training script can be told, whatever it trains."""

    # Flags that change no number, or whose effect a run's other settings hold already.
    NOT_SETTINGS: ClassVar[frozenset[str]] = frozenset({
        "name", "max_steps", "warmup_steps", "accelerator", "devices", "nodes_num", "strategy", "precision", "compile",
        "attention_kernel", "micro_batch_size", "activation_checkpointing", "log_interval", "save_interval",
        "keep_checkpoints", "val_interval", "val_samples", "val_draws", "logger", "log_dir", "models_dir", "resume",
        "overwrite", "skip_steps", "shard_checkpoints_gb",
    })  # fmt: skip

    name: str | None = None
    """The run's name: of its folder, its log's folder and its exported model. By default they follow from size and budget."""
    batch_size: int = 256
    """Sequences of one optimizer step, over all devices and nodes."""
    micro_batch_size: int | None = None
    """Sequences a device computes at once; by default the largest that fits. Changes speed and memory, not the result."""
    max_steps: int | None = None
    """Optimizer steps, instead of those that the budget or the epochs give. More than a finished run of the same name has
    extend it."""
    learning_rate: float = 2e-4
    """Peak learning rate (the published code's; the paper's text says 4e-4)."""
    min_lr: float = 2e-5
    """Last learning rate of the cosine (the paper's text says 4e-5)."""
    warmup_steps: int | None = None
    """Steps of linear warmup; by default 1 % of the steps, at least 100."""
    weight_decay: float = 0.1
    """AdamW's weight decay, on all parameters."""
    beta1: float = 0.9
    """AdamW's first decay rate."""
    beta2: float = 0.95
    """AdamW's second decay rate."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    seed: int = 3407
    """Decides weights, data order and noise."""

    skip_steps: list[str] = field(default_factory=list)
    """Steps whose data is passed over without an update, such as 5123 or 5120-5130, several as 7,5120-5130: after a loss that
    is not finite. The run keeps them in mind: they need not be given again."""

    accelerator: str = "auto"
    """auto, cpu or cuda."""
    devices: str = "auto"
    """How many devices of this machine: auto means every GPU, or one CPU process."""
    nodes_num: int = 1
    """Machines; must equal the launcher's count."""
    strategy: str = "auto"
    """With several devices: ddp (a model each), fsdp (FSDP2: shards of one), or hybrid (FSDP2 within each machine, copies
    across). auto: ddp, and fsdp from 1e9 parameters on, embedding and head included."""
    precision: str = "auto"
    """auto (bf16-mixed where the hardware supports it, else 32-true), bf16-mixed, bf16-true or 32-true. There is no 16-mixed:
    the loss computes its own gradient, and scaled for float16 that overflows."""
    compile: str = "auto"
    """Fuse kernels with torch.compile: on, off, or auto (on for runs of 200 steps or more of rows of one length)."""
    attention_kernel: str = "auto"
    """torch, flash_attn, xformers, torch_flash or torch_cudnn (torch's own by name), or auto: on GPUs in bf16 the fastest of
    those that are there, timed at the start at the run's shape. A resumed run may then choose another one, and its numbers
    differ in the last bits: name one to prevent that."""
    activation_checkpointing: bool | str = False
    """Recompute activations in the backward pass: true all of them (less memory, a third more time), selective all but what
    matrix products and attention give, false none."""

    log_interval: int = 10
    """Steps between two lines of the log."""
    save_interval: int = 5000
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """How many checkpoints of a run are kept beside the final one (of an extended run, each end's); 0 keeps all."""
    shard_checkpoints_gb: float = 10.0
    """Checkpoints of more GB than this (12 bytes a parameter, optimizer included) are folders, of which each process writes
    its part while training goes on; smaller ones are single files, for which training waits."""
    val_interval: int = 0
    """Steps between two validations; 0 validates at the end only."""
    val_samples: int = 512
    """At most this many sequences are validated on."""
    val_draws: int = 8
    """Noise draws per validation sequence (masked diffusion only); the published code takes 128 (hours on a CPU)."""
    logger: list[str] = field(default_factory=lambda: ["csv"])
    """csv (always on), tensorboard, wandb; several as [csv,tensorboard]."""
    log_dir: str = "out"
    """Metrics go to <log_dir>/Diff_LLaMA_<size>M/version_<n>/metrics.csv, or with a --name to <log_dir>/<name>/version_<n>."""
    models_dir: str = "models"
    """The finished model is exported here as .safetensors."""
    resume: str = "auto"
    """auto (the run's newest complete checkpoint, if any), never, or a checkpoint's path."""
    overwrite: bool = False
    """Allow the export to replace another run's file of the same name, or that of this run with fewer steps where the run has
    no --name, and --resume never to replace a run."""

    def settings(self) -> dict[str, Any]:
        """The flags that change numbers, for the run's record."""
        return {name: value for name, value in asdict(self).items() if name not in self.NOT_SETTINGS}

    def problems(self) -> list[str]:
        """What is impossible about these values, one line each."""
        least = {"batch_size": 1, "log_interval": 1, "save_interval": 1, "keep_checkpoints": 0, "val_interval": 0}
        least |= {"val_samples": 0, "val_draws": 1, "nodes_num": 1, "seed": 0}
        found = below_least(self, least)
        if self.name is not None and not _RUN_NAME.fullmatch(self.name):
            found.append(
                f"--name {self.name!r}: expected at most 100 letters, digits and . _ = + -, not beginning with . or -"
            )
        elif self.name is not None and (length := len(self.name.encode())) > _LONGEST_NAME_BYTES:
            found.append(
                f"--name {self.name}: {length} bytes in a file's name, at most {_LONGEST_NAME_BYTES}: shorten it"
            )
        for name in ("micro_batch_size", "max_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                found.append(f"--{name} {value}: at least 1")
        most = {"batch_size": LARGEST_BATCH, "max_steps": MOST_STEPS}
        found += [f"--{name} {value}: at most {high}" for name, high in most.items()
                  if (value := getattr(self, name)) is not None and value > high]  # fmt: skip
        try:
            skipped_steps.parse_ranges(self.skip_steps)
        except ValueError as error:
            found.append(str(error))
        if not 0 <= self.shard_checkpoints_gb < float("inf"):
            found.append(f"--shard_checkpoints_gb {self.shard_checkpoints_gb:g}: at least 0")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            found.append(f"--warmup_steps {self.warmup_steps}: at least 0")
        if not 0 <= self.min_lr <= self.learning_rate:
            found.append(
                f"--min_lr {self.min_lr:g} and --learning_rate {self.learning_rate:g}: expected 0 <= min_lr <= learning_rate"
            )
        choices = {
            "compile": ("auto", "on", "off"),
            "strategy": STRATEGIES,
            "precision": PRECISIONS,
            "activation_checkpointing": (False, True, "selective"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                found.append(f"--{name} {getattr(self, name)}: expected {', '.join(map(str, allowed)).lower()}")
        return found


@dataclass
class PretrainConfig(TrainConfig):
    """What the pretraining scripts can be told besides."""

    NOT_SETTINGS = TrainConfig.NOT_SETTINGS | {
        *("model", *SHAPE_FLAGS, "vocab_size", "tokenizer", "data_dir", "data_weights", "out_dir", "init_from", "flops")
    }

    model: str = ""
    """Size in millions of non-embedding parameters: 6, 19, 34 ... 2121, or a full name such as Diff_LLaMA_170M. This, or a
    shape of your own by --n_layer and --n_embd, is required; beside it, shape flags change that size's numbers."""
    flops: float | None = None
    """Compute budget in units of 1e18 FLOPs, which decides the number of steps. This or --max_steps is required."""
    data_dir: str = "/dataset/slim_star_combined"
    """Folder of packed .bin files: train_slim*, train_star*, validation*."""
    data_weights: dict[str, float] = field(default_factory=lambda: {"train_slim": 1.0, "train_star": 0.0})
    """File prefixes and their weights in the mixture; a set with weight 0 need not exist."""
    out_dir: str = "workdir/scaling_debug"
    """The run's folder, with its checkpoints, is made in here."""
    tokenizer: str | None = None
    """Tokenizer folder or hub name, recorded in the checkpoint and used for bits per byte; by default the data's own record."""
    init_from: str | None = None
    """Start from a checkpoint's weights (an ARM's will do for an MDM) instead of random ones."""
    vocab_size: int | None = None
    """Pieces of the tokenizer; by default the data's own record says it, else 32000."""
    block_size: int | None = None
    """Context length in tokens; 2048 by default."""
    n_layer: int | None = None
    """Layers, for a shape of your own."""
    n_head: int | None = None
    """Heads; without --model by default of 64, above a width of 1024 of 128."""
    n_embd: int | None = None
    """Width, for a shape of your own."""
    intermediate_size: int | None = None
    """MLP width; without --model by default four times --n_embd."""
    n_query_groups: int | None = None
    """Key/value heads; without --model by default as many as heads."""


@dataclass
class MaskedPretrainConfig(PretrainConfig):
    """What `train_mdm.py` can be told besides; the defaults are the published recipe."""

    LOSS_WEIGHTS: ClassVar[tuple[str, ...]] = ("elbo", "cross_entropy")

    loss_weight: str = "elbo"
    """elbo (CE / p over masked tokens: the bound, published) or cross_entropy (the mean CE of masked tokens: not a bound, and
    less noisy). Validation is the bound in both cases."""
    row_lengths: list[str] = field(default_factory=list)
    """Short rows first: LENGTH:STEP, several as 16:300,32:600 (up to step 300 every row is read as rows of 16 tokens, then of
    32 up to step 600, then whole). Each length divides --block_size; tokens and FLOPs of a step stay."""

    def settings(self) -> dict[str, Any]:
        """As for any run; the published values are left out, as runs from before these flags have none."""
        settings = super().settings()
        if self.loss_weight == "elbo":
            del settings["loss_weight"]
        settings["row_lengths"] = [list(pair) for pair in parse_row_lengths(self.row_lengths)]
        if not self.row_lengths:
            del settings["row_lengths"]
        return settings

    def problems(self) -> list[str]:
        """What is impossible about these values, one line each."""
        found = super().problems()
        if self.loss_weight not in self.LOSS_WEIGHTS:
            found.append(f"--loss_weight {self.loss_weight}: expected {', '.join(self.LOSS_WEIGHTS)}")
        try:
            pairs = parse_row_lengths(self.row_lengths)
        except ValueError as error:
            return [*found, str(error)]
        block_size = self.block_size or 2048
        found += [
            f"--row_lengths {length}:{step}: does not divide rows of {block_size} tokens (--block_size)"
            for length, step in pairs
            if block_size % length
        ]
        return found


@dataclass
class FinetuneConfig(TrainConfig):
    """What the fine-tuning scripts can be told besides."""

    NOT_SETTINGS = TrainConfig.NOT_SETTINGS | {
        *("pretrain_path", "model", "data_file", "tokenizer", "out_dir", "cache_dir", "workers", "max_malformed"),
        *("epochs", "special_tokens"),
    }
    ALIASES: ClassVar[dict[str, str]] = {"bs": "batch_size", "epoch": "epochs"}

    pretrain_path: str = ""
    """The checkpoint to start from: `.safetensors`, `.pth`, or a run folder. Required."""
    model: str | None = None
    """Its size in millions, for a checkpoint that does not say."""
    epochs: float = 3
    """How often the data is gone through (--epoch)."""
    data_file: str | None = None
    """The examples; by default where the published script looks."""
    out_dir: str = "workdir/finetune"
    """The run's folder, with its checkpoints, is made in here."""
    tokenizer: str | None = None
    """Tokenizer folder or hub name; by default the checkpoint's own."""
    special_tokens: str = "ids"
    """What </s>, <s> and <unk> inside a text become: their ids (published), or text, the characters that they are."""
    max_malformed: float = 0.05
    """Largest share of malformed records; more are refused, fewer left out and counted."""
    workers: int = 4
    """Processes that tokenize the data, the first time."""
    cache_dir: str | None = None
    """Where prepared examples are kept (~/.cache/smdm/sft)."""

    def problems(self) -> list[str]:
        """What is impossible about these values, one line each."""
        found = super().problems()
        if not self.epochs > 0:
            found.append(f"--epoch {self.epochs:g}: more than 0")
        if self.epochs > _MOST_EPOCHS:
            found.append(f"--epoch {self.epochs:g}: at most {_MOST_EPOCHS}")
        if not 0 <= self.max_malformed <= 1:
            found.append(f"--max_malformed {self.max_malformed:g}: expected between 0 and 1")
        if self.workers < 1:
            found.append(f"--workers {self.workers}: at least 1")
        if self.special_tokens not in SPECIAL_TOKENS:
            found.append(f"--special_tokens {self.special_tokens}: expected {', '.join(SPECIAL_TOKENS)}")
        return found
