"""The study of unsupervised guidance: what is measured at each scale, and the page.

The condition is what stands before an answer; guidance reads the answer once behind it and once behind [MASK] in its place
(`model/logits.py`: `guided`). Every scale answers the same questions under the same masks: differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_gpt.checkpoints.loaded import LoadedModel, load_model
from lit_gpt.files import make_folder, parse_json, write_file
from lit_gpt.likelihood.exact import ExactBound
from lit_gpt.likelihood.loglikelihood import LikelihoodRequest, LikelihoodSettings
from lit_gpt.randomness import hash_int
from lit_gpt.studies.context_lengths import even_positions
from lit_gpt.studies.study_pages import (
    FALSE_VERDICTS,
    markdown_table,
    mean_and_error,
    tell_apart,
    with_error,
    write_csv,
)
from lit_gpt.ui.plots import SeriesPanel, plot_series

CHOICES = 4
"""Continuations of a question; as next_line's."""
_GUIDANCE_PAGE = """# Unsupervised guidance

Written by {written}.

One MDM, trained on {tokens:,} tokens of text alone by `train_mdm.py`: no pairs of questions and answers. Its validation bound
is {val_loss:.3f} nats per token. At scale w the logits are un + (w + 1) (cond - un), where `cond` reads the condition and
`un` reads [MASK] in its place; w = 0 is no guidance.

{table}

- next_line: which of four lines comes next, 180 questions of the bundled task, by `evaluate_diff.py`.
- Continuations: which of four pieces of {target} tokens follows {prefix} tokens of the validation text; the wrong ones are from
  elsewhere in it; {questions} questions. Loss: the bound on the true piece given what stands before it.
- LAMBADA: bound on a passage's last word, {passages} passages, by `evaluate_diff.py`.
  Not the kind of text that the model was trained on.

± is one standard error, over the questions. The same as differences to w = 0, question by question:

{paired}

![Accuracy and loss by scale](guidance.png)

## What this shows, and what not

{verdict}

"Better" and "worse" are differences to w = 0 that Student's t over the questions tells from none, by Holm's procedure over all
{comparisons} comparisons of this page: in {false_verdicts:.0%} of such pages without any effect there would be such a word.

A guided model is still a distribution at each position, so its bound is a bound; but nothing in the training made it a good
one. The paper's claim is about models of up to 1.1 billion parameters, this one has {parameters} million.
GSM8K is left out: a model of this text answers none of it.
All numbers: [guidance.csv](guidance.csv).

## The commands

```
{commands}
```
"""

_MEASURED = {
    "lines": "next_line, right",
    "correct": "continuations, right",
    "loss": "continuations, nats per token",
    "words": "LAMBADA, nats per word",
}
_DIFFERENCE = ", difference"
_HIGHER_IS_BETTER = ("lines", "correct")


def continuation_questions(
    ids: Sequence[int], count: int, prefix: int, target: int, seed: int = 0
) -> list[list[LikelihoodRequest]]:
    """Questions made from a text: the true continuation first, then three from elsewhere.

    Args:
        ids: the text's tokens.
        count: of the questions, evenly spread over the text.
        prefix: tokens of a condition.
        target: tokens of a continuation.
        seed: chooses the wrong ones.

    Raises:
        ValueError: the text is too short.
    """
    whole = prefix + target
    if len(ids) < count + 2 * whole:
        raise ValueError(f"the validation text has {len(ids)} tokens, too few for --questions {count}")
    questions = []
    for number, start in enumerate(even_positions(0, len(ids) - whole, count)):
        condition, end = tuple(ids[start : start + prefix]), start + prefix
        # Anywhere that does not touch the true one, going round at the text's end.
        room = len(ids) - target + 1
        begins = [end] + [
            (end + target + hash_int(seed, number, other) % (room - 2 * target)) % room for other in range(CHOICES - 1)
        ]
        questions.append([LikelihoodRequest(condition, tuple(ids[begin : begin + target])) for begin in begins])
    return questions


def answer_questions(
    model: LoadedModel, questions: Sequence[Sequence[LikelihoodRequest]], scale: float, budget: int
) -> dict[str, list[float]]:
    """Loss and verdict of each question at a scale of guidance.

    Returns:
        `loss`, nats per token of the true continuation; `correct`, 1.0 where it is the likeliest of its question.
    """
    requests = [request for question in questions for request in question]
    nll = [0.0] * len(requests)
    settings = LikelihoodSettings(ExactBound(budget), cfg_scale=scale)
    for number, found in model.likelihoods(requests, settings, model.batch_tokens):
        nll[number] = found.nll
    rows = [nll[start : start + CHOICES] for start in range(0, len(nll), CHOICES)]
    return {
        "loss": [row[0] / len(requests[0].target) for row in rows],
        "correct": [float(row[0] == min(row) and row.count(row[0]) == 1) for row in rows],
    }


