"""How fast and how sure likelihoods are, against the published procedure.

    python benchmarks/likelihood.py --ckpt quickstart/mdm/model/mdm-1.05M-1.55e13-bs-16.safetensors \
        --plot docs/results/likelihood.png > docs/results/likelihood.md           about 15 minutes on 2 idle cores

Prints Markdown. Requests are the answers of the bundled next_line task, cut to a length, and LAMBADA's last words. The
plain side (`likelihood_baseline.py`, in a process of its own) takes one request at a time, 16 copies of it as a batch, and
all logits. Errors are those of a trained model: standard deviations over independent draws. Times alternate between the two
sides; a ratio is the median over rounds. `size 6` is an untrained model with the published vocabulary.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import OwnProcess, print_table
from benchmarks.likelihood_published import Rounds, in_both_dtypes, print_dtypes, shared_contexts
from lit_gpt.cli import parse, run
from lit_gpt.evaluation.result_pages import changed_flags, check_page

if TYPE_CHECKING:
    from lit_gpt.likelihood.loglikelihood import Likelihood, LikelihoodRequest, LikelihoodSettings
    from lit_gpt.model.layers import Transformer

ROOT = Path(__file__).resolve().parents[1]
MC_DRAWS = 128
MAX_TOKENS = 8192
SHORT, LONG = range(1, 7), (7, 10, 14, 20, 28, 40)
BUDGETS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 128)


@dataclass
class Flags:
    """What is measured."""

    ckpt: str = "quickstart/mdm/model/mdm-1.05M-1.55e13-bs-16.safetensors"
    """A trained MDM, with its tokenizer on record."""
    plot: str | None = None
    """Draw standard error against passes into this PNG."""
    draws: int = 16
    """Independent estimates from which a standard deviation is taken."""
    rounds: int = 5
    """Rounds of each timing."""
    questions: int = 8
    """Questions whose four answers are scored in a timing."""
    speed_only: bool = False
    """Leave out the tables of variances and errors."""
    processor_time: bool = False
    """For a machine that others use: one thread, and only the time in which it ran counts."""
    only: str | None = None
    """`dtypes`: only the published procedures in both dtypes and an ARM's shared contexts; `exact`: only the time to an
    equal standard error."""


def main() -> None:
    """Measure and print."""
    flags = parse(Flags, None, __doc__)
    if flags.plot:
        check_page("plot", Path(flags.plot), not changed_flags(flags, but=("plot",)))
    import torch

    from benchmarks.likelihood_baseline import build_model, timed_requests
    from lit_gpt.checkpoints.loaded import load_model

    if flags.only not in (None, "dtypes", "exact"):
        raise ValueError(f"--only {flags.only}: choose dtypes or exact")
    loaded = load_model(flags.ckpt, kind="mdm", device="cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
    if flags.processor_time:
        torch.set_num_threads(1)
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32, {flags.draws} draws per deviation.\n"
    )
    questions = next_line_ids(tokenizer, flags.questions)
    if flags.only != "exact":
        both_dtypes(flags, questions)
    if flags.only == "dtypes":
        return
    plain = OwnProcess(timed_requests, flags.ckpt, flags.processor_time)
    speed_at_equal_error(plain, model, questions, flags)
    if flags.only == "exact":
        return
    print("\n## Published procedures, the same values\n")
    sets = {f"chain_rule, {length} tokens": cut(questions, length) for length in (2, 4, 10)}
    sets["LAMBADA, chain_rule and greedy check"] = last_words(tokenizer, 4 * flags.questions)
    rows = []
    for name, path in (("trained 1M", flags.ckpt), ("size 6", "size 6")):
        side, own = OwnProcess(timed_requests, path, flags.processor_time), build_model(path)
        rows += [same_values([name, what], side, own, requests, clocked(flags)) for what, requests in sets.items()]
    print_table(["model", "what", "plain, ms per request", "ours, ms", "times as fast", "largest difference"], rows)
    if flags.speed_only:
        return
    variance_at_equal_passes(model, questions, flags)
    errors_by_passes(model, questions, flags)


def both_dtypes(flags: Flags, questions: list[tuple[list[int], list[list[int]]]]) -> None:
    """mc and chain_rule in float32 and bfloat16 against the plain loop, then an ARM's multiple choice."""
    from benchmarks.likelihood_baseline import build_model, timed_requests

    print("## Published procedures in bfloat16\n")
    # As PIQA's: contexts and answers of about 20 tokens. mc is slow enough for a request in four.
    sets = {"mc, 128 draws": cut(questions, 20, 20)[::4], "chain_rule, 20 tokens": cut(questions, 20, 20)}
    rows, lines = [], []
    for name, path in (("trained 1M", flags.ckpt), ("size 6", "size 6")):
        side = OwnProcess(timed_requests, path, flags.processor_time)
        found, verdicts = in_both_dtypes(side, [name], build_model(path), sets, clocked(flags))
        rows += found
        lines = verdicts
        side.close()
    print_dtypes(rows)
    print("\n" + "\n".join(f"Size 6, {line}" for line in lines))
    print("\n## An ARM's multiple choice, size 6, four answers\n")
    shared_contexts(questions, clocked(flags))
    print()


