"""The study of stochastic lengths: what is measured on each model, and the page.

All differences are to the models that were trained on rows of one length, on the same tokens under the same masks and with
the same seed: the standard error beside them is that of the text, with the seeds' own differences; what the verdict says
holds over the text and over runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.config import Config
from lit_gpt.files import make_folder, write_file
from lit_gpt.studies.study_pages import (
    FALSE_VERDICTS,
    markdown_table,
    mean_and_error,
    tell_apart,
    with_error,
    write_csv,
)
from lit_gpt.studies.trained_models import TrainedModel
from lit_gpt.ui.plots import SeriesPanel, plot_series

_LENGTH_PAGE = """# What stochastic lengths are for

Written by {written}.

The models have {parameters} parameters (embeddings apart) and a context of {longest} tokens; {seeds} of each kind, at the same
compute of {flops:.3g} FLOPs. "{plain}" is `train_mdm.py`, which reads rows of {longest} tokens only; the others are
`train_mdm_rl.py`, which cuts that share of its steps to a random length, and so takes more of them: {steps}.
Minutes of training on the machine as it was: {minutes}.

## Loss by length

The validation text ({blocks} rows of {longest} tokens) in pieces of so many tokens; the bound, nats per token, lower is
better. Short pieces are harder for every model, since less is known; what counts is the difference to the first column,
± one standard error over the text; in brackets the difference for each seed.

{losses}

## The next token

{positions} tokens of the validation text, each predicted as the last one of a row of so many tokens: how often the likeliest
token is right. "{padded}" is how the published evaluation reads short texts with a model of one length
(`padding=True`): behind the text stand [MASK]s up to {longest} tokens.

{accuracies}

Nats of the same predictions:

{next_nll}

![Differences by length](stochastic_lengths.png)

## What this shows, and what not

{verdict}

"Better" and "worse" are differences that Student's t tells from none. Their error is that of the text and of the runs (the
spread over seeds, {freedom} degrees of freedom) together; by Holm's procedure over all {comparisons} comparisons, in
{false_verdicts:.0%} of such pages without any effect there would be such a word. A few seeds find large effects only.

The paper's models read 2,048 tokens, its tasks have a few dozen, and its share of random lengths is 0.01. Here the ratio
of the lengths is at most {ratio:.0f}, the models are a thousand times smaller, and a share of 0.01 is {cut} steps.
All numbers: [stochastic_lengths.csv](stochastic_lengths.csv).

## The commands

