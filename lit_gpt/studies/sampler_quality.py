"""How good and how varied what a sampler writes is, and how fast it writes: every sampler behind the same prompts.

Quality is the loss of a judge, an ARM that wrote none of the texts: low is good, and cheap to have by repeating oneself;
so the entropy of the written tokens and the share of distinct pairs of neighbours stand beside it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_gpt.checkpoints.loaded import load_model
from lit_gpt.likelihood.loglikelihood import LikelihoodRequest, arm_likelihoods
from lit_gpt.likelihood.scoring import ScoringModel
from lit_gpt.model.layers import Transformer
from lit_gpt.sampling.sample import sample
from lit_gpt.sampling.settings import Sampling
from lit_gpt.studies.context_lengths import even_positions
from lit_gpt.studies.study_pages import mean_and_error

PROMPT = 8
"""Given tokens of a text."""
BATCH_ROWS = 16
"""Texts that are written at once."""
_ROWS_ALONE = 4
"""Texts that are also written one by one, for the speed of a single text."""
_STEPS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class SamplerPoint:
    """One setting's result."""

    family: str
    """Of the sampler; `ARM`, or `real text` for what it is compared with."""
    setting: str
    tokens_per_s: float
    """In batches of `BATCH_ROWS`; 0 of real text."""
    tokens_per_s_alone: float
    """One text at a time."""
    loss: float
    """The judge's, nats per token."""
    error: float
    """Its standard error over the texts."""
    entropy: float
    """Of the written tokens' frequencies, nats."""
    pairs: float
    """Share of distinct pairs among all pairs of neighbours."""


def sampler_settings() -> dict[str, dict[str, dict[str, Any]]]:
    """By family and setting the fields of `Sampling`; the ARM's are the first."""
    found: dict[str, dict[str, dict[str, Any]]] = {
        "ARM": {f"temperature {value}": {"temperature": value} for value in (1.0, 0.8, 0.6)}
    }
    families: dict[str, dict[str, Any]] = {
        "origin": {},
        "origin, temperature 0.8": {"temperature": 0.8},
        "origin, remask 0.05": {"remask": 0.05},
        "greedy": {"algorithm": "greedy"},
        "greedy, temperature 0": {"algorithm": "greedy", "temperature": 0.0},
        "blocks of 16": {"block_length": 16},
        "blocks of 16, dual cache": {"block_length": 16, "cache": "dual"},
    }
    for family, values in families.items():
        found[family] = {f"{steps} steps": {"steps": steps, **values} for steps in _STEPS}
    found["threshold"] = {f"{least}": {"algorithm": "threshold", "threshold": least} for least in (0.2, 0.4, 0.6, 0.9)}
    found["entropy"] = {
        f"{bound} nats": {"algorithm": "entropy", "entropy_bound": bound} for bound in (0.5, 2.0, 8.0, 32.0)
    }
    return found


def texts_of(ids: Sequence[int], count: int, length: int) -> list[list[int]]:
    """So many pieces of a text, evenly spread.

    Raises:
        ValueError: the text is too short.
    """
    if len(ids) < length + count:
        raise ValueError(f"the validation text has {len(ids)} tokens, too few for --rows {count}")
    return [list(ids[start : start + length]) for start in even_positions(0, len(ids) - length, count)]


def judge_texts(judge: Transformer, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """`loss`, `error`, `entropy` and `pairs` of what stands behind the texts' prompts, see `SamplerPoint`."""
    written = [tuple(text[PROMPT:]) for text in texts]
    requests = [LikelihoodRequest(tuple(text[:PROMPT]), part) for text, part in zip(texts, written, strict=True)]
    losses = [0.0] * len(texts)
    for number, found in arm_likelihoods(ScoringModel.of(judge, 8192), requests):
        losses[number] = found.nll / len(written[number])
    loss, error = mean_and_error(losses)
    counts = Counter(token for part in written for token in part)
    total = sum(counts.values())
    pairs = [pair for part in written for pair in zip(part, part[1:], strict=False)]
    return {
        "loss": loss,
        "error": error,
        "entropy": -sum(count / total * math.log(count / total) for count in counts.values()),
        "pairs": len(set(pairs)) / len(pairs),
    }


def write_texts(
    model: Transformer, real: Sequence[Sequence[int]], sampling: Sampling, batch_rows: int
) -> tuple[list[list[int]], float]:
    """Texts behind the first tokens of real ones, as long as these, and the new tokens per second."""
    length, prompts = len(real[0]), [list(row[:PROMPT]) for row in real]
    # The first call prepares kernels and caches.
    sample(model, prompts[:batch_rows], sampling, length)
    started = time.perf_counter()
    texts: list[list[int]] = []
    for start in range(0, len(prompts), batch_rows):
        part = prompts[start : start + batch_rows]
        numbers = range(start, start + len(part))
        texts += [row.tolist() for row in sample(model, part, sampling, length, rows=numbers)]
    new_tokens = sum(len(text) - PROMPT for text in texts)
    return texts, new_tokens / (time.perf_counter() - started)


def measure_family(
    family: str, model_path: Path, judge_path: Path, text: str, sizes: tuple[int, int]
) -> list[dict[str, Any]]:
    """All settings of a family, as the fields of `SamplerPoint`.

    Args:
        family: of `sampler_settings`, or `real text`.
        model_path: of the ARM or the MDM that writes; real text needs its tokenizer.
        judge_path: of the judge.
        text: the validation text.
        sizes: texts, and tokens of each.
    """
    loaded = load_model(model_path, device="cpu", dtype="float32")
    judge = load_model(judge_path, kind="arm", device="cpu", dtype="float32").model
    real = texts_of(loaded.tokenizer.encode_ids(text), *sizes)
    if family == "real text":
        return [asdict(SamplerPoint(family, "validation", 0.0, 0.0, **judge_texts(judge, real)))]
    points = []
    for setting, values in sampler_settings()[family].items():
        texts, speed = write_texts(loaded.model, real, Sampling(**values), BATCH_ROWS)
        _, alone = write_texts(loaded.model, real[:_ROWS_ALONE], Sampling(**values), 1)
        points.append(asdict(SamplerPoint(family, setting, speed, alone, **judge_texts(judge, texts))))
    return points


def cache_divergence(model_path: Path, judge_path: Path, text: str, sizes: tuple[int, int]) -> list[dict[str, Any]]:
    """How far the block caches lead from the same sampler without them: same random numbers, tokens compared.

    Returns:
        For each cache and each number of steps after which it is read anew (0 is each block's start): `cache`, `refresh`,
        `same` (share of equal tokens) and `loss` (the judge's); the first is without a cache.
    """
    loaded = load_model(model_path, kind="mdm", device="cpu", dtype="float32")
    judge = load_model(judge_path, kind="arm", device="cpu", dtype="float32").model
    real = texts_of(loaded.tokenizer.encode_ids(text), *sizes)
    exact: list[list[int]] = []
    found = []
    for cache, refresh in (("none", 0), *((name, steps) for name in ("prefix", "dual") for steps in (0, 4, 1))):
        how = Sampling("greedy", 64, 0.8, block_length=16, cache=cache, refresh=refresh)
        texts, _ = write_texts(loaded.model, real, how, BATCH_ROWS)
        exact = exact or texts
        equal = [
            a == b
            for one, two in zip(exact, texts, strict=True)
            for a, b in zip(one[PROMPT:], two[PROMPT:], strict=True)
        ]
        loss = judge_texts(judge, texts)["loss"]
        found.append({"cache": cache, "refresh": refresh, "same": sum(equal) / len(equal), "loss": loss})
    return found
