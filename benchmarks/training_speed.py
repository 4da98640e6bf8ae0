"""How fast a training step is and how much memory it takes, against a plain baseline and against litgpt and transformers.

    python benchmarks/training_speed.py                           about 16 minutes on 2 idle cores, float32
    python benchmarks/training_speed.py --quick                   size 6 in float32, 3 rounds
    python benchmarks/training_speed.py --profile                 also the operations that take longest
    python benchmarks/training_speed.py --json speed.json > docs/results/training_speed.md

Prints Markdown. All steps run in turn (round after round, so that a busy machine slows all of them alike), each in a
process of its own that waits between its turns, and a ratio is the median over the rounds of (baseline's time / this one's
time) within a round. "Of matmul rate" is useful FLOPs per second over what the step's own matrix products reach alone in
the same rounds. bfloat16 is left out where the processor has no arithmetic for it (no AVX-512 bf16, no AMX). Memory is the
peak of a fresh process above what it held after its imports. litgpt and transformers take part where they are installed;
litgpt pins older versions of what this project uses, so install it without them:
`pip install lightning && pip install --no-deps litgpt`.
"""

from __future__ import annotations

import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import OwnProcess, print_table
from lit_gpt.cli import parse, run, warn

if TYPE_CHECKING:
    from benchmarks.training_steps import Cell

ROOT = Path(__file__).resolve().parents[1]
# What is promised: kind, size, precision, against the baseline of which precision, at least.
TARGETS = (
    ("mdm", 6, "float32", "float32", 1.5),
    ("mdm", 19, "float32", "float32", 1.35),
    ("mdm", 6, "bfloat16", "bfloat16", 1.5),
    ("mdm", 19, "bfloat16", "bfloat16", 1.5),
    ("mdm", 6, "bfloat16", "float32", 2.7),
    ("mdm", 19, "bfloat16", "float32", 2.5),
    ("arm", 6, "float32", "float32", 1.2),
    ("arm", 19, "float32", "float32", 1.2),
    ("arm", 6, "bfloat16", "bfloat16", 1.2),
    ("arm", 19, "bfloat16", "bfloat16", 1.2),
)
MATMUL_TARGET = ("mdm", 19, "bfloat16", 0.6)
MEMORY_TARGET = 1 / 3
_WARM_UP = 2


@dataclass
class Flags:
    """What is measured."""

    sizes: str = "6,19"
    """Model sizes in millions, separated by commas."""
    kinds: str = "mdm,arm"
    """Kinds of model."""
    precisions: str = "auto"
    """float32, bfloat16, both with a comma, or auto: bfloat16 where the processor has it."""
    batch: int = 4
    """Sequences of a step."""
    length: int = 256
    """Tokens of a sequence."""
    rounds: int = 9
    """Rounds; every step runs once in each."""
    threads: int = 0
    """Threads of torch; 0 for as many as there are cores."""
    clock: str = "wall"
    """wall, or cpu: the process's own time, for a machine that others use (take --threads 1 with it)."""
    memory: str = "8x2048"
    """Batch and length of the memory table (size 6), or none."""
    quick: bool = False
    """Size 6, float32, 3 rounds, no memory table."""
    profile: bool = False
    """Print the operations on which our step spends its time."""
    json: str | None = None
    """Also write all numbers to this file."""


@dataclass
class Row:
    """One step's result in one cell."""

    kind: str
    size: int
    step: str
    precision: str
    median_ms: float
    tokens_per_s: float
    ratios: dict[str, float]
    """Speed over the baseline's, by the baseline's precision."""
    useful_gflops_per_s: float
    matmul_gflops_per_s: float

    @property
    def of_matmul(self) -> float:
        return self.useful_gflops_per_s / self.matmul_gflops_per_s


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = parse(Flags, argv, __doc__)
    if flags.quick:
        flags.sizes, flags.precisions, flags.rounds, flags.memory = "6", "float32", 3, "none"
    if flags.clock not in ("wall", "cpu") or flags.rounds < 1:
        raise ValueError("--clock must be wall or cpu, --rounds at least 1")
    import torch

    from benchmarks.training_steps import Cell

    if flags.threads:
        torch.set_num_threads(flags.threads)
    precisions, notes = choose_precisions(flags)
    rows: list[Row] = []
    for size in (int(word) for word in flags.sizes.split(",")):
        for kind in flags.kinds.split(","):
            cell = Cell(kind, size, flags.batch, flags.length)
            rows += measure_cell(cell, precisions, flags)
    print(f"# Training speed, {flags.batch}x{flags.length} tokens\n")
    print(
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {flags.rounds} rounds, "
        f"{'wall' if flags.clock == 'wall' else 'processor'} time.\n"
    )
    for note in notes:
        print(note + "\n")
    print_speed(rows)
    memory = {} if flags.memory == "none" else measure_memory(flags)
    if memory:
        print_memory(memory, flags)
    print_targets(rows, memory)
    if flags.profile:
        for size in (int(word) for word in flags.sizes.split(",")):
            for kind in flags.kinds.split(","):
                print_profile(Cell(kind, size, flags.batch, flags.length), precisions[-1])
    if flags.json:
        values = [vars(row) | {"of_matmul": row.of_matmul} for row in rows]
        Path(flags.json).write_text(json.dumps({"steps": values, "peak_memory_bytes": memory}, indent=1) + "\n")