```
{commands}
```
"""

_JUDGED = {"loss": (-1, "loss"), "correct": (1, "accuracy of the next token")}
"""Quantities of a verdict: the sign of what is better, and their names."""


@dataclass(frozen=True)
class LengthStudy:
    """What the page is made from."""

    lengths: Sequence[int]
    trained: Mapping[str, Sequence[TrainedModel]]
    """By kind, one for each seed."""
    measured: Mapping[str, Sequence[Mapping[str, Any]]]
    """By kind and seed the results of `measure_lengths`."""
    plain: str
    """The kind that all others are compared with."""
    padded: str
    """The same models, reading rows that are filled up."""


def measure_lengths(
    path: Path, text: str, lengths: Sequence[int], sizes: tuple[int, int, int], padded: bool
) -> dict[str, Any]:
    """Losses and next-token predictions of an MDM on a text, by length.

    Args:
        path: the model.
        text: the validation text.
        lengths: of the rows; the last one is the model's own.
        sizes: blocks, forward passes for a piece of one, and next tokens.
        padded: also predict the next tokens in rows that are filled up with [MASK].

    Returns:
        `as it is`: by name a list for each length: `loss` (of each block), `nll` and `correct` (of each next token); and
        where asked for `padded`, without the losses.

    Raises:
        ValueError: the text is too short.
    """
    from lit_gpt.checkpoints.loaded import load_model
    from lit_gpt.studies.context_lengths import block_losses, even_positions, next_token_scores

    blocks, budget, count = sizes
    model, longest = load_model(path, kind="mdm", dtype="float32", device="cpu"), lengths[-1]
    ids = model.tokenizer.encode_ids(text)
    if len(ids) < (blocks + 1) * longest or len(ids) < longest + count:
        raise ValueError(
            f"the validation text has {len(ids)} tokens, too few for --blocks {blocks} or --positions {count}"
        )
    starts = even_positions(0, len(ids) - longest, blocks)
    rows = [ids[start : start + longest] for start in starts]
    positions = even_positions(longest - 1, len(ids), count)
    scores = [next_token_scores(model, ids, positions, length) for length in lengths]
    found = {
        "as it is": {
            "loss": [block_losses(model, rows, length, budget) for length in lengths],
            "nll": [one.nll for one in scores],
            "correct": [one.correct for one in scores],
        }
    }
    if padded:
        scores = [next_token_scores(model, ids, positions, length, longest) for length in lengths]
        found["padded"] = {"nll": [one.nll for one in scores], "correct": [one.correct for one in scores]}
    return found


@dataclass(frozen=True)
class _Difference:
    """A kind of model against the plain one, at one length."""

    mean: float
    """Of the kind itself, over text and seeds."""
    difference: float
    error: float
    """Standard error of the difference over the text."""
    by_seed: list[float]


def _compare(study: LengthStudy, kind: str, name: str, index: int) -> _Difference:
    """One measured quantity of a kind at one length."""
    own = [[float(value) for value in one[name][index]] for one in study.measured[kind]]
    plain = [[float(value) for value in one[name][index]] for one in study.measured[study.plain]]
    by_seed = [
        [value - other for value, other in zip(values, others, strict=True)]
        for values, others in zip(own, plain, strict=True)
    ]
    difference, error = mean_and_error([sum(column) / len(own) for column in zip(*by_seed, strict=True)])
    mean = sum(map(sum, own)) / sum(map(len, own))
    return _Difference(mean, difference, error, [sum(values) / len(values) for values in by_seed])


def _length_table(study: LengthStudy, kinds: Sequence[str], name: str) -> str:
    """Rows by length: the plain models' mean, and each other kind's with its difference."""
    percent = name == "correct"
    scale, digits = (100, 1) if percent else (1, 3)
    rows = []
    for index, length in enumerate(study.lengths):
        cells = [f"{scale * _compare(study, study.plain, name, index).mean:.{digits}f}"]
        for kind in kinds:
            one = _compare(study, kind, name, index)
            seeds = ", ".join(f"{scale * value:+.{digits}f}" for value in one.by_seed)
            difference = with_error(scale * one.difference, scale * one.error, digits, sign=True)
            cells.append(f"{scale * one.mean:.{digits}f}: {difference} ({seeds})")
        rows.append([str(length), *cells])
    return markdown_table(["tokens", f"{study.plain}{', %' if percent else ''}", *kinds], rows)


def verdict(study: LengthStudy, kind: str) -> str:
    """What the measured differences of a kind say, in a sentence or two."""
    if len(study.measured[study.plain]) < 2:
        return f"{kind}, against {study.plain} - not tested: one run of each does not say how much runs differ."
    told, parts = _told_apart(study), []
    for name, (better, what) in _JUDGED.items():
        found = {True: [], False: []}  # type: dict[bool, list[str]]
        for index, length in enumerate(study.lengths):
            if told[kind, name, index]:
                found[_compare(study, kind, name, index).difference * better > 0].append(str(length))
        said = [
            f"{word} at {', '.join(found[good])} tokens"
            for good, word in ((True, "better"), (False, "worse"))
            if found[good]
        ]
        parts.append(f"{what}: {' and '.join(said) or 'no difference that can be told from none at any length'}")
    return f"{kind}, against {study.plain} - {'; '.join(parts)}."


def _told_apart(study: LengthStudy) -> dict[tuple[str, str, int], bool]:
    """By kind, quantity and number of a length, whether the difference to the plain models is not 0.

    The error is that of the text and of the runs together, with the degrees of freedom of the runs, which are fewer.
    """
    kinds = [kind for kind in study.measured if kind not in (study.plain, study.padded)]
    keys = [(kind, name, index) for kind in kinds for name in _JUDGED for index in range(len(study.lengths))]
    differences = []
    for key in keys:
        one = _compare(study, *key)
        _, of_runs = mean_and_error(one.by_seed)
        differences.append((one.difference, math.hypot(one.error, of_runs), len(one.by_seed) - 1))
    return dict(zip(keys, tell_apart(differences), strict=True))


def write_length_page(study: LengthStudy, page: Path, written: str, commands: Sequence[str]) -> str:
    """The page, its picture and its CSV.

    Args:
        study: the results.
        page: where to; the others lie beside it.
        written: by which command, when.
        commands: of the trainings, one of each kind.

    Returns:
        The table of losses.
    """
    kinds = [kind for kind in study.trained if kind != study.plain]
    padded = [*kinds, study.padded]
    make_folder(page.parent)
    write_csv(page.with_suffix(".csv"), _length_rows(study))
    panels = [
        SeriesPanel("tokens of a row", label, _differences(study, names, name), log_base=2)
        for label, name, names in (
            ("nats per token, difference to one length", "loss", kinds),
            ("next token right, difference", "correct", padded),
        )
    ]
    plot_series(panels, "Reading short rows, against models of one length", page.with_suffix(".png"))
    models = [model for one in study.trained.values() for model in one]
    first, losses = models[0].result, _length_table(study, kinds, "loss")
    measured = study.measured[study.plain][0]
    text = _LENGTH_PAGE.format(
        written=written,
        parameters=f"{Config.from_dict(first['config']).size_in_millions:.3g}M",
        seeds=len(study.trained[study.plain]),
        flops=models[0].flops,
        plain=study.plain,
        padded=study.padded,
        longest=study.lengths[-1],
        steps=", ".join(f"{one[0].result['step']:,} ({kind})" for kind, one in study.trained.items()),
        minutes=", ".join(f"{model.minutes:.1f}" for model in models),
        blocks=len(measured["loss"][0]),
        losses=losses,
        positions=len(measured["nll"][0]),
        accuracies=_length_table(study, padded, "correct"),
        next_nll=_length_table(study, padded, "nll"),
        verdict="\n".join(f"- {verdict(study, kind)}" for kind in kinds),
        freedom=len(study.trained[study.plain]) - 1,
        comparisons=len(_told_apart(study)),
        false_verdicts=FALSE_VERDICTS,
        ratio=study.lengths[-1] / study.lengths[0],
        cut=f"about {0.01 * first['step']:.0f}",
        commands="\n".join(commands),
    )
    write_file(page, lambda file: file.write(text.encode()))
    return losses


def _differences(study: LengthStudy, kinds: Sequence[str], name: str) -> dict[str, list[tuple[float, float, float]]]:
    """By kind: length, difference to the plain models, standard error."""
    found = {}
    for kind in kinds:
        compared = [_compare(study, kind, name, index) for index in range(len(study.lengths))]
        points = zip(study.lengths, compared, strict=True)
        found[kind] = [(float(length), one.difference, one.error) for length, one in points]
    return found


def _length_rows(study: LengthStudy) -> list[dict[str, Any]]:
    """One row of the CSV for each kind, seed, length and quantity."""
    rows = []
    for kind, results in study.measured.items():
        for seed, result in enumerate(results, 1):
            for name, by_length in result.items():
                for length, values in zip(study.lengths, by_length, strict=True):
                    mean, error = mean_and_error([float(value) for value in values])
                    rows.append({"kind": kind, "seed": seed, "quantity": name, "tokens": length, "count": len(values),
                                 "mean": f"{mean:.6g}", "standard_error": f"{error:.3g}"})  # fmt: skip
    return rows
