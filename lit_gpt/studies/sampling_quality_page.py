"""The page of quality against speed: every sampler of an MDM beside the ARM of equal loss."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_gpt.files import make_folder, write_file
from lit_gpt.studies.sampler_quality import BATCH_ROWS, PROMPT, SamplerPoint
from lit_gpt.studies.study_pages import markdown_table, with_error, write_csv
from lit_gpt.studies.trained_models import TrainedModel

_CLAIMED_SPEED = 1.4
"""The paper's claim: an MDM matches an ARM with its cache at so many times its speed."""
_LEAST_DIVERSITY = 0.9
"""Of the ARM's distinct pairs and of its entropy: below, a text is good by repeating itself (a choice)."""
_QUALITY_PAGE = """# Quality against speed, at equal loss

Written by {written}. Speeds are of {machine}, float32.

A sampler writes no better than its model, so the models are made equal first, as in the paper: an MDM gets more compute,
and of ARMs of the same shape the one is taken whose loss on the validation text is nearest to the MDM's bound.

{models}

The MDM took {factor:.1f} times the ARM's compute (the paper: 16 times at its sizes). {equality}
{rows} texts of {length} tokens behind {prompt} given ones, in batches of {batch}; "alone" is one text at a time.

## At equal quality

For each temperature of the ARM and each way of sampling the MDM, the fastest setting that is as good: its judged loss is
not above the ARM's by more than one standard error of the difference, and it has at least {least:.0%} of the ARM's distinct
pairs and of its entropy. In brackets how many times as fast as the ARM; every sampler that is not named has no such setting.

{equal}

{verdict}

![The judge's loss against tokens per second](sampling_quality.png)

## All settings

Loss: the judge's, nats per token, ± one standard error. Entropy: of the written tokens' frequencies, nats. Pairs: the share
of distinct ones among all pairs of neighbours.

{points}

## What the caches change

greedy in blocks of 16, 64 steps, temperature 0.8; the same random numbers.

{caches}

## What this shows, and what not

On a CPU a batch of {batch} rows is bound by arithmetic, where an ARM with its cache computes every token once and an MDM the
whole row at every step; the paper's claim is about devices that wait for memory. One text at a time is nearer to that. The
judge is itself a small model of the same text, so small differences of its loss say little.

## The commands

```
{commands}
```
"""


@dataclass(frozen=True)
class QualityStudy:
    """What the page is made from."""

    models: Mapping[str, TrainedModel]
    """`ARM`, `MDM` and `judge`."""
    arm_runs: Mapping[int, float]
    """Losses of all ARMs that were tried, by steps."""
    tolerance: float
    """Nats within which losses count as equal."""
    points: Sequence[SamplerPoint]
    """Real text first, then the ARM's, then the others."""
    caches: Sequence[Mapping[str, Any]]
    """Of `cache_divergence`."""
    sizes: tuple[int, int]
    """Texts of each sampler, and tokens of a text."""

    def problems(self) -> list[str]:
        """Why the models are not what the comparison needs: unequal losses, or a judge that knows no more than they."""
        loss = {name: model.result["val_loss"] for name, model in self.models.items()}
        found = []
        if abs(loss["MDM"] - loss["ARM"]) > self.tolerance:
            difference = f"{loss['MDM'] - loss['ARM']:+.3f}"
            found.append(f"No ARM came within {self.tolerance:g} nats: the MDM's bound differs by {difference}.")
        if loss["judge"] >= loss["ARM"]:
            found.append("The judge is no better than the ARM.")
        return found


def as_good(point: SamplerPoint, arm: SamplerPoint) -> bool:
    """Whether a sampler's texts are as good as the ARM's, and not by repeating themselves."""
    if min(point.pairs / arm.pairs, point.entropy / arm.entropy) < _LEAST_DIVERSITY:
        return False
    return point.loss <= arm.loss + math.hypot(point.error, arm.error)


def fastest_as_good(points: Sequence[SamplerPoint], arm: SamplerPoint) -> list[SamplerPoint]:
    """Of each family but the ARM's the fastest setting that is as good, the fastest first."""
    best: dict[str, SamplerPoint] = {}
    for point in points:
        if point.family not in ("ARM", "real text") and as_good(point, arm):
            known = best.get(point.family)
            if known is None or point.tokens_per_s > known.tokens_per_s:
                best[point.family] = point
    return sorted(best.values(), key=lambda point: -point.tokens_per_s)


def write_quality_page(study: QualityStudy, page: Path, written: str, machine: str, commands: Sequence[str]) -> str:
    """The page, its picture and its CSV; returns the table of equal quality."""
    make_folder(page.parent)
    write_csv(page.with_suffix(".csv"), [asdict(point) for point in study.points])
    _draw_quality(study.points, page.with_suffix(".png"))
    arms = [point for point in study.points if point.family == "ARM"]
    models = study.models
    tried = ", ".join(f"{loss:.3f} ({steps} steps)" for steps, loss in sorted(study.arm_runs.items()))
    problems = study.problems()
    verdict = speed_verdict(study.points, arms[0])
    if problems:
        verdict += " **The models are not what the comparison needs, so this says nothing about the paper's claim.**"
    equal = _equal_table(study.points, arms)
    text = _QUALITY_PAGE.format(
        written=written,
        machine=machine,
        models=_model_table(models),
        factor=models["MDM"].flops / models["ARM"].flops,
        equality=" ".join([*(f"**{problem}**" for problem in problems), f"All ARMs that were tried: {tried}."]),
        rows=study.sizes[0],
        length=study.sizes[1],
        prompt=PROMPT,
        batch=BATCH_ROWS,
        least=_LEAST_DIVERSITY,
        equal=equal,
        verdict=verdict,
        points=_point_table(study.points),
        caches=_cache_table(study.caches),
        commands="\n".join(commands),
    )
    write_file(page, lambda file: file.write(text.encode()))
    return equal


