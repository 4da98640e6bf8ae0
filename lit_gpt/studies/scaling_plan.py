"""The runs of a scaling study: sizes by budgets by kinds, with shape, tokens, steps, batch, learning rate and cost.

Budgets are counted as the published ones, C = 6 N D with N non-embedding parameters and D tokens. Two rules of thumb give
what a size and a budget leave open: the learning rate's is `training.peak_rate`; the batch is the power law through two known
points, this project's quickstart (2.46M tokens, batches of 2048) and the published code (batches of 256 x 2048 tokens).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_gpt.config import SIZES, Config
from lit_gpt.model.flops import forward_flops
from lit_gpt.studies.mdm_recipes import RECIPES, StepBudget
from lit_gpt.studies.scaling_settings import ScalingFlags
from lit_gpt.training import schedule
from lit_gpt.training.peak_rate import ruled_rate


@dataclass(frozen=True)
class TrainedKind:
    """An objective that can be swept."""

    script: str
    """Its training script."""
    causal: bool
    """Whether a token sees only those before it, and all are scored; otherwise it sees all, and half are scored."""
    what: str
    """In words."""
    recipe: str | None = None
    """Key of `mdm_recipes.RECIPES`, where the script takes one."""
    ssl_ratio: float = 0.0
    """Share of the groups with a random length, unless `--kind_flags` says another."""

    def flags(self, budget: StepBudget) -> dict[str, Any]:
        """Of the script, beyond the common ones or instead of them."""
        return {} if self.recipe is None else RECIPES[self.recipe].flags(budget)


SCALING_KINDS = {
    "arm": TrainedKind("pretrain/train_ar.py", True, "next token"),
    "mdm": TrainedKind("pretrain/train_mdm.py", False, "masked diffusion by the published recipe"),
    "mdm_rl": TrainedKind(
        "pretrain/train_mdm_rl.py", False, "masked diffusion with stochastic lengths", ssl_ratio=0.01
    ),
} | {
    f"mdm_{name}": TrainedKind("pretrain/train_mdm.py", False, f"masked diffusion: {recipe.what}", name)
    for name, recipe in RECIPES.items()
    if name != "published"
}
"""By name; a new objective is one line, and every recipe of the MDM is there."""

# The quickstart: tokens, tokens of a step.
_QUICKSTART_TOKENS, _QUICKSTART_STEP = 2.46e6, 2048
# The published 256 x 2048 tokens a step at some 1e10 tokens: 256 times the quickstart's at 4000 times its tokens.
_STEP_EXPONENT = 2 / 3
# Below four sequences a masked model hardly sees two masking rates.
_LEAST_ROWS, _MOST_ROWS = 4, 256


def family_config(size_in_millions: float, block_size: int, vocab_size: int) -> Config:
    """The model of a size: from 6M on a published one, below it the nearest shape that the same rules give.

    The family has an MLP of four times the width and N = 16 layers * width^2; its small members have heads of 64 columns and
    about width / 64 + 2 layers. Below 6M the widths are the multiples of 16, with heads of 64, 32 or 16 columns.

    Raises:
        ValueError: no size is within a quarter of it.
    """
    rest: dict[str, Any] = {"block_size": block_size, "vocab_size": vocab_size}
    family = [Config.from_name(size, **rest) for size in SIZES]
    for width in range(32, 256, 16):
        heads = width // next(head for head in (64, 32, 16) if width % head == 0)
        layers = max(2, round(width / 64) + 2)
        shape = {"n_layer": layers, "n_head": heads, "n_embd": width, "intermediate_size": 4 * width}
        family.append(Config.from_name(6, n_query_groups=heads, **shape, **rest))
    nearest = min(family, key=lambda config: abs(math.log(config.size_in_millions / size_in_millions)))
    if abs(math.log(nearest.size_in_millions / size_in_millions)) > math.log(1.25):
        smaller = ", ".join(f"{config.size_in_millions:.3g}" for config in family if config.size_in_millions < 6)
        raise ValueError(
            f"--sizes {size_in_millions:g}: there are {smaller} and the published {SIZES[0]} to {SIZES[-1]}"
        )
    return nearest


@dataclass(frozen=True)
class PlannedRun:
    """One training run."""

    kind: str
    """Key of SCALING_KINDS."""
    config: Config
    """Of the model."""
    budget: float
    """FLOPs, 6 N D."""
    batch_size: int
    """Sequences of a step."""
    steps: int
    """Optimizer steps."""
    learning_rate: float
    """Peak."""
    mean_length: float
    """Tokens of a sequence that are read: the block, but where lengths are random."""
    rate_factor: float = 1.0
    """Of the learning rate over that of the rule: 1 except where the rule is checked."""

    @property
    def name(self) -> str:
        """Of the run's folder."""
        factor = "" if self.rate_factor == 1 else f"-lr-{self.rate_factor:g}"
        return f"{self.kind}-{self.config.size_in_millions:.3g}M-{self.budget:.3g}{factor}"

    @property
    def tokens(self) -> int:
        """D, the expected one where lengths are random; the rows of finished runs say what was read."""
        return round(self.steps * self.batch_size * self.mean_length)

    @property
    def flops(self) -> float:
        """6 N D of whole steps."""
        return 6.0 * self.config.non_embedding_params * self.tokens

    @property
    def flops_per_token(self) -> float:
        """M, of training: three times the forward pass of the blocks with attention to visible tokens, without the head."""
        return self._forward_flops(0) * 3 / self.config.block_size

    @property
    def computed_flops(self) -> float:
        """What the training computes: the head on the scored positions included. Times follow this number."""
        length = self.config.block_size
        scored = length if SCALING_KINDS[self.kind].causal else length // 2
        return 3.0 * self._forward_flops(scored) * self.tokens / length

    def _forward_flops(self, scored: int) -> int:
        length = self.config.block_size
        pairs = length * (length + 1) // 2 if SCALING_KINDS[self.kind].causal else length * length
        return forward_flops(self.config, length, pairs, scored)

    def script_flags(self, flags: ScalingFlags) -> dict[str, Any]:
        """Of the training script, without the places where things lie."""
        config = self.config
        shape = ("block_size", "n_layer", "n_head", "n_embd", "intermediate_size", "n_query_groups")
        return {
            **{name: getattr(config, name) for name in shape},
            "batch_size": self.batch_size,
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "min_lr": self.learning_rate / 10,
            "warmup_steps": max(1, min(100, self.steps // 10)),
            "val_samples": flags.val_samples,
            "val_draws": flags.val_draws,
            "seed": flags.seed,
            **SCALING_KINDS[self.kind].flags(
                StepBudget(self.steps, self.batch_size, config.block_size, self.learning_rate)
            ),
            **flags.extra_flags(self.kind),
        }


def kind_label(kind: str) -> str:
    """`ARM`, `MDM`, `MDM best`: for tables and figures."""
    name, _, recipe = kind.partition("_")
    return f"{name.upper()} {recipe.replace('_', ' ')}".strip()


def ruled_batch(tokens: float, block_size: int) -> int:
    """Sequences of a step: 2048 tokens in a run of 2.46M, growing as tokens^(2/3); a power of two, 4 to 256."""
    rows = _QUICKSTART_STEP * (tokens / _QUICKSTART_TOKENS) ** _STEP_EXPONENT / block_size
    return min(_MOST_ROWS, max(_LEAST_ROWS, 2 ** round(math.log2(rows))))


def planned_runs(flags: ScalingFlags) -> list[PlannedRun]:
    """All runs, small budgets first, then those that check the learning rate's rule.

    Raises:
        ValueError: an unknown kind or size, or a budget that does not pay for a step.
    """
    unknown = [kind for kind in flags.kinds if kind not in SCALING_KINDS]
    if unknown:
        raise ValueError(f"--kinds {', '.join(unknown)}: choose from {', '.join(SCALING_KINDS)}")
    configs = [family_config(size, flags.block_size, flags.vocab_size) for size in sorted(flags.sizes)]
    budgets = sorted(flags.budgets)
    runs = [_run(flags, kind, config, budget) for budget in budgets for config in configs for kind in flags.kinds]
    middle, budget = configs[(len(configs) - 1) // 2], budgets[(len(budgets) - 1) // 2]
    runs += [_run(flags, kind, middle, budget, factor) for factor in flags.check_factors for kind in flags.kinds]
    if len({run.name for run in runs}) < len(runs):
        raise ValueError("--sizes, --budgets, --kinds or --check_factors name the same run twice")
    return runs


def _run(flags: ScalingFlags, kind: str, config: Config, budget: float, factor: float = 1.0) -> PlannedRun:
    batch_size = ruled_batch(budget / (6 * config.non_embedding_params), config.block_size)
    ratio = SCALING_KINDS[kind].ssl_ratio
    if ratio:
        ratio = float(flags.extra_flags(kind).get("ssl_ratio", ratio))
    length = schedule.mean_random_length(config.block_size, ratio)
    steps = schedule.budget_steps(budget / 1e18, config.size_in_millions, batch_size, length)
    rate = float(f"{ruled_rate(config.non_embedding_params) * factor:.3g}")
    return PlannedRun(kind, config, budget, batch_size, steps, rate, length, factor)


def plan_rows(flags: ScalingFlags, runs: Sequence[PlannedRun], flops_per_s: float, start_s: float) -> list[list[str]]:
    """A table: its heads, then a row for each run, with its number for `--only` first.

    Args:
        flags: of the study.
        runs: the plan.
        flops_per_s: speed in computed FLOPs.
        start_s: seconds of a run beside its steps.
    """
    heads = ["no.", "run", "layers", "width", "N", "tokens", "steps", "batch", "rate", "6ND", "seconds"]
    rows = []
    for number, run in enumerate(runs):
        config, given = run.config, run.script_flags(flags)
        seconds = run.computed_flops / flops_per_s + start_s
        cells = [number, run.name, config.n_layer, config.n_embd, f"{config.size_in_millions:.3g}M"]
        cells += [f"{run.tokens / 1e6:.3g}M", given["max_steps"], given["batch_size"], f"{given['learning_rate']:.2g}"]
        rows.append([str(cell) for cell in [*cells, f"{run.flops:.3g}", f"{seconds:.0f}"]])
    return [heads, *rows]
