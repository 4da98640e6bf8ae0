"""Perplexity on text newer than the training data: crawls of FineWeb, or any packed tokens.

    python evaluate_fineweb.py --type mdm --ckpt-path quickstart/mdm/model/mdm-1.05M-1.55e13-bs-16.safetensors \
        --data-dir quickstart --fineweb packed --mc-samples 16                              a look, on a CPU: seconds
    python evaluate_fineweb.py --type arm --model 170 --ckpt-path models/ar-170M-100e18.safetensors --fineweb CC-MAIN-2024-10
    python evaluate_fineweb.py --type mdm --model 170 --ckpt-path models/mdm-170M-100e18.safetensors \
        --fineweb CC-MAIN-2024-18 --mc-samples 128

Reads data/fineweb/{crawl}/validation*.bin (scripts/prepare_fineweb.py makes them) or an old data/fineweb/{crawl}.pkl, in
rows of 2048 tokens. An ARM's loss is exact over 2047 of them. An MDM's is the bound over all 2048: `--estimator mc` draws
noise as in pretraining, with t stratified over the draws; `exact` spends --mc-samples passes on a less noisy one. Rows
that are done are not done again. The last line is `{ckpt}, {crawl}, ppl={x}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.cli import parse, run, warn

if TYPE_CHECKING:
    import numpy as np

    from lit_gpt.likelihood.loglikelihood import Likelihood, LikelihoodRequest

_ROWS_AT_ONCE = 1024


@dataclass
class Flags:
    """Flags of the temporal evaluation."""

    type: str = "mdm"
    """arm or mdm."""
    model: str | None = None
    """Size in millions, for checkpoints that do not say."""
    ckpt_path: str = ""
    """The checkpoint: an export, a run folder or checkpoint, or a published file."""
    fineweb: str = "CC-MAIN-2024-10"
    """The crawl: a folder of packed tokens or a .pkl in --data_dir."""
    data_dir: str = "data/fineweb"
    """Where the crawls lie."""
    batch_size: int = 128
    """Rows that are read at once; changes speed and memory, never the result."""
    mc_samples: int = 1024
    """MDM: noise draws of a row (mc), or forward passes (exact)."""
    estimator: str = "mc"
    """MDM: mc, the published law, or exact, the same bound with less noise."""
    seed: int = 1234
    """Of the noise."""
    rows: int | None = None
    """Read only the first so many rows."""
    length: int = 2048
    """Tokens of a row; never more than the model reads."""
    device: str = "auto"
    """cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """float32 or bfloat16; auto is float32 on CPUs, bfloat16 on GPUs that have it."""
    cache: str | None = None
    """Folder of finished rows (~/.cache/smdm/evaluation), or off."""


def main() -> None:
    """Load, score every row, print."""
    flags = parse(Flags, None, __doc__)
    check(flags)

    import torch

    from lit_gpt.checkpoints.weights import load_model, state_hash
    from lit_gpt.devices import choose_device, join_processes
    from lit_gpt.evaluation.lm_adapter import DEFAULT_CACHE, evaluation_dtype
    from lit_gpt.evaluation.result_cache import EvalCache, request_key

    rank, processes = join_processes()
    device = choose_device(flags.device)
    model, _ = load_model(flags.ckpt_path, flags.model, flags.type, device)
    length = min(flags.length, model.config.block_size)
    count, row_of = read_rows(Path(flags.data_dir), flags.fineweb, length, model.config.vocab_size)
    own = range(rank, min(count, flags.rows or count), processes)
    dtype = evaluation_dtype(flags.dtype, device)
    settings = {
        "checkpoint": state_hash(model.state_dict()),
        "config": model.config.to_dict(),
        "dtype": dtype,
        "length": length,
    }
    if flags.type == "mdm":
        settings |= {"estimator": flags.estimator, "samples": flags.mc_samples, "seed": flags.seed}
    folder = None if flags.cache == "off" else Path(flags.cache) if flags.cache else DEFAULT_CACHE.expanduser()
    cache = EvalCache(folder, settings, rank)
    sums = torch.zeros(3, dtype=torch.float64)
    known_rows = 0
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"), progress(len(own), rank) as bar:
        # A slice at a time: all rows of a crawl as lists of numbers would fill the memory.
        for start in range(0, len(own), _ROWS_AT_ONCE):
            requests = [row_request(flags.type, row_of(n), n) for n in own[start : start + _ROWS_AT_ONCE]]
            keys = [request_key("row", request.stream, request.prefix, request.target) for request in requests]
            todo = [number for number, key in enumerate(keys) if cache.get(key) is None]
            known = [cache.get(key) for key in keys if cache.get(key) is not None]
            known_rows += len(known)
            bar.update(len(known))
            results = score_rows(model, [requests[number] for number in todo], flags)
            kept = ((keys[todo[number]], [result.nll, result.standard_error]) for number, result in results)
            for _, value in cache.keep(kept, list, 1):
                known.append(value)
                bar.update()
            sums += torch.tensor([[nll, error**2, 1.0] for nll, error in known], dtype=torch.float64).sum(0)
    if known_rows and not rank:
        print(f"{known_rows} of {len(own)} rows were there already: {cache.path}", flush=True)
    cache.close()
    if processes > 1:
        torch.distributed.all_reduce(sums)
    if not rank:
        report(flags, sums.tolist(), length - (flags.type == "arm"))


