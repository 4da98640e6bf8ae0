"""What speed costs in quality: every sampler's text, judged by an ARM that wrote none of it.

    python scripts/quickstart.py && python scripts/quickstart.py --seed 1 --out quickstart-judge
    python benchmarks/sampling_quality.py --plot docs/results/sampling_quality.png > docs/results/sampling_quality.md

Prints Markdown: for the quickstart's ARM with its cache and for each MDM sampler, tokens per second, the text's perplexity
under the judge (generative perplexity: lower is better, and cheap to have by repeating oneself), and its diversity (the
share of distinct pairs of neighbouring tokens among all pairs; real text is in the table, too). About 5 minutes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run
from lit_gpt.evaluation.result_pages import changed_flags, check_page

if TYPE_CHECKING:
    from lit_gpt.model.layers import Transformer

PROMPT = 8
FASTER = 1.4  # the paper's claim: an MDM matches a cached ARM at so many times its speed


@dataclass
class Flags:
    """What is compared."""

    folder: str = "quickstart"
    """The quickstart's folder: both models, the tokenizer and the validation text."""
    judge: str = "quickstart-judge"
    """Another quickstart's folder, whose ARM judges."""
    rows: int = 64
    """Texts of each sampler."""
    context: int = 128
    """Tokens of a text, 8 of them given."""
    plot: str | None = None
    """Draw quality against speed into this PNG."""


@dataclass(frozen=True)
class Point:
    """One sampler's result."""

    family: str
    name: str
    tokens_per_s: float
    perplexity: float
    diversity: float