def choose_precisions(flags: Flags) -> tuple[list[str], list[str]]:
    """The precisions to measure, and what to say about those left out."""
    from benchmarks.training_steps import bf16_is_native

    if flags.precisions != "auto":
        return flags.precisions.split(","), []
    native, bf16, float32 = bf16_is_native(lambda work: timed(work, time.perf_counter))
    if native:
        return ["float32", "bfloat16"], []
    note = (
        f"bfloat16 is left out: this processor multiplies it at {bf16 / 1e9:.1f} GFLOP/s, float32 at "
        f"{float32 / 1e9:.0f} GFLOP/s (--precisions float32,bfloat16 measures it all the same)."
    )
    return ["float32"], [note]


def installed(name: str) -> bool:
    """Whether a library can be imported; if not, says that it is left out."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        warn(f"{name} is left out of the table: {error}")
        return False
    return True


def timed(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    start = clock()
    work()
    return clock() - start


def measure_cell(cell: Cell, precisions: list[str], flags: Flags) -> list[Row]:
    """All steps of one cell, in turn, round after round."""
    from benchmarks.training_steps import MatmulRate, timed_step

    names = ["baseline", "ours, eager", "ours"]
    if cell.kind == "arm":
        # Theirs are causal models.
        names += [name for name in ("litgpt", "transformers") if installed(name)]
    steps = {
        (name, p): OwnProcess(timed_step, name, cell, p == "bfloat16", flags.threads, flags.clock)
        for name in [*names, "matmul"]
        for p in precisions
    }
    check_losses(cell, {key: step.run()[1] for key, step in steps.items()})
    for _ in range(_WARM_UP - 1):
        for step in steps.values():
            step.run()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for number in range(flags.rounds):
        for key, step in steps.items():
            times[key].append(step.run()[0])
        print(f"{cell.kind} {cell.size}M: round {number + 1} of {flags.rounds}", file=sys.stderr, flush=True)
    for step in steps.values():
        step.close()
    flops, matmul_flops = cell.useful_flops(cell.scored), MatmulRate(cell, cell.scored, False).flops
    rows = []
    for name in names:
        for precision in precisions:
            own = times[name, precision]
            median_s = statistics.median(own)
            rows.append(
                Row(
                    cell.kind,
                    cell.size,
                    name,
                    precision,
                    median_s * 1000,
                    cell.tokens / median_s,
                    {p: ratio(times["baseline", p], own) for p in precisions},
                    flops / median_s / 1e9,
                    matmul_flops / statistics.median(times["matmul", precision]) / 1e9,
                )
            )
    return rows


def ratio(baseline: list[float], own: list[float]) -> float:
    """Median over the rounds of the baseline's time over the own time."""
    return statistics.median(slow / fast for slow, fast in zip(baseline, own, strict=True))


def check_losses(cell: Cell, losses: dict[tuple[str, str], float]) -> None:
    """Ours and the baseline start from the same weights: before the first update they must agree."""
    for (name, precision), value in losses.items():
        reference = losses["baseline", precision]
        tolerance = 1e-4 if precision == "float32" else 1e-2
        if name.startswith("ours") and abs(value - reference) > tolerance * reference:
            raise ValueError(f"{cell.kind} {cell.size}M {precision}: {name} has loss {value}, the baseline {reference}")


# --- memory ----------------------------------------------------------------------------------------------------------


def measure_memory(flags: Flags) -> dict[str, int]:
    """Peak bytes of one training step of size 6, each in a process of its own."""
    batch, length = flags.memory.split("x")
    peaks = {}
    for kind in flags.kinds.split(","):
        for step in ("plain", "ours_eager", "ours"):
            code = f"from benchmarks import training_speed as t; t.report_peak({step!r}, {kind!r}, {int(batch)}, {int(length)})"
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                warn(f"memory of {step} ({kind}) could not be measured: {(done.stderr.strip() or 'killed')[-200:]}")
                continue
            peaks[f"{kind} {step}"] = int(done.stdout.split()[-1])
            print(f"memory {kind} {step}: {peaks[f'{kind} {step}'] / 1e6:.0f} MB", file=sys.stderr, flush=True)
    return peaks


