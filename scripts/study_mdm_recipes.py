"""Which recipe trains an MDM best at a fixed budget: the bound by recipe, size and seed, and ELBO against cross-entropy.

    python scripts/study_mdm_recipes.py                                    the study: 30 runs, some 80 minutes on two cores
    python scripts/study_mdm_recipes.py --steps 60 --seeds 1 --out quick   a short look at everything

Trains through pretrain/train_mdm.py on the bundled text, at the quickstart's setting and at a size an eighth of it. What is
finished is not done again; after Ctrl-C the same command goes on. The page and its CSV are written anew after every run, in
docs/results, or in --out where another flag makes it another study.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Flags:
    """Flags of the study."""

    out: str = "workdir/mdm_recipes"
    """Folder of the runs."""
    docs: str | None = None
    """Folder of the page; by default docs/results for the whole study, else --out."""
    text: str = str(ROOT / "data" / "tinyshakespeare" / "input.txt")
    """The corpus, one text file; its last tenth is for validation."""
    steps: int = 1200
    """Optimizer steps of the published recipe, of 16 rows of 128 tokens; the others read as many tokens."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Of weights, data order and noise; each gives one run of every recipe and size."""
    recipes: list[str] = field(default_factory=list)
    """Which recipes, such as best,published; all by default."""
    shapes: list[str] = field(default_factory=list)
    """Which sizes, layers x width: 4x128, 2x64; both by default."""


def main() -> None:
    """Train what is missing, write the page after every run."""
    flags = parse(Flags, None, __doc__)
    if flags.steps < 1 or not flags.seeds:
        raise ValueError(f"--steps {flags.steps}, --seeds {flags.seeds}: expected at least 1 step and one seed")

    from lit_gpt.studies.mdm_recipe_study import SHAPES, run_study
    from lit_gpt.studies.mdm_recipes import RECIPES

    for name, known in (("recipes", RECIPES), ("shapes", SHAPES)):
        given = [word for value in getattr(flags, name) for word in value.split(",")]
        if unknown := [word for word in given if word not in known]:
            raise ValueError(f"--{name} {', '.join(unknown)}: expected some of {', '.join(known)}")
        setattr(flags, name, given)
    run_study(flags)


if __name__ == "__main__":
    run(main)
