"""The published procedures in float32 and bfloat16 against the plain loop, and an ARM's answers behind one context.

A part of `likelihood.py`, which prints it. Sides alternate; a ratio is the median over rounds. Ours in bfloat16 has its
matrices rounded once and runs in autocast, as `--dtype bfloat16` does; the same masks as in float32 show what that changes.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.common import OwnProcess, print_table

if TYPE_CHECKING:
    from lit_gpt.likelihood.loglikelihood import Likelihood, LikelihoodRequest, LikelihoodSettings
    from lit_gpt.model.layers import Transformer

MAX_TOKENS = 8192


@dataclass(frozen=True)
class Rounds:
    """How a comparison is timed."""

    count: int
    clock: Callable[[], float]


# What the published procedures are to gain in bfloat16 over the plain loop in float32.
LEAST = {"mc": 3, "chain_rule": 5}


def in_both_dtypes(
    plain: OwnProcess, names: list[str], model: Transformer, sets: dict[str, list[LikelihoodRequest]], rounds: Rounds
) -> tuple[list[list[str]], list[str]]:
    """Times and values of mc and chain_rule.

    Args:
        plain: `likelihood_baseline.timed_requests` on the same model.
        names: the first cells of each row.
        model: an MDM.
        sets: requests by a text that begins with the procedure's name.
        rounds: of the timing.

    Returns:
        The rows of a table, and a line for each target.
    """
    import torch

    from lit_gpt.checkpoints.loaded import round_matrices
    from lit_gpt.likelihood.chain_rule import ChainRule
    from lit_gpt.likelihood.loglikelihood import LikelihoodSettings
    from lit_gpt.likelihood.monte_carlo import MonteCarlo

    rounded = copy.deepcopy(model)
    round_matrices(rounded)
    rows, lines = [], []
    for what, requests in sets.items():
        procedure = what.split(",")[0]
        settings = LikelihoodSettings(MonteCarlo(128) if procedure == "mc" else ChainRule())
        pairs = [(list(request.prefix), list(request.target)) for request in requests]

        def half(own: list[LikelihoodRequest] = requests, how: LikelihoodSettings = settings) -> list[Likelihood]:
            with torch.autocast("cpu", torch.bfloat16):
                return _estimates(rounded, own, how)

        times, (wide, narrow) = _alternate(
            [
                lambda own=pairs, name=procedure: plain.run(name, own)[0],  # type: ignore[misc]
                lambda own=requests, how=settings: _estimates(model, own, how),  # type: ignore[misc]
                half,
            ],
            rounds,
        )
        tokens = sum(len(request.target) for request in requests)
        change = sum(abs(a.nll - b.nll) for a, b in zip(wide, narrow, strict=True)) / tokens
        error = sum(a.standard_error for a in wide) / tokens
        ratios = [statistics.median(round_[0] / round_[side] for round_ in times) for side in (1, 2)]
        medians = [1000 * statistics.median(column) / len(requests) for column in zip(*times, strict=True)]
        rows.append(
            [*names, what, *(f"{value:.1f}" for value in medians), *(f"{ratio:.1f}" for ratio in ratios)]
            + [f"{change:.4f}", f"{error:.4f}"]
        )
        met = "met" if ratios[1] >= LEAST[procedure] else "**missed**"
        lines.append(f"{what}: {ratios[1]:.1f} times as fast in bfloat16 (at least {LEAST[procedure]}: {met}).")
    return rows, lines


def print_dtypes(rows: list[list[str]]) -> None:
    """The table of `in_both_dtypes`."""
    heads = ["model", "what", "plain, ms per request", "ours float32", "ours bfloat16", "times as fast, float32"]
    heads += ["bfloat16", "change by bfloat16, nats per token", "standard error, nats per token"]
    print_table(heads, rows)


def shared_contexts(questions: Sequence[tuple[list[int], list[list[int]]]], rounds: Rounds) -> None:
    """Print an ARM's multiple choice with whole rows and with each context read once."""
    from lit_gpt.likelihood.loglikelihood import LikelihoodRequest, arm_likelihoods
    from lit_gpt.likelihood.scoring import ScoringModel
    from lit_gpt.model.causal import GPT

    model = GPT.from_name(6).eval()
    model.init_weights(1)
    shared = ScoringModel.of(model, MAX_TOKENS)
    whole = dataclasses.replace(shared, network=None)
    rows = []
    for context, length in ((40, 10), (200, 10), (800, 10)):
        requests = [
            LikelihoodRequest(tuple((prefix * 20)[:context]), tuple(answer[1 : 1 + length]))
            for prefix, answers in questions
            for answer in answers
        ]
        times, (one, other) = _alternate(
            [
                lambda: 0.0,
                lambda own=requests: dict(arm_likelihoods(whole, own)),  # type: ignore[misc]
                lambda own=requests: dict(arm_likelihoods(shared, own)),  # type: ignore[misc]
            ],
            rounds,
        )
        ratio = statistics.median(round_[1] / round_[2] for round_ in times)
        medians = [1000 * statistics.median(column) / len(requests) for column in zip(*times, strict=True)]
        difference = max(abs(one[number].nll - other[number].nll) for number in one)
        rows.append(
            [
                str(context),
                str(length),
                f"{medians[1]:.2f}",
                f"{medians[2]:.2f}",
                f"{ratio:.1f}",
                f"{difference:.1e} nats",
            ]
        )
    heads = ["tokens of the context", "of an answer", "whole rows, ms per answer", "context once", "times as fast"]
    print_table([*heads, "largest difference"], rows)


def _estimates(model: Transformer, requests: list[LikelihoodRequest], settings: LikelihoodSettings) -> list[Likelihood]:
    from lit_gpt.likelihood.loglikelihood import mdm_likelihoods
    from lit_gpt.likelihood.scoring import ScoringModel

    found = dict(mdm_likelihoods(ScoringModel.of(model, MAX_TOKENS), requests, settings))
    return [found[number] for number in range(len(requests))]


def _alternate(sides: Sequence[Callable[[], Any]], rounds: Rounds) -> tuple[list[list[float]], list[Any]]:
    """Seconds of each side in each round, all sides in turn, and what all but the first found.

    The first side tells its own seconds, in a process of its own.
    """
    found = [side() for side in sides]
    times = []
    for _ in range(rounds.count):
        seconds = [sides[0]()]
        for side in sides[1:]:
            start = rounds.clock()
            side()
            seconds.append(rounds.clock() - start)
        times.append(seconds)
    return times, found[1:]
