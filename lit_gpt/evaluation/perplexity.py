"""Perplexity of a model on packed tokens, or on an old list of tokens, row by row.

Decisions: an ARM's loss is exact over all tokens of a row but the first, an MDM's is the bound over all of them; each row
has random numbers of its own; finished rows are kept (`result_cache`) and not scored again; of several processes each
scores its share of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_gpt.checkpoints.loaded import LoadedModel, load_model
from lit_gpt.cli import warn
from lit_gpt.data.packed_dataset import open_validation, recorded_tokenizer
from lit_gpt.data.pickled_tokens import read_token_list
from lit_gpt.devices import join_processes
from lit_gpt.diffusion import EPS
from lit_gpt.evaluation.progress import WorkBar, end_dry_run, tell_work
from lit_gpt.evaluation.result_cache import EvalCache, is_estimate, request_key, results_folder
from lit_gpt.evaluation.settings import PerplexityFlags
from lit_gpt.evaluation.work import Work, likelihood_work, total_work
from lit_gpt.likelihood.estimators import ESTIMATORS, make_estimator
from lit_gpt.likelihood.loglikelihood import LikelihoodRequest, LikelihoodSettings, NotFiniteError

# As lists of numbers all rows of a crawl would fill the memory: so many at a time.
_ROWS_AT_ONCE = 1024
# Of the published evaluation, for a crawl.
_PUBLISHED_ROWS = 100 * 1024


def evaluate_perplexity(flags: PerplexityFlags) -> None:
    """Score every row; the first process prints the loss and, as the last line, the perplexity.

    Raises:
        FileNotFoundError, ValueError: anything a user can get wrong, with the remedy.
    """
    check_perplexity_flags(flags)
    rank, processes = join_processes()
    model = load_model(flags.ckpt_path, model_name=flags.model, kind=flags.type, device=flags.device, dtype=flags.dtype)
    config = model.model.config
    length = min(flags.length, config.block_size)
    count, row_of = open_rows(Path(flags.data_dir), flags.fineweb, length, config.vocab_size)
    _check_tokenizer(Path(flags.data_dir) / flags.fineweb, model.trained_with)
    own = range(rank, min(count, flags.rows or count), processes)
    cache = EvalCache(results_folder(flags.cache), _settings(flags, model, length), rank, writes=not flags.dry_run)

    def request_of(number: int) -> LikelihoodRequest:
        return _row_request(model.kind, row_of(number), number)

    # Without any results there is none to look for, which reads all rows.
    known = sum(cache.get(_row_key(request_of(n)), is_estimate) is not None for n in own) if len(cache) else 0
    row_work = likelihood_work(model, request_of(own[0]), _likelihood_settings(flags)) if own else Work()
    total = total_work([row_work] * (len(own) - known))
    tell_work("rows", total, known)
    if flags.dry_run:
        return end_dry_run()
    sums = torch.zeros(4, dtype=torch.float64)
    with model.autocast(), WorkBar(model.model, total, "rows", not rank) as bar:
        for start in range(0, len(own), _ROWS_AT_ONCE):
            requests = [request_of(n) for n in own[start : start + _ROWS_AT_ONCE]]
            keys = [_row_key(request) for request in requests]
            cached = [cache.get(key, is_estimate) for key in keys]
            todo = [number for number, value in enumerate(cached) if value is None]
            found = [value for value in cached if value is not None]
            results = model.likelihoods(
                [requests[number] for number in todo], _likelihood_settings(flags), flags.batch_size * length
            )
            values = ((keys[todo[number]], [result.nll, result.standard_error]) for number, result in results)
            try:
                for _, value in cache.keep(values, list, 1):
                    found.append(value)
                    bar.finish(row_work)
            except NotFiniteError as error:
                number = own[start + requests.index(error.request)]
                raise NotFiniteError(error.request, f"row {number} of {flags.fineweb}") from None
            sums += torch.tensor([[nll, error**2, nll**2, 1.0] for nll, error in found], dtype=torch.float64).sum(0)
    if known and not rank:
        print(f"{known} of {len(own)} rows were there already: {cache.path}", flush=True)
    cache.close()
    if processes > 1:
        torch.distributed.all_reduce(sums)
    if not rank:
        _report(flags, sums.tolist(), length - (model.kind == "arm"))


def check_perplexity_flags(flags: PerplexityFlags) -> None:
    """Refuse what is wrong with the flags alone, all of it at once.

    Raises:
        ValueError: names every wrong flag.
    """
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


def open_rows(folder: Path, crawl: str, length: int, vocab_size: int) -> tuple[int, Callable[[int], np.ndarray]]:
    """The whole rows of a crawl's tokens: how many there are, and each by its number.

    Args:
        folder: where the crawls lie.
        crawl: a folder of packed tokens, or the name of a `.pkl`.
        length: tokens of a row.
        vocab_size: ids that the model knows.

    Raises:
        FileNotFoundError: neither packed tokens nor an old token list are there.
        ValueError: they are damaged, too short, or hold ids that the model does not know.
    """
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


def _check_tokenizer(packed: Path, trained_with: str | None) -> None:
    """Refuse tokens of another tokenizer than the checkpoint's, where both say which they had."""
    found = recorded_tokenizer(packed, ["validation"]).get("fingerprint")
    if found and trained_with and found != trained_with:
        raise ValueError(
            f"{packed} was packed with another tokenizer (SHA-256 {found[:12]}...) than the checkpoint's "
            f"({trained_with[:12]}...): its ids mean other texts; pack it with the checkpoint's"
        )


