"""The flags of scripts/scaling_laws.py: which runs there are, on which text, and how their losses are fitted.

Plain values and nothing heavy to import, so that `--help` is quick.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lit_gpt.cli import below_least

ACTIONS = ("plan", "sweep", "fit", "plot", "all")
SIZE_MEASURES = ("M", "N")
# `apt-get install dict-gcide`: 40 MB of Webster's dictionary of 1913 and its successors, GPL 2 or later, as gzip.
_INSTALLABLE_TEXT = "/usr/share/dictd/gcide.dict.dz"
_PLANNED = frozenset(
    (
        *("block_size", "n_layer", "n_head", "n_embd", "intermediate_size", "n_query_groups", "model"),
        *(
            "batch_size",
            "max_steps",
            "flops",
            "learning_rate",
            "min_lr",
            "warmup_steps",
            "val_samples",
            "val_draws",
            "seed",
        ),
        *("data_dir", "out_dir", "log_dir", "models_dir", "save_interval", "keep_checkpoints"),
    )
)
"""Flags of the training scripts that the plan decides, or the sweep: what it says of tokens and FLOPs rests on them."""


@dataclass(frozen=True)
class KindFlag:
    """One of `--kind_flags`."""

    kind: str
    """The objective that it is for; empty: all."""
    name: str
    """Of the training script's flag."""
    value: str
    """As it is typed."""

    @classmethod
    def read(cls, text: str) -> KindFlag:
        """From `kind:flag=value` or `flag=value`; the value may hold colons and commas."""
        names, _, value = text.partition("=")
        kind, _, name = names.rpartition(":")
        return cls(kind, name, value)


@dataclass
class ScalingFlags:
    """What the sweep is made of, and how it is fitted."""

    text: str = _INSTALLABLE_TEXT
    """The corpus: a text file, or one packed by gzip (.gz, .dz). The default is Debian's package dict-gcide: 40 MB, GPL."""
    kinds: list[str] = field(default_factory=lambda: ["arm", "mdm", "mdm_best"])
    """Objectives: arm, mdm, mdm_rl, and mdm_NAME for each recipe of docs/results/mdm_recipes.md, such as mdm_best."""
    sizes: list[float] = field(default_factory=lambda: [0.11, 0.3, 0.6, 1.6])
    """Millions of non-embedding parameters: published sizes from 6 on; below it the nearest shape of the family."""
    budgets: list[float] = field(default_factory=lambda: [3.3e11, 1.8e12, 1e13])
    """FLOPs of a run: 6 N D, N non-embedding parameters and D tokens."""
    check_factors: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """The rule for the learning rate is checked at the middle budget and size with these factors; [] checks nothing."""
    block_size: int = 128
    """Tokens of a sequence."""
    vocab_size: int = 1024
    """Pieces of the tokenizer that is trained on the text."""
    kind_flags: list[str] = field(default_factory=list)
    """More flags of the training scripts, for one kind such as mdm:loss_weight=cross_entropy, or for all: compile=off. None
    that the plan decides (shape, batch, steps, rate, seed, validation)."""
    val_samples: int = 256
    """Validation sequences, the same for all runs."""
    val_draws: int = 8
    """Noise draws per validation sequence (masked diffusion only)."""
    seed: int = 3407
    """Decides weights, data order and noise."""
    bootstrap_draws: int = 1000
    """Simulated sweeps behind every interval."""
    huber: float | None = None
    """Threshold of the Huber loss on log residuals; by default 1.345 robust standard deviations of the residuals."""
    size_measure: str = "M"
    """Of the parametric law: M (FLOPs per token of training, attention included) or N (non-embedding parameters)."""
    flops_per_s: float | None = None
    """Speed for the predicted times; by default that of the sweep's finished runs, else of a few timed steps."""
    price_per_hour: float | None = None
    """Of the machine, in any currency."""
    slurm: bool = False
    """sweep: prepare the text and write a Slurm job array instead of training."""
    only: int | None = None
    """sweep: this run of the plan alone, counted from 0."""
    out: str = "workdir/scaling_laws"
    """Folder for everything that is made on the way."""
    docs: str | None = None
    """Folder for the page, CSV, JSON and figures; by default docs/results, or --out where a flag makes it another study."""

    def problems(self) -> list[str]:
        """What is impossible about these values, one line each."""
        least = {"block_size": 2, "vocab_size": 300, "val_samples": 2, "val_draws": 1, "bootstrap_draws": 20, "seed": 0}
        found = below_least(self, least)
        for name in ("sizes", "budgets", "check_factors"):
            found += [f"--{name} {value:g}: more than 0" for value in getattr(self, name) if not value > 0]
        found += [f"--{name} is empty: name some" for name in ("kinds", "sizes", "budgets") if not getattr(self, name)]
        for name in ("huber", "flops_per_s", "price_per_hour"):
            if (value := getattr(self, name)) is not None and not value > 0:
                found.append(f"--{name} {value:g}: more than 0")
        if self.size_measure not in SIZE_MEASURES:
            found.append(f"--size_measure {self.size_measure}: expected {' or '.join(SIZE_MEASURES)}")
        found += [f"--kind_flags {text}: expected kind:flag=value or flag=value"
                  for text in self.kind_flags if "=" not in text]  # fmt: skip
        return found + self._kind_flag_problems()

    def _kind_flag_problems(self) -> list[str]:
        found = []
        for text in self.kind_flags:
            flag = KindFlag.read(text)
            if "=" in text and flag.kind and flag.kind not in self.kinds:
                found.append(f"--kind_flags {text}: {flag.kind} is none of --kinds {', '.join(self.kinds)}")
            if flag.name in _PLANNED:
                found.append(f"--kind_flags {text}: {flag.name} is decided by the plan")
            if flag.name == "ssl_ratio" and not re.fullmatch(r"0?\.\d+|[01](\.0*)?", flag.value):
                found.append(f"--kind_flags {text}: expected a number between 0 and 1")
        return found

    def extra_flags(self, kind: str) -> dict[str, str]:
        """`--kind_flags` of one kind."""
        flags = map(KindFlag.read, self.kind_flags)
        return {flag.name: flag.value for flag in flags if flag.kind in ("", kind)}