def main() -> None:
    """Sample, judge, print."""
    flags = parse(Flags, None, __doc__)
    if flags.plot:
        check_page("plot", Path(flags.plot), not changed_flags(flags, but=("plot",)))
    from lit_gpt.checkpoints.loaded import load_model
    from lit_gpt.tokenizer import Tokenizer

    models = {}
    for name, folder, kind in (
        ("arm", flags.folder, "arm"),
        ("mdm", flags.folder, "mdm"),
        ("judge", flags.judge, "arm"),
    ):
        files = sorted(Path(folder, kind, "model").glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"no model in {Path(folder, kind, 'model')}: run scripts/quickstart.py --out {folder}"
            )
        models[name] = load_model(files[0], kind=kind, device="cpu").model
    ids = Tokenizer(Path(flags.folder) / "tokenizer").encode_ids(
        (Path(flags.folder) / "text" / "validation.txt").read_text()
    )
    starts = [n * (len(ids) - flags.context) // flags.rows for n in range(flags.rows)]
    real = [ids[start : start + flags.context] for start in starts]
    prompts = [row[:PROMPT] for row in real]
    points = [Point("real text", "validation", math.nan, *judged(models["judge"], real))]
    for family, name, settings in samplers():
        model = models["arm" if family == "ARM" else "mdm"]
        points.append(measure(family, name, model, real, models["judge"], settings))
        print(f"{family} {name}", file=sys.stderr, flush=True)
    report(points, flags)
    print_divergence(models["mdm"], models["judge"], prompts, flags.context)


def print_divergence(mdm: Transformer, judge: Transformer, prompts: list[list[int]], context: int) -> None:
    """How far the block caches lead from the same sampler without them: same random numbers, tokens compared."""
    from lit_gpt.sampling.sample import sample
    from lit_gpt.sampling.settings import Sampling

    settings: dict[str, Any] = {"algorithm": "greedy", "steps": 64, "temperature": 0.7, "block_length": 16}

    def write(**more: Any) -> list[list[int]]:
        return [row.tolist() for row in sample(mdm, prompts, Sampling(**settings, **more), context)]

    exact = write()
    print("\n## What the caches change\n\ngreedy in blocks of 16, 64 steps, temperature 0.7.\n")
    print(
        "| cache | read anew after | same tokens as without | perplexity under the judge |\n| --- | --- | --- | --- |"
    )
    print(f"| none | | 100 % | {judged(judge, exact)[0]:.1f} |")
    for cache in ("prefix", "dual"):
        for refresh, words in ((0, "each block's start"), (4, "4 steps"), (1, "every step")):
            texts = write(cache=cache, refresh=refresh)
            pairs = [pair for one, two in zip(exact, texts, strict=True) for pair in zip(one, two, strict=True)][
                PROMPT:
            ]
            same = sum(a == b for a, b in pairs) / len(pairs)
            print(f"| {cache} | {words} | {same:.0%} | {judged(judge, texts)[0]:.1f} |")


def samplers() -> list[tuple[str, str, dict[str, Any]]]:
    """(family, name, settings) of everything that is compared."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    for temperature in (1.0, 0.8, 0.6):
        found.append(("ARM", f"cache, temperature {temperature}", {"temperature": temperature}))
    for steps in (8, 16, 32, 64, 128):
        found.append(("origin", f"{steps} steps", {"steps": steps}))
        found.append(("origin, temperature 0.7", f"{steps} steps", {"steps": steps, "temperature": 0.7}))
        found.append(("greedy", f"{steps} steps", {"algorithm": "greedy", "steps": steps}))
        blocks = {"algorithm": "origin", "steps": steps, "block_length": 16, "temperature": 0.7}
        found.append(("blocks of 16, dual cache", f"{steps} steps", {**blocks, "cache": "dual"}))
        found.append(("remask 0.05", f"{steps} steps", {"steps": steps, "remask": 0.05, "temperature": 0.7}))
    for least in (0.2, 0.4, 0.6, 0.9):
        found.append(("threshold", f"{least}", {"algorithm": "threshold", "threshold": least, "temperature": 0.7}))
    for bound in (1.0, 4.0, 16.0):
        found.append(("entropy", f"{bound}", {"algorithm": "entropy", "entropy_bound": bound, "temperature": 0.7}))
    return found


def measure(
    family: str,
    name: str,
    model: Transformer,
    real: Sequence[Sequence[int]],
    judge: Transformer,
    settings: dict[str, Any],
) -> Point:
    """Write as many and as long texts as the real ones behind their first tokens, in batches of 16, and judge them."""
    from lit_gpt.sampling.sample import sample
    from lit_gpt.sampling.settings import Sampling

    how, context, prompts = Sampling(**settings), len(real[0]), [row[:PROMPT] for row in real]
    sample(model, prompts[:1], how, context)
    started = time.perf_counter()
    texts: list[list[int]] = []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        texts += [row.tolist() for row in sample(model, part, how, context, rows=range(start, start + len(part)))]
    elapsed = time.perf_counter() - started
    new_tokens = sum(len(text) - PROMPT for text in texts)
    return Point(family, name, new_tokens / elapsed, *judged(judge, texts))


def judged(judge: Transformer, texts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Perplexity of what follows the prompts under the judge, and the share of distinct pairs of neighbours."""
    from lit_gpt.likelihood.loglikelihood import LikelihoodRequest, arm_likelihoods
    from lit_gpt.likelihood.scoring import ScoringModel

    requests = [LikelihoodRequest(tuple(text[:PROMPT]), tuple(text[PROMPT:])) for text in texts]
    nll = sum(result.nll for _, result in arm_likelihoods(ScoringModel.of(judge, 8192), requests))
    pairs = [pair for text in texts for pair in zip(text[PROMPT:], text[PROMPT + 1 :], strict=False)]
    return math.exp(nll / sum(len(request.target) for request in requests)), len(set(pairs)) / len(pairs)


def report(points: list[Point], flags: Flags) -> None:
    """The table, the verdict on the paper's claim, the plot."""
    print("# Quality against speed\n")
    print(f"{flags.rows} texts of {flags.context} tokens behind {PROMPT} given ones, in batches of 16.\n")
    print(
        "| sampler | setting | tokens/s | perplexity under the judge | distinct pairs |\n| --- | --- | --- | --- | --- |"
    )
    for point in points:
        speed = "" if math.isnan(point.tokens_per_s) else f"{point.tokens_per_s:.0f}"
        print(f"| {point.family} | {point.name} | {speed} | {point.perplexity:.1f} | {point.diversity:.2f} |")
    arm = next(point for point in points if point.family == "ARM")
    fast = [p for p in points[1:] if p.family != "ARM" and p.tokens_per_s >= FASTER * arm.tokens_per_s]
    equal = [p for p in fast if p.perplexity <= arm.perplexity and p.diversity >= 0.9 * arm.diversity]
    print(
        f"\nMDM samplers at least {FASTER} times as fast as the ARM at temperature 1: {len(fast)}; of these as good in "
    )
    names = ", ".join(f"{p.family} {p.name}" for p in equal)
    print(f"perplexity at no less than 0.9 of its diversity: {names or 'none'}.")
    if flags.plot:
        draw(points, Path(flags.plot))


def draw(points: list[Point], path: Path) -> None:
    """Perplexity against tokens per second; the size of a mark is its diversity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for number, family in enumerate(dict.fromkeys(point.family for point in points[1:])):
        own = [point for point in points if point.family == family]
        x, y = [p.tokens_per_s for p in own], [p.perplexity for p in own]
        axes.plot(x, y, "-" if family != "ARM" else "--", color=f"C{number}", alpha=0.6)
        axes.scatter(x, y, s=[10 + 120 * p.diversity for p in own], color=f"C{number}", label=family)
    axes.axhline(points[0].perplexity, color="gray", linestyle=":", label="real text")
    axes.set(xscale="log", yscale="log", xlabel="tokens per second", ylabel="perplexity under an independent ARM")
    axes.set_title("Quality against speed; marks grow with diversity")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)