def clocked(flags: Flags) -> Rounds:
    """The rounds of a timing, and its clock."""
    return Rounds(flags.rounds, time.process_time if flags.processor_time else time.perf_counter)


# --- requests ---------------------------------------------------------------------------------------------------------


def next_line_ids(tokenizer: Any, count: int) -> list[tuple[list[int], list[list[int]]]]:
    """Contexts and answers of the bundled task as token ids."""
    lines = (ROOT / "data" / "next_line" / "test.jsonl").read_text().splitlines()
    found = []
    for line in lines:
        question = json.loads(line)
        prefix = [tokenizer.bos_id, *tokenizer.encode_ids(question["context"])]
        # Long answers, so that every length can be cut from them: an answer and the other ones behind it.
        texts = ["\n".join(question["choices"][n:] + question["choices"][:n]) for n in range(4)]
        answers = [tokenizer.encode_ids("\n" + text) for text in texts]
        if 45 <= len(prefix) <= 80 and min(map(len, answers)) >= 41:
            found.append((prefix, answers))
    return found[:count]


def cut(
    questions: Sequence[tuple[list[int], list[list[int]]]], length: int, context: int = 128
) -> list[LikelihoodRequest]:
    """All answers of all questions: `length` tokens of each behind at most `context` of the question's."""
    from lit_gpt.likelihood.loglikelihood import LikelihoodRequest

    return [
        LikelihoodRequest(tuple(prefix[-context:]), tuple(ids[1 : 1 + length]))
        for prefix, answers in questions
        for ids in answers
    ]


def estimates(
    model: Transformer, requests: Sequence[LikelihoodRequest], settings: LikelihoodSettings
) -> list[Likelihood]:
    """Ours, in the order of the requests."""
    from lit_gpt.likelihood.loglikelihood import mdm_likelihoods
    from lit_gpt.likelihood.scoring import ScoringModel

    found = dict(mdm_likelihoods(ScoringModel.of(model, MAX_TOKENS), requests, settings))
    return [found[number] for number in range(len(requests))]


def with_passes(name: str, passes: int) -> LikelihoodSettings:
    """An estimator that may take so many forward passes."""
    from lit_gpt.likelihood.estimators import ESTIMATORS, make_estimator
    from lit_gpt.likelihood.loglikelihood import LikelihoodSettings

    return LikelihoodSettings(make_estimator(name, {ESTIMATORS[name].passes_parameter: passes}))


def deviation(
    model: Transformer, requests: Sequence[LikelihoodRequest], settings: LikelihoodSettings, draws: int
) -> float:
    """Root mean square over requests of the standard deviation over independent draws, nats."""
    from dataclasses import replace

    every = [replace(request, stream=draw) for request in requests for draw in range(1, draws + 1)]
    values = [result.nll for result in estimates(model, every, settings)]
    groups = [values[n : n + draws] for n in range(0, len(values), draws)]
    return math.sqrt(statistics.mean(statistics.variance(group) for group in groups))