def check(flags: Flags) -> None:
    """Refuse what is wrong with the flags alone, all of it at once."""
    from lit_gpt.likelihood.estimators import ESTIMATORS

    problems = []
    if flags.type not in ("arm", "mdm"):
        problems.append(f"--type {flags.type}: choose arm or mdm")
    if not flags.ckpt_path:
        problems.append("--ckpt_path is missing: name the checkpoint")
    bounds = [name for name, estimator in ESTIMATORS.items() if estimator.is_bound]
    if flags.estimator not in bounds:
        problems.append(f"--estimator {flags.estimator}: choose {' or '.join(bounds)}")
    for name in ("batch_size", "mc_samples", "length", "rows"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value}: expected at least 1")
    if problems:
        raise ValueError("; ".join(problems))


def read_rows(folder: Path, crawl: str, length: int, vocab_size: int) -> tuple[int, Callable[[int], np.ndarray]]:
    """The whole rows of a crawl's tokens: how many there are, and each by its number.

    Raises:
        FileNotFoundError: neither packed tokens nor an old token list are there.
        ValueError: they are damaged, too short, or hold ids that the model does not know.
    """
    from lit_gpt.data.packed_dataset import open_validation
    from lit_gpt.data.pickled_tokens import read_token_list

    packed, old = folder / crawl, folder / f"{crawl}.pkl"
    if packed.is_dir():
        series = open_validation(packed, length, vocab_size)
        if series is None:
            raise FileNotFoundError(f"no validation*.bin in {packed}: make them with scripts/prepare_fineweb.py")
        whole = [number for number in range(len(series)) if series.length(number) == length]
        count, row_of = len(whole), lambda number: series[whole[number]].tokens
    elif old.is_file():
        ids = read_token_list(old)
        if len(ids) and int(ids.max()) >= vocab_size:
            raise ValueError(f"{old} holds the id {int(ids.max())}: this model's tokens are 0 to {vocab_size - 1}")
        count, row_of = len(ids) // length, lambda number: ids[number * length : (number + 1) * length]
    else:
        raise FileNotFoundError(
            f"neither {packed}/validation*.bin nor {old}: make the first with scripts/prepare_fineweb.py"
        )
    if not count:
        raise ValueError(f"{packed if packed.is_dir() else old} holds no whole row of {length} tokens; lower --length")
    return count, row_of


def row_request(kind: str, row: np.ndarray, number: int) -> LikelihoodRequest:
    """An ARM needs a first token to start from; an MDM scores all. Each row has noise of its own."""
    from lit_gpt.likelihood.loglikelihood import LikelihoodRequest

    ids = tuple(row.tolist())
    return LikelihoodRequest(ids[:1], ids[1:], number) if kind == "arm" else LikelihoodRequest((), ids, number)


def score_rows(model: Any, requests: Sequence[LikelihoodRequest], flags: Flags) -> Iterator[tuple[int, Likelihood]]:
    """Results as they come."""
    from lit_gpt.diffusion import EPS
    from lit_gpt.likelihood.estimators import ESTIMATORS, make_estimator
    from lit_gpt.likelihood.loglikelihood import LikelihoodSettings, arm_likelihoods, mdm_likelihoods
    from lit_gpt.likelihood.scoring import ScoringModel

    scoring_model = ScoringModel.of(model, flags.batch_size * min(flags.length, model.config.block_size))
    if flags.type == "arm":
        return arm_likelihoods(scoring_model, requests)
    parameters = {ESTIMATORS[flags.estimator].passes_parameter: flags.mc_samples, "eps": EPS}
    settings = LikelihoodSettings(make_estimator(flags.estimator, parameters), seed=flags.seed)
    return mdm_likelihoods(scoring_model, requests, settings)


def progress(total: int, rank: int) -> Any:
    """A bar with the time left."""
    from tqdm import tqdm

    return tqdm(total=total, desc="rows", disable=rank > 0)


def report(flags: Flags, sums: list[float], scored: int) -> None:
    """The estimator, then the last line; `sums` are nats, their variance and rows."""
    nll, variance, count = sums
    loss, error = nll / (count * scored), math.sqrt(variance) / (count * scored)
    how = {"arm": "exact", "mdm": f"bound, {flags.estimator} with {flags.mc_samples} samples, seed {flags.seed}"}
    print(
        f"{how[flags.type]}: loss {loss:.5f} nats per token, the estimator's standard error {error:.5f}, {count:.0f} rows"
    )
    if count < 100 * 1024:
        warn(f"{count:.0f} rows were read; the published evaluation has {100 * 1024}")
    print(f"{flags.ckpt_path}, {flags.fineweb}, ppl={math.exp(loss)}")


if __name__ == "__main__":
    run(main)