def speed_verdict(points: Sequence[SamplerPoint], arm: SamplerPoint) -> str:
    """Whether an MDM as good as the ARM at temperature 1 is so much faster as the paper claims."""
    good = [point for point in points if point.family not in ("ARM", "real text") and as_good(point, arm)]
    if not good:
        return "No sampler of the MDM writes as well as the ARM at temperature 1, at any number of steps."
    sentences = []
    for what, speed in (
        (f"In batches of {BATCH_ROWS}", lambda point: point.tokens_per_s),
        ("One text at a time", lambda point: point.tokens_per_s_alone),
    ):
        best = max(good, key=speed)
        ratio = speed(best) / speed(arm)
        sentences.append(
            f"{what} the fastest setting that is as good as the ARM at temperature 1 ({best.family}, {best.setting}) has "
            f"{ratio:.2f} times its speed, where the paper claims {_CLAIMED_SPEED} on its GPUs."
        )
    return " ".join(sentences)


def _model_table(models: Mapping[str, TrainedModel]) -> str:
    """What the models are."""
    rows = []
    for name, model in models.items():
        bound = "<= " if model.result["val_is_bound"] else ""
        error = model.result["val_loss_se"]
        loss = bound + with_error(model.result["val_loss"], math.nan if error is None else error)
        flops, config = f"{model.flops:.3g}", model.result["config"]
        shape = f"{config['n_layer']} x {config['n_embd']}"
        rows.append([name, shape, f"{model.result['step']:,}", flops, f"{model.minutes:.1f}", loss])
    heads = ["", "blocks x width", "steps", "FLOPs (6ND)", "minutes of the last start", "loss, nats per token"]
    return markdown_table(heads, rows)


def _equal_table(points: Sequence[SamplerPoint], arms: Sequence[SamplerPoint]) -> str:
    """For each temperature of the ARM the settings that are as good."""
    rows = []
    for arm in arms:
        speeds = [f"{arm.tokens_per_s:,.0f}", f"{arm.tokens_per_s_alone:,.0f}"]
        rows.append([f"ARM, {arm.setting}", *speeds, with_error(arm.loss, arm.error), f"{arm.pairs:.2f}"])
        for point in fastest_as_good(points, arm):
            speeds = [
                f"{own:,.0f} ({own / theirs:.2f})"
                for own, theirs in (
                    (point.tokens_per_s, arm.tokens_per_s),
                    (point.tokens_per_s_alone, arm.tokens_per_s_alone),
                )
            ]
            loss = with_error(point.loss, point.error)
            rows.append([f"- {point.family}, {point.setting}", *speeds, loss, f"{point.pairs:.2f}"])
    return markdown_table(["", "tokens/s", "tokens/s alone", "judged loss", "pairs"], rows)


def _point_table(points: Sequence[SamplerPoint]) -> str:
    """Every setting."""
    rows = []
    for point in points:
        speeds = [f"{one:,.0f}" if one else "" for one in (point.tokens_per_s, point.tokens_per_s_alone)]
        quality = [with_error(point.loss, point.error), f"{point.entropy:.2f}", f"{point.pairs:.2f}"]
        rows.append([point.family, point.setting, *speeds, *quality])
    return markdown_table(["sampler", "setting", "tokens/s", "alone", "judged loss", "entropy", "pairs"], rows)


def _cache_table(caches: Sequence[Mapping[str, Any]]) -> str:
    """Every cache."""
    words = {0: "each block's start", 1: "every step"}
    rows = [
        [
            one["cache"],
            "" if one["cache"] == "none" else words.get(one["refresh"], f"{one['refresh']} steps"),
            f"{one['same']:.0%}",
            f"{one['loss']:.3f}",
        ]
        for one in caches
    ]
    return markdown_table(["cache", "read anew after", "same tokens as without", "judged loss"], rows)


def _draw_quality(points: Sequence[SamplerPoint], path: Path) -> None:
    """The judge's loss against speed, a panel for batches and one for single texts; marks grow with the distinct pairs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: tuple[tuple[str, str], ...] = (
        (f"in batches of {BATCH_ROWS}", "tokens_per_s"),
        ("one text at a time", "tokens_per_s_alone"),
    )
    shown: dict[str, Any] = {}
    for axes, (title, speed) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for number, family in enumerate(dict.fromkeys(point.family for point in points[1:])):
            own = [point for point in points if point.family == family]
            x, y = [getattr(point, speed) for point in own], [point.loss for point in own]
            axes.plot(x, y, "--" if family == "ARM" else "-", color=f"C{number}", alpha=0.5)
            sizes = [10 + 120 * point.pairs for point in own]
            shown[family] = axes.scatter(x, y, s=sizes, color=f"C{number}", label=family)
        shown["real text"] = axes.axhline(points[0].loss, color="gray", linestyle=":", label="real text")
        axes.set(xscale="log", xlabel=f"tokens per second, {title}", ylabel="the judge's loss, nats per token")
        axes.grid(alpha=0.3)
    figure.suptitle("Quality against speed at equal loss; marks grow with the share of distinct pairs")
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, dpi=110)
    write_file(path, lambda file: file.write(content.getvalue()))