# --- comparisons ------------------------------------------------------------------------------------------------------


def speed_at_equal_error(
    plain: OwnProcess, model: Transformer, questions: list[tuple[list[int], list[list[int]]]], flags: Flags
) -> None:
    """Time to a standard error no larger than that of mc with 128 draws, by length of the target."""
    print(f"## Time to the standard error of mc with {MC_DRAWS} samples\n")
    rows: list[list[str]] = []
    totals: dict[str, list[tuple[float, float]]] = {}
    for length in (*SHORT, *LONG):
        requests = cut(questions, length)
        sample = requests[::4][:6]
        plain_error = deviation(model, sample, with_passes("mc", MC_DRAWS), flags.draws)
        for budget in BUDGETS:
            error = deviation(model, sample, with_passes("exact", budget), flags.draws)
            if error <= plain_error:
                break
        # A request in four: the plain side takes them one at a time, so its time is in proportion.
        work = (plain, "mc", requests[::4]), (model, requests, with_passes("exact", budget))
        plain_s, ours_s, ratio = alternate(*work, clocked(flags))[:3]
        plain_s, ratio = 4 * plain_s, 4 * ratio
        group = "1 to 6" if length in SHORT else "7 to 40"
        totals.setdefault(group, []).append((plain_s, ours_s))
        passes = min(budget, 2**length - 1)
        cells = [length, f"{plain_error:.3f}", f"{error:.3f}", passes, f"{1000 * plain_s / len(requests):.1f}"]
        rows.append([str(cell) for cell in cells] + [f"{1000 * ours_s / len(requests):.3f}", f"{ratio:.0f}"])
    heads = [
        "tokens",
        "mc error",
        "exact error",
        "exact passes",
        "plain mc, ms per request",
        "ours, ms",
        "times as fast",
    ]
    print_table(heads, rows)
    print()
    for group, least in (("1 to 6", 100), ("7 to 40", 50)):
        plain_total, ours_total = (sum(column) for column in zip(*totals[group], strict=True))
        verdict = "met" if plain_total / ours_total >= least else "**missed**"
        print(
            f"All targets of {group} tokens: {plain_total / ours_total:.0f} times as fast (at least {least}: {verdict})."
        )


