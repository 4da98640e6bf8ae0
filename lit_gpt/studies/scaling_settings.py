"""The flags of scripts/scaling_laws.py: which runs there are, on which text, and how their losses are fitted.

Plain values and nothing heavy to import, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ACTIONS = ("plan", "sweep", "fit", "plot", "all")
SIZE_MEASURES = ("M", "N")
# `apt-get install dict-gcide`: 40 MB of Webster's dictionary of 1913 and its successors, GPL 2 or later, as gzip.
_INSTALLABLE_TEXT = "/usr/share/dictd/gcide.dict.dz"


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
    """More flags of the training scripts, for one kind such as mdm:loss_weight=cross_entropy, or for all: compile=off."""
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
        found = [f"--{name} {getattr(self, name)}: at least {low}" for name, low in least.items()
                 if getattr(self, name) < low]  # fmt: skip
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
        return found
