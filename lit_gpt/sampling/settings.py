"""How to sample, as plain values: the one description that flags, the page and the library share. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

ALGORITHM_NAMES = ("origin", "greedy", "threshold", "entropy")
CACHES = ("none", "prefix", "dual")


@dataclass(frozen=True)
class Sampling:
    """How to sample. Fields that only one kind of model has a use for say so."""

    context_length: int | tuple[int, ...]
    """Tokens of the finished row, prompt included; a tuple gives each row its own."""
    algorithm: str = "origin"
    """MDM: origin, greedy (also spelt greddy), threshold or entropy."""
    steps: int = 128
    """MDM: denoising steps, for threshold and entropy at most; more steps than masked positions is normal use."""
    temperature: float = 1.0
    """0 takes the likeliest token; 1 samples from the model's distribution."""
    cfg_scale: float = 0.0
    """MDM: classifier-free guidance; 0 is none."""
    seed: int = 1234
    """Together with a row's number it decides all that is random."""
    stop_id: int | None = None
    """The end token (the tokenizer's eos): an ARM's row ends with it, an MDM's with early_stop."""
    use_cache: bool = True
    """ARM: keep keys and values instead of reading the whole row again for each token; the tokens are the same."""
    top_k: int = 0
    """Draw only from the k likeliest tokens; 0 from all."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together reach this probability."""
    min_new_tokens: int = 0
    """No end token among the first so many new ones."""
    threshold: float = 0.9
    """MDM, threshold: reveal every token with at least this confidence."""
    entropy_bound: float = 0.1
    """MDM, entropy: nats that the tokens of one step may share; higher is faster and less careful."""
    block_length: int = 0
    """MDM: write blocks of so many tokens from left to right, each in its share of the steps; 0 is one block."""
    cache: str = "none"
    """MDM, with block_length: keep keys and values of what a block's steps do not change: none, prefix or dual."""
    refresh: int = 0
    """MDM, with cache: read everything again after so many steps; 0 only at each block's start, 1 is exact."""
    remask: float = 0.0
    """MDM, origin: largest share of written tokens that a step masks again, to be written better (ReMDM-cap)."""
    early_stop: bool = False
    """MDM: once the end token stands with nothing masked before it, the row is done: end tokens fill the rest."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "algorithm", algorithm_name(self.algorithm))
        problems = []
        if self.steps < 1:
            problems.append(f"steps is {self.steps}: at least 1 is needed")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature is {self.temperature}: it must be a number from 0 up")
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale >= 0):
            problems.append(f"cfg_scale is {self.cfg_scale}: it must be a number from 0 up")
        for name, low, high in (("threshold", 0, 1), ("top_p", 0, 1), ("remask", 0, 1), ("entropy_bound", 0, math.inf)):
            if not low <= getattr(self, name) <= high:
                problems.append(f"{name} is {getattr(self, name)}: it must be a number from {low} to {high}")
        for name in ("top_k", "min_new_tokens", "block_length", "refresh"):
            if getattr(self, name) < 0:
                problems.append(f"{name} is {getattr(self, name)}: it must be a whole number from 0 up")
        if self.cache not in CACHES:
            problems.append(f"cache is {self.cache!r}: choose from {', '.join(CACHES)}")
        elif self.cache != "none" and not self.block_length:
            problems.append(f"cache {self.cache} needs a block_length")
        if self.remask and self.algorithm != "origin":
            problems.append(f"remask goes with the algorithm origin, not {self.algorithm}")
        if self.early_stop and self.stop_id is None:
            problems.append("early_stop needs a stop_id")
        if problems:
            raise ValueError("sampling: " + "; ".join(problems))


_HISTORIC_NAMES = {"greddy": "greedy"}


def algorithm_name(name: str) -> str:
    """The algorithm's one name: the published spelling `greddy` becomes `greedy`.

    Raises:
        ValueError: no such algorithm; the known ones are listed.
    """
    name = _HISTORIC_NAMES.get(name, name)
    if name not in ALGORITHM_NAMES:
        raise ValueError(f"unknown sampling algorithm {name!r}: choose from {', '.join(ALGORITHM_NAMES)}")
    return name
