"""What `gpu.py` measures: the device, and on it training steps, likelihoods and samplers, each as a section of Markdown."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from benchmarks.common import table
from benchmarks.training_speed import installed, processor
from benchmarks.training_steps import STEPS, Cell, attention_times, build_model, compute_type
from lit_gpt.checkpoints.loaded import LoadedModel, compute_dtype, round_matrices
from lit_gpt.likelihood.loglikelihood import LikelihoodRequest, LikelihoodSettings
from lit_gpt.likelihood.monte_carlo import MonteCarlo
from lit_gpt.model import kernels
from lit_gpt.sampling.sample import sample
from lit_gpt.sampling.settings import Sampling
from lit_gpt.training.speed_monitor import peak_flops

if TYPE_CHECKING:
    from lit_gpt.tokenizer import Tokenizer

# What is promised on an H100 or H200, at the largest size: MFU, and evaluation's share of the matrix rate.
MFU_TARGET, EVALUATION_TARGET = 0.5, 0.6


@dataclass(frozen=True)
class Workload:
    """How much is measured of each part."""

    training: tuple[tuple[int, int], ...] = ((170, 16), (1028, 8))
    """Size in millions, and the sequences of a step; half of them where they do not fit."""
    length: int = 2048
    """Tokens of a training sequence."""
    steps: int = 10
    """Training steps of a round."""
    rounds: int = 3
    """Rounds, of which the median counts."""
    size: int = 1028
    """Millions, of the models that evaluate and sample."""
    texts: int = 2048
    """Rows that evaluation reads: an ARM's requests, or an MDM's passes."""
    passes: int = 128
    """Passes of an MDM's request."""
    half: int = 128
    """Tokens of a request's prefix, and of its target."""
    batches: tuple[int, ...] = (1, 32)
    """Rows that are sampled at once."""
    prompt: int = 32
    """Tokens of a prompt."""
    new_tokens: int = 256
    """Tokens that are sampled behind it."""
    denoising_steps: int = 128
    """Of an MDM, at most."""
    block: int = 32
    """Tokens of a block, where sampling goes by blocks."""
    product: int = 8192
    """Rows and columns of the matrices whose product gives the matrix rate."""


TOY = Workload(
    training=((6, 2),),
    length=32,
    steps=1,
    rounds=1,
    size=6,
    texts=8,
    passes=4,
    half=8,
    batches=(1, 2),
    prompt=4,
    new_tokens=8,
    denoising_steps=4,
    block=4,
    product=256,
)