def measure_guidance(
    path: Path, text: str, scale: float, sizes: tuple[int, int, int], budget: int
) -> dict[str, list[float]]:
    """`answer_questions` of a model on a text; sizes are questions, tokens of a condition, tokens of a continuation."""
    model = load_model(path, kind="mdm", dtype="float32", device="cpu")
    count, prefix, target = sizes
    questions = continuation_questions(model.tokenizer.encode_ids(text), count, prefix, target)
    return answer_questions(model, questions, scale, budget)


def read_harness_samples(folder: Path, task: str, metric: str) -> list[float]:
    """A task's metric for each question, in their order, from the samples that the harness wrote last.

    Args:
        folder: its `--output_path`, with `--log_samples`.
        task: its name.
        metric: as the task names it; a `perplexity` is kept as the log-likelihood of its answer, nats.
    """
    newest = max(folder.rglob(f"samples_{task}_*.jsonl"), key=lambda path: path.stat().st_mtime)
    samples = [parse_json(line) for line in newest.read_text(encoding="utf-8").splitlines()]
    return [float(one[metric]) for one in sorted(samples, key=lambda one: int(one["doc_id"]))]


def write_guidance_page(
    found: Mapping[float, Mapping[str, Any]], page: Path, facts: Mapping[str, Any], commands: Sequence[str]
) -> str:
    """The page, its picture and its CSV.

    Args:
        found: by scale, 0 the first: for each question `answer_questions`' values, next_line's `lines` (1.0 is right), and
            LAMBADA's `words` (nats).
        page: where to; the others lie beside it.
        facts: what else the page says: written, tokens, val_loss, parameters, prefix, target, passages.
        commands: the training and an evaluation.

    Returns:
        The table.
    """
    make_folder(page.parent)
    measured = {scale: _measured(one, found[0.0]) for scale, one in found.items()}
    rows = [
        {"scale": scale, "quantity": name, "value": f"{value:.6g}", "standard_error": f"{error:.3g}"}
        for scale, one in measured.items()
        for name, (value, error) in one.items()
    ]
    cells = [
        [f"{scale:g}", *(with_error(*one[name]) for name in _MEASURED.values())] for scale, one in measured.items()
    ]
    paired = [
        [f"{scale:g}", *(with_error(*one[name + _DIFFERENCE], 3, True) for name in _MEASURED.values())]
        for scale, one in measured.items()
        if scale
    ]
    write_csv(page.with_suffix(".csv"), rows)
    titles = list(_MEASURED.values())
    names = {"share of right answers": titles[:2], "nats": titles[2:3]}
    panels = [
        SeriesPanel("scale of guidance", label, {name: _points(rows, name) for name in series})
        for label, series in names.items()
    ]
    plot_series(panels, "Unsupervised guidance", page.with_suffix(".png"))
    heads = ["w", *_MEASURED.values()]
    table = markdown_table(heads, cells)
    text = _GUIDANCE_PAGE.format(
        **facts,
        table=table,
        questions=len(found[0.0]["loss"]),
        paired=markdown_table(heads, paired),
        verdict=guidance_verdict(found),
        comparisons=len(_MEASURED) * (len(found) - 1),
        false_verdicts=FALSE_VERDICTS,
        commands="\n".join(commands),
    )
    write_file(page, lambda file: file.write(text.encode()))
    return table


def _measured(one: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Values, and differences to no guidance, at a scale, with their standard errors, by their titles."""
    found = {}
    for name, title in _MEASURED.items():
        pairs = zip(one[name], plain[name], strict=True)
        found[title] = mean_and_error(one[name])
        found[title + _DIFFERENCE] = mean_and_error([value - other for value, other in pairs])
    return found


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float, float]]:
    """Scale, value and standard error of a quantity."""
    return [
        (row["scale"], float(row["value"]), float(row["standard_error"])) for row in rows if row["quantity"] == name
    ]


def guidance_verdict(found: Mapping[float, Mapping[str, Any]]) -> str:
    """What the differences to no guidance say, of all quantities and scales together."""
    compared = [(name, scale) for name in _MEASURED for scale in found if scale]
    differences = {}
    for name, scale in compared:
        difference, error = _measured(found[scale], found[0.0])[_MEASURED[name] + _DIFFERENCE]
        differences[name, scale] = difference, error, len(found[scale][name]) - 1
    told = dict(zip(compared, tell_apart(list(differences.values())), strict=True))
    sentences = []
    for name, title in _MEASURED.items():
        scales: dict[str, list[str]] = {"better": [], "worse": []}
        for scale in found:
            if told.get((name, scale)):
                is_better = (differences[name, scale][0] > 0) == (name in _HIGHER_IS_BETTER)
                scales["better" if is_better else "worse"].append(f"{scale:g}")
        said = [f"{word} at w = {', '.join(those)}" for word, those in scales.items() if those]
        sentences.append(f"- {title}: {' and '.join(said) or 'no effect that can be told from none'}.")
    return "\n".join(sentences)