def report_peak(step: str, kind: str, batch: int, length: int) -> None:
    """In a fresh process: two steps, then print how far memory rose above what the imports took."""
    import torch._inductor.compile_fx  # noqa: F401 (what compiling loads is no part of the step's memory)

    from benchmarks import training_steps

    cell = training_steps.Cell(kind, 6, batch, length)
    before = resident("VmRSS")
    run_step = getattr(training_steps, step)(cell, False)
    for number in range(2):
        run_step(cell.make_batch(number))
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of resident memory now (VmRSS) or at their peak (VmHWM).

    From /proc, since getrusage's maximum is inherited from the parent process; where there is no /proc, from getrusage.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- print -----------------------------------------------------------------------------------------------------------


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def print_speed(rows: list[Row]) -> None:
    """The table of steps."""
    against = sorted({p for row in rows for p in row.ratios}, reverse=True)
    heads = ["model", "step", "precision", "ms", "tokens/s", *(f"x baseline {p}" for p in against)]
    heads += ["useful GFLOP/s", "of matmul rate"]
    print_table(
        heads,
        [
            [
                f"{row.kind} {row.size}M",
                row.step,
                row.precision,
                f"{row.median_ms:.0f}",
                f"{row.tokens_per_s:.0f}",
                *(f"{row.ratios[p]:.2f}" for p in against),
                f"{row.useful_gflops_per_s:.1f}",
                f"{row.of_matmul:.0%} of {row.matmul_gflops_per_s:.0f}",
            ]
            for row in rows
        ],
    )


def print_memory(memory: dict[str, int], flags: Flags) -> None:
    """The table of peaks."""
    print(f"\n## Peak memory, size 6, {flags.memory} tokens, float32\n")
    body = []
    for name, peak in memory.items():
        kind = name.split()[0]
        reference = memory.get(f"{kind} plain")
        body.append([name, f"{peak / 1e6:.0f}", f"{peak / reference:.2f}" if reference else "-"])
    print_table(["step", "MB above the imports", "of the baseline"], body)


def print_targets(rows: list[Row], memory: dict[str, int]) -> None:
    """What was promised beside what was measured."""
    found = {(row.kind, row.size, row.precision): row for row in rows if row.step == "ours"}
    body = []
    for kind, size, precision, against, least in TARGETS:
        row = found.get((kind, size, precision))
        if row and against in row.ratios:
            body.append(verdict(f"{kind} {size}M {precision} over baseline {against}", row.ratios[against], least))
    row = found.get(MATMUL_TARGET[:3])
    if row:
        body.append(verdict("mdm 19M bfloat16, of matmul rate", row.of_matmul, MATMUL_TARGET[3]))
    for kind in ("mdm", "arm"):
        if f"{kind} plain" in memory and f"{kind} ours" in memory:
            share = memory[f"{kind} plain"] / memory[f"{kind} ours"]
            body.append(verdict(f"{kind} 6M peak memory, baseline over ours", share, 1 / MEMORY_TARGET))
    print("\n## Targets\n")
    print_table(["what", "measured", "at least", ""], body)
    ours = [row.tokens_per_s for row in found.values()]
    if ours:
        print(f"\nThe input pipeline beside it: `benchmarks/input_pipeline.py --train_tokens_per_s {max(ours):.0f}`")


def verdict(what: str, measured: float, least: float) -> list[str]:
    """One row of the targets."""
    return [what, f"{measured:.2f}", f"{least:.2f}", "met" if measured >= least else "**missed**"]


def print_profile(cell: Cell, precision: str) -> None:
    """Where our step's time goes: torch's profiler over three steps, operations by their own time."""
    from torch.profiler import ProfilerActivity, profile

    from benchmarks import training_steps

    step, batch = training_steps.ours(cell, precision == "bfloat16"), cell.make_batch(0)
    for _ in range(_WARM_UP):
        step(batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step(batch)
    averages = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in averages)
    print(f"\n## Profile: {cell.kind} {cell.size}M, {precision}, ours\n")
    print_table(
        ["operation", "share", "ms per step", "calls per step"],
        [
            [
                event.key[:60],
                f"{event.self_cpu_time_total / total:.1%}",
                f"{event.self_cpu_time_total / 3000:.1f}",
                f"{event.count / 3:.0f}",
            ]
            for event in averages[:12]
        ],
    )


if __name__ == "__main__":
    run(main)