def variance_at_equal_passes(
    model: Transformer, questions: list[tuple[list[int], list[list[int]]]], flags: Flags
) -> None:
    """mc's variance over exact's, for every length from 2 to 40, at the passes of one sweep over all levels."""
    print("\n## Variance at equal numbers of passes\n")
    rows, worst = [], math.inf
    for length in range(2, 41):
        passes = sum(-(-length // k) for k in range(1, length + 1))
        sample = cut(questions, length, 24)[::4][:3]
        plain = deviation(model, sample, with_passes("mc", passes), flags.draws) ** 2
        own = deviation(model, sample, with_passes("exact", passes), flags.draws) ** 2
        # Below rounding an enumerated bound has no variance.
        share = plain / own if own > 1e-8 else math.inf
        worst = min(worst, share)
        rows.append([str(length), str(passes), f"{plain:.4f}", f"{own:.6f}", f"{share:.0f}"])
    print_table(["tokens", "passes", "variance of mc", "of exact", "ratio"], rows)
    print(f"\nThe smallest ratio is {worst:.0f} (at least 20: {'met' if worst >= 20 else '**missed**'}).")


def same_values(
    names: list[str], plain: OwnProcess, model: Transformer, requests: list[LikelihoodRequest], rounds: Rounds
) -> list[str]:
    """The row of a published procedure on some requests: times, and that the values agree."""
    from lit_gpt.likelihood.chain_rule import ChainRule
    from lit_gpt.likelihood.loglikelihood import LikelihoodSettings

    greedy = "greedy" in names[1]
    work = (
        (plain, "lambada" if greedy else "chain_rule", requests),
        (model, requests, LikelihoodSettings(ChainRule(), greedy=greedy)),
    )
    plain_s, ours_s, ratio, plain_values, results = alternate(*work, rounds)
    pairs = [value if greedy else (value, False) for value in plain_values]
    assert [flag for _, flag in pairs] == [result.is_greedy for result in results]
    difference = max(abs(value - result.nll) for (value, _), result in zip(pairs, results, strict=True))
    times = [f"{1000 * plain_s / len(requests):.1f}", f"{1000 * ours_s / len(requests):.2f}", f"{ratio:.1f}"]
    return [*names, *times, f"{difference:.1e} nats"]


def last_words(tokenizer: Any, count: int) -> list[LikelihoodRequest]:
    """LAMBADA's passages and their last words, cut to what the quickstart's model reads."""
    from lit_gpt.likelihood.loglikelihood import LikelihoodRequest

    requests = []
    for line in (ROOT / "data" / "lambada" / "test.jsonl").read_text().splitlines()[:count]:
        context, _, word = json.loads(line)["text"].rpartition(" ")
        prefix, target = tokenizer.encode_ids(context), tokenizer.encode_ids("a " + word)[1:]
        requests.append(LikelihoodRequest(tuple(prefix[-120 + len(target) :]), tuple(target)))
    return requests


def errors_by_passes(model: Transformer, questions: list[tuple[list[int], list[list[int]]]], flags: Flags) -> None:
    """Standard error against passes for some lengths, as a table and a plot."""
    lengths, counts = (2, 4, 8, 16, 40), (2, 4, 8, 16, 32, 64, 128, 256, 512)
    curves: dict[str, list[tuple[float, float]]] = {}
    rows = []
    for count in counts:
        cells = [str(count)]
        for length in lengths:
            sample = cut(questions, length, 24)[::8][:3]
            for name in ("mc", "exact"):
                whole = name == "exact" and 2**length - 1 <= count
                error = 0.0 if whole else deviation(model, sample, with_passes(name, count), max(8, flags.draws // 2))
                cells.append(f"{error:.3f}")
                if not whole:
                    curves.setdefault(f"{name}, {length} tokens", []).append((count, error))
        rows.append(cells)
    print("\n## Standard error against forward passes, nats\n")
    print_table(["passes", *(f"{name}, {length} tokens" for length in lengths for name in ("mc", "exact"))], rows)
    print("\n0.000 where every mask is read.")
    if flags.plot:
        draw(curves, Path(flags.plot))


def draw(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Both estimators' errors, log by log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    lengths = list(dict.fromkeys(label.split(", ")[1] for label in curves))
    for label, points in curves.items():
        name, length = label.split(", ")
        color = f"C{lengths.index(length)}"
        axes.plot(
            *zip(*points, strict=True), "o-" if name == "exact" else "s--", color=color, label=label, markersize=4
        )
    axes.set(xscale="log", yscale="log", xlabel="forward passes per target", ylabel="standard error, nats")
    axes.set_title("An MDM's likelihood: standard error by estimator")
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


# --- the rest ---------------------------------------------------------------------------------------------------------


def alternate(
    plain: tuple[OwnProcess, str, list[LikelihoodRequest]],
    ours: tuple[Transformer, list[LikelihoodRequest], LikelihoodSettings],
    rounds: Rounds,
) -> tuple[float, float, float, list[Any], list[Likelihood]]:
    """Median seconds of both sides, in turn, the median of their ratio within a round, and what each found."""
    side, what, requests = plain
    pairs = [(list(request.prefix), list(request.target)) for request in requests]
    side.run(what, pairs)
    estimates(*ours)
    times = []
    for _ in range(rounds.count):
        plain_s, values = side.run(what, pairs)
        start = rounds.clock()
        results = estimates(*ours)
        times.append((plain_s, rounds.clock() - start))
    plain_s, ours_s = (statistics.median(column) for column in zip(*times, strict=True))
    return plain_s, ours_s, statistics.median(slow / fast for slow, fast in times), values, results


if __name__ == "__main__":
    run(main)
