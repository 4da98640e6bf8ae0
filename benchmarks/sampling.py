"""How fast samplers write, against the published loop.

    python benchmarks/sampling.py > docs/results/sampling.md         about 10 minutes on 2 idle cores

Prints Markdown: tokens per second at sizes 6 and 19 (untrained, published vocabulary) of the plain loop
(`sampling_baseline.py`) and of each of our samplers at equal settings, batch, context and steps; then of those that have
no published counterpart, and of an ARM with its cache. All in turn, round after round, each side in a process of its own;
a ratio is the median over rounds of (plain time / own time).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import OwnProcess, print_table
from lit_gpt.cli import parse, run

# What is promised over the plain loop, by temperature.
LEAST = {0.0: 4.0, 1.0: 2.5}
PROMPT = 16


@dataclass
class Flags:
    """What is measured."""

    sizes: str = "6,19"
    """Model sizes in millions."""
    batch: int = 4
    """Rows."""
    context: int = 128
    """Tokens of a finished row, 16 of them the prompt."""
    steps: int = 64
    """Denoising steps."""
    rounds: int = 3
    """Rounds."""


@dataclass(frozen=True)
class Way:
    """One way of sampling."""

    name: str
    settings: tuple[tuple[str, Any], ...]
    """Fields of `Sampling`, or `plain` for the baseline with algorithm and temperature."""

    def get(self, name: str, default: Any = None) -> Any:
        return dict(self.settings).get(name, default)


def ways(flags: Flags) -> list[Way]:
    """The plain loop and ours, paired by algorithm and temperature, then what has no counterpart."""
    found = []
    for algorithm in ("greedy", "origin"):
        for temperature in (0.0, 1.0):
            own = (("algorithm", algorithm), ("temperature", temperature))
            found += [Way("plain", (*own, ("plain", True))), Way("ours", own)]
            if not temperature:
                found.append(Way("plain, without noise", (*own, ("plain", True), ("shortcut", True))))
    greedy, blocks = (("algorithm", "greedy"), ("temperature", 0.0)), (("block_length", 16),)
    found += [
        Way("top-p 0.9", (("algorithm", "greedy"), ("temperature", 1.0), ("top_p", 0.9))),
        Way("threshold 0.9", (("algorithm", "threshold"), ("temperature", 0.0))),
        Way("entropy 1.0", (("algorithm", "entropy"), ("temperature", 0.0), ("entropy_bound", 1.0))),
        Way("remask 0.1", (("algorithm", "origin"), ("temperature", 1.0), ("remask", 0.1))),
        Way("blocks of 16", (*greedy, *blocks)),
        Way("blocks, prefix cache", (*greedy, *blocks, ("cache", "prefix"))),
        Way("blocks, dual cache", (*greedy, *blocks, ("cache", "dual"))),
        Way("ARM, cache", (("arm", True), ("temperature", 0.0))),
        Way("ARM, no cache", (("arm", True), ("temperature", 0.0), ("use_cache", False))),
    ]
    return found


def timed_batches(size: int, flags: Flags, plain: bool) -> Callable[[Way], float]:
    """One side, as a function from a way of sampling to the seconds of a batch; the plain one keeps torch's own settings."""
    import torch

    from benchmarks import sampling_baseline
    from lit_gpt.devices import keep_freed_memory
    from lit_gpt.model.bidirectional import TransEncoder
    from lit_gpt.model.causal import GPT
    from lit_gpt.sampling.sample import sample
    from lit_gpt.sampling.settings import Sampling

    if not plain:
        keep_freed_memory()
    models = [model.from_name(size).eval() for model in ((TransEncoder,) if plain else (TransEncoder, GPT))]
    for model in models:
        model.init_weights(1)
    prompt = torch.randint(3, 32000, (flags.batch, PROMPT), generator=torch.Generator().manual_seed(1))

    def run(way: Way) -> float:
        start = time.perf_counter()
        if plain:
            greedy = way.get("algorithm") == "greedy"
            shape, temperature = (flags.context, flags.steps), way.get("temperature")
            sampling_baseline.sample(models[0], prompt, shape, temperature, greedy, way.get("shortcut", False))
        else:
            settings = {name: value for name, value in way.settings if name != "arm"}
            how = Sampling(steps=flags.steps, **settings)
            sample(models[1 if way.get("arm") else 0], prompt.tolist(), how, flags.context)
        return time.perf_counter() - start

    return run


def main() -> None:
    """Measure and print."""
    flags = parse(Flags, None, __doc__)
    import torch

    print("# Sampling speed\n")
    print(
        f"{flags.batch} rows of {flags.context} tokens, {PROMPT} of them given, {flags.steps} steps, float32, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {flags.rounds} rounds. Weights are untrained: "
        "threshold and entropy then reveal little at a time, as far as the steps allow.\n"
    )
    new_tokens = flags.batch * (flags.context - PROMPT)
    for size in map(int, flags.sizes.split(",")):
        measure(size, flags, new_tokens)


def measure(size: int, flags: Flags, new_tokens: int) -> None:
    """One size's table."""
    sides = {plain: OwnProcess(timed_batches, size, flags, plain) for plain in (True, False)}
    every = ways(flags)
    times: dict[Way, list[float]] = {way: [] for way in every}
    for number in range(flags.rounds + 1):
        for way in every:
            seconds = sides[bool(way.get("plain"))].run(way)
            if number:  # the first round warms up
                times[way].append(seconds)
        print(f"size {size}: round {number} of {flags.rounds}", file=sys.stderr, flush=True)
    print(f"## Size {size}\n")
    body = []
    plain: list[float] = []
    for way in every:
        own = times[way]
        cells = [f"{way.get('algorithm', '')} {way.name}".strip(), f"{way.get('temperature'):g}"]
        cells.append(f"{new_tokens / statistics.median(own):.0f}")
        if way.get("shortcut"):
            cells += [f"{statistics.median(slow / fast for slow, fast in zip(plain, own, strict=True)):.1f}", ""]
        elif way.get("plain"):
            plain = own
            cells += ["1.0", ""]
        elif way.name == "ours":
            ratio = statistics.median(slow / fast for slow, fast in zip(plain, own, strict=True))
            least = LEAST[way.get("temperature")]
            cells += [f"{ratio:.1f}", f"at least {least:g}: {'met' if ratio >= least else '**missed**'}"]
        else:
            cells += ["", ""]
        body.append(cells)
    print_table(["sampler", "temperature", "tokens/s", "times the plain loop", ""], body)
    print()


if __name__ == "__main__":
    run(main)