@dataclass(frozen=True)
class Machine:
    """The device, and what it can do at best."""

    device: torch.device
    bf16: bool
    """Arithmetic of matrix products; else float32."""
    compiled: bool
    """Whether our training step is compiled."""
    matrix_rate: float
    """FLOPs per second of one large product."""
    peak: float | None
    """Published FLOPs per second; None where unknown."""

    @classmethod
    def of(cls, device: torch.device, compiled: bool, product: int) -> Machine:
        """Measure a device."""
        bf16 = compute_dtype("auto", device) == "bfloat16"
        left = torch.randn(product, product, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        seconds = min(timed(device, lambda: left @ left) for _ in range(10))
        peak = peak_flops(device, "bf16-mixed" if bf16 else "32-true")
        return cls(device, bf16, compiled, 2.0 * product**3 / seconds, peak)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor()


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of one call, until the device has done it."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


@contextmanager
def part(name: str) -> Iterator[None]:
    """Say how long a part took, and give its memory back."""
    start = time.perf_counter()
    yield
    free_memory()
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def free_memory() -> None:
    """Nothing stays compiled, and the device's memory is free but for what is in use."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def device_peak(device: torch.device) -> str:
    """The most memory of a GPU that tensors took in the last measured step, in GB; empty on a CPU."""
    return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f}" if device.type == "cuda" else ""


# --- training ---------------------------------------------------------------------------------------------------------


def training(machine: Machine, workload: Workload) -> list[str]:
    """The section of training steps."""
    rows, verdicts, attention = [], [], []
    own = "ours" if machine.compiled else "ours, eager"
    for size, batch in workload.training:
        for kind in ("arm", "mdm"):
            names = [own, f"{own}, selective"]
            if kind == "arm":
                # Theirs are causal models.
                names += [name for name in ("transformers", "litgpt") if installed(name)]
            for name in names:
                with part(f"training {kind} {size}M, {name}"):
                    cell = Cell(kind, size, batch, workload.length, machine.device.type)
                    cell, seconds = step_seconds(name, cell, machine, workload)
                    peak_bytes = device_peak(machine.device)
                flops = cell.useful_flops(cell.scored) / seconds
                cells = [f"{kind} {size}M", name, str(cell.batch), f"{seconds * 1000:.1f}"]
                cells += [f"{cell.tokens / seconds:.0f}", f"{flops / 1e12:.3g}", share(flops, machine.peak)]
                rows.append([*cells, share(flops, machine.matrix_rate), peak_bytes])
                if name == own:
                    attention.append(f"{kind} {size}M {attention_words(cell, machine)}")
                    if size == workload.size and machine.peak:
                        verdicts.append(verdict(f"MFU of the {kind} at {size}M", flops / machine.peak, MFU_TARGET))
    heads = ["model", "step", "sequences", "ms", "tokens/s", "TFLOP/s", "MFU", "of matrix rate", "peak GB"]
    return [
        f"## Training, sequences of {workload.length} tokens",
        "`selective` keeps matrix products and attention for the backward pass, and computes everything else again.",
        f"Attention of ours: {'; '.join(attention)}.",
        table(heads, rows),
        *verdicts,
    ]


def attention_words(cell: Cell, machine: Machine) -> str:
    """Which attention kernel our steps of a cell took, and what was measured."""
    times = attention_times(cell, machine.bf16)
    if not times:
        return "torch's own choice (there is one kernel only)"
    measured = ", ".join(f"{name} {milliseconds:.3g} ms" for name, milliseconds in times.items())
    return f"{next(iter(times))} (measured: {measured})"


def step_seconds(name: str, cell: Cell, machine: Machine, workload: Workload) -> tuple[Cell, float]:
    """Seconds of a step of `STEPS`, and the cell with as many sequences as fit.

    Raises:
        ValueError: not even one sequence fits.
    """
    while True:
        try:
            return cell, measured_step(name, cell, machine, workload)
        except torch.OutOfMemoryError:
            if cell.batch == 1:
                raise ValueError(
                    f"one sequence of {cell.kind} {cell.size}M ({name}) does not fit into memory"
                ) from None
        # Out of the handler, whose traceback holds what did not fit.
        free_memory()
        cell = replace(cell, batch=cell.batch // 2)


def measured_step(name: str, cell: Cell, machine: Machine, workload: Workload) -> float:
    """Median over rounds of the seconds of a step."""
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(machine.device)
    step, batch = STEPS[name](cell, machine.bf16), cell.make_batch(0)

    def steps() -> None:
        for _ in range(workload.steps):
            step(batch)

    # Compiles, and makes the optimizer's state.
    step(batch)
    return statistics.median(timed(machine.device, steps) / workload.steps for _ in range(workload.rounds))


# --- evaluation and sampling ------------------------------------------------------------------------------------------


def evaluation_and_sampling(machine: Machine, workload: Workload) -> list[str]:
    """The sections of likelihoods and of samplers, a model of each kind for both."""
    evaluated, sampled, verdicts = [], [], []
    # As a loaded checkpoint runs; training has chosen for its own shape.
    kernels.choose("torch", machine.device, compute_type(machine.bf16))
    for kind in ("arm", "mdm"):
        cell = Cell(kind, workload.size, 1, 2 * workload.half, machine.device.type)
        model = build_model(cell).eval()
        if machine.bf16:
            round_matrices(model)
        loaded = LoadedModel(model, no_tokenizer, "bfloat16" if machine.bf16 else "float32")
        with part(f"evaluation {kind}"):
            seconds = evaluation_seconds(loaded, workload)
        flops = workload.texts * forward_flops(loaded, workload.half) / seconds
        cells = [f"{kind} {workload.size}M", f"{workload.texts / seconds:.1f}", f"{flops / 1e12:.3g}"]
        evaluated.append([*cells, share(flops, machine.matrix_rate)])
        if machine.peak:
            what = f"Evaluation of the {kind}, share of the matrix rate"
            verdicts.append(verdict(what, flops / machine.matrix_rate, EVALUATION_TARGET))
        for name, sampling in samplers(kind, workload).items():
            with part(f"sampling {name}"):
                seconds_of = [sampling_seconds(loaded, sampling, rows, workload) for rows in workload.batches]
            rates = [rows * workload.new_tokens / each for rows, each in zip(workload.batches, seconds_of, strict=True)]
            sampled.append([name, *(f"{rate:.0f}" for rate in rates)])
        del loaded
    return [
        f"## Evaluation, rows of {workload.half} tokens and as many scored behind them",
        f"An MDM's request takes {workload.passes} passes (mc). Of its last block, which runs for the wanted positions "
        "alone, nothing is counted.",
        table(["model", "passes/s", "TFLOP/s", "of matrix rate"], evaluated),
        *verdicts,
        f"## Sampling at {workload.size}M, tokens/s",
        f"{workload.new_tokens} tokens behind {workload.prompt}; an MDM in at most {workload.denoising_steps} steps.",
        table(["sampler", *(f"batch {rows}" for rows in workload.batches)], sampled),
    ]


def no_tokenizer() -> Tokenizer:
    """For models that read token ids only."""
    raise AssertionError("nothing here is text")


def random_ids(rows: int, length: int, vocab_size: int) -> list[list[int]]:
    """Token ids, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    ids: list[list[int]] = torch.randint(vocab_size, (rows, length), generator=generator).tolist()
    return ids


def evaluation_seconds(loaded: LoadedModel, workload: Workload) -> float:
    """Seconds of all requests, after a first one."""
    half, model = workload.half, loaded.model
    count = workload.texts if loaded.kind == "arm" else workload.texts // workload.passes
    requests = [
        LikelihoodRequest(tuple(ids[:half]), tuple(ids[half:]))
        for ids in random_ids(count, 2 * half, model.config.vocab_size)
    ]
    settings = LikelihoodSettings(MonteCarlo(workload.passes))

    def score(some: list[LikelihoodRequest]) -> None:
        with loaded.autocast():
            found = list(loaded.likelihoods(some, settings, loaded.batch_tokens))
        assert len(found) == len(some)

    score(requests[:1])
    return timed(loaded.device, lambda: score(requests))


def forward_flops(loaded: LoadedModel, half: int) -> float:
    """FLOPs of one row's pass: 2 per weight and token, 4 C per layer and visible pair, the head where tokens are scored."""
    config, length = loaded.model.config, 2 * half
    blocks = 2.0 * config.non_embedding_params * length
    blocks += 4.0 * config.n_layer * config.n_embd * loaded.model.visibility.pairs(length)
    # An MDM masks, and scores, half of the target on average; its last block runs for those alone and is left out.
    scored, layers = (half, config.n_layer) if loaded.kind == "arm" else (half / 2, config.n_layer - 1)
    return blocks * layers / config.n_layer + 2.0 * config.padded_vocab_size * config.n_embd * scored


def samplers(kind: str, workload: Workload) -> dict[str, Sampling]:
    """What is sampled with, by name."""
    if kind == "arm":
        return {"ARM, cache": Sampling(temperature=0.0)}
    plain = Sampling(steps=workload.denoising_steps, temperature=0.0)
    greedy = replace(plain, algorithm="greedy")
    found = {name: replace(plain, algorithm=name) for name in ("origin", "greedy", "threshold", "entropy")}
    for cache in ("prefix", "dual"):
        found[f"greedy, blocks of {workload.block}, {cache} cache"] = replace(
            greedy, block_length=workload.block, cache=cache
        )
    return found


def sampling_seconds(loaded: LoadedModel, sampling: Sampling, rows: int, workload: Workload) -> float:
    """Seconds of a batch, after one of few new tokens."""
    prompts = random_ids(rows, workload.prompt, loaded.model.config.vocab_size)

    def complete(new_tokens: int) -> None:
        with loaded.autocast():
            finished = sample(loaded.model, prompts, sampling, workload.prompt + new_tokens)
        assert len(finished) == rows and all(len(ids) == workload.prompt + new_tokens for ids in finished)

    complete(workload.block)
    return timed(loaded.device, lambda: complete(workload.new_tokens))


# --- words ------------------------------------------------------------------------------------------------------------


def share(part_of: float, whole: float | None) -> str:
    """In percent; nothing where the whole is unknown."""
    return "" if not whole else f"{part_of / whole:.1%}"


def verdict(what: str, reached: float, least: float) -> str:
    """A sentence on a target."""
    return f"{what}: {reached:.1%} (at least {least:.0%} on an H100 or H200: {'met' if reached >= least else '**missed**'})."