def _row_key(request: LikelihoodRequest) -> str:
    """The key of a row's result."""
    return request_key("row", request.stream, request.prefix, request.target)


def _row_request(kind: str, row: np.ndarray, number: int) -> LikelihoodRequest:
    """An ARM needs a first token to start from; an MDM scores all. Each row has random numbers of its own."""
    ids = tuple(row.tolist())
    return LikelihoodRequest(ids[:1], ids[1:], number) if kind == "arm" else LikelihoodRequest((), ids, number)


def _likelihood_settings(flags: PerplexityFlags) -> LikelihoodSettings:
    """As in pretraining; an ARM's likelihood needs none."""
    if flags.type == "arm":
        return LikelihoodSettings()
    parameters = {ESTIMATORS[flags.estimator].passes_parameter: flags.mc_samples, "eps": EPS}
    return LikelihoodSettings(make_estimator(flags.estimator, parameters), seed=flags.seed)


def _settings(flags: PerplexityFlags, model: LoadedModel, length: int) -> dict[str, Any]:
    """Everything that changes a row's result; it names the file of finished rows, so its keys never change."""
    settings = {
        "checkpoint": model.weights_hash,
        "config": model.model.config.to_dict(),
        "dtype": model.dtype,
        "device": model.device.type,
        "computed_by": model.likelihood_versions(_likelihood_settings(flags)),
        "length": length,
    }
    if flags.type == "mdm":
        settings |= {"estimator": flags.estimator, "samples": flags.mc_samples, "seed": flags.seed}
    return settings


def _report(flags: PerplexityFlags, sums: list[float], scored: int) -> None:
    """The estimator, the rows' spread, then the last line.

    Args:
        flags: of the evaluation.
        sums: over all rows, of nats, their variance, their squares and 1.
        scored: tokens of a row.
    """
    nll, variance, squares, count = sums
    loss, error = nll / (count * scored), math.sqrt(variance) / (count * scored)
    how = {"arm": "exact", "mdm": f"bound, {flags.estimator} with {flags.mc_samples} samples, seed {flags.seed}"}
    print(
        f"{how[flags.type]}: loss {loss:.5f} nats per token, the estimator's standard error {error:.5f}, {count:.0f} rows"
    )
    if count > 1:
        spread = math.sqrt(max(0.0, squares - nll**2 / count) / (count - 1)) / scored
        print(f"the rows' standard deviation {spread:.5f} nats per token")
    if count < _PUBLISHED_ROWS:
        warn(f"{count:.0f} rows were read; the published evaluation has {_PUBLISHED_ROWS}")
    print(f"{flags.ckpt_path}, {flags.fineweb}, ppl={math.exp(loss)}")
