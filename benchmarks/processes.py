"""Two processes against one: tokens per second of the same training, by strategy, with one thread for each process.

    python benchmarks/processes.py
    python benchmarks/processes.py --models 6 --steps 4 --rounds 1          a look, under a minute

Starts `pretrain/train_mdm.py` on made-up packed data as a user does, with the same global batch and one thread for each
process, so that two processes on two cores have twice the machine of one. The first steps of a run are not counted. The runs
take turns, and a ratio is the median over rounds. Beside the wall's time stands the processor's, of the process that takes
the most: on a machine that others use, it says what the work and its communication cost, without waiting.
A round of size 6 takes about 45 s.
"""

from __future__ import annotations

import csv
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import print_table
from lit_gpt.cli import parse, run

_ROOT = Path(__file__).resolve().parents[1]
_STEP_LINE = re.compile(r"step (\d+): loss ([\d.]+)")
# Of a run: the first steps make the optimizer's state, and what is allocated once.
_UNCOUNTED_STEPS = 3
# A run's strategy and processes; the first is what the others are compared with.
_SIDES = (("auto", 1), ("ddp", 2), ("fsdp", 2))


@dataclass
class Flags:
    """What is measured."""

    models: str = "6,19"
    """Sizes in millions, separated by commas."""
    batch_size: int = 16
    """Sequences of a step, over all processes."""
    length: int = 256
    """Tokens of a sequence."""
    steps: int = 8
    """Steps of a run that are counted."""
    rounds: int = 3
    """Rounds; every side runs once in each."""
    precision: str = "auto"
    """32-true or bf16-mixed; auto is the second where the processor has it."""


@dataclass
class Result:
    """What one run showed."""

    wall_rate: float
    """Tokens per second."""
    processor_rate: float
    """Tokens per second of processor time of the process that takes the most."""
    peak_gb: float
    """Memory of the largest process, in units of 1e9 bytes."""
    data_wait_share: float
    """Of the time of the counted steps."""
    loss: float
    """Of the last step."""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = parse(Flags, argv, __doc__)
    if min(flags.batch_size // 2, flags.length, flags.steps, flags.rounds) < 1:
        raise ValueError("--batch_size must be at least 2, --length, --steps and --rounds at least 1")
    import torch

    print(f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}\n")
    rows = []
    with tempfile.TemporaryDirectory(prefix="processes_") as folder:
        make_data(flags, Path(folder) / "data")
        for model in flags.models.split(","):
            rows += measure_model(model, flags, Path(folder))
    print_table(
        ["model", "processes", "strategy", "tokens/s", "x 1 process", "per processor second", "x 1 process"]
        + ["GB of a process", "waiting for data", "loss"],
        rows,
    )
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")


def make_data(flags: Flags, folder: Path) -> None:
    """Packed random tokens, enough for every step."""
    import numpy as np

    from lit_gpt.data.packed_format import PackedDatasetBuilder

    block = flags.length + 1
    samples = flags.batch_size * (flags.steps + _UNCOUNTED_STEPS)
    builder = PackedDatasetBuilder(folder, "train_slim", chunk_size=block * samples, sep_token=1, vocab_size=32000)
    builder.add_array(np.random.default_rng(0).integers(2, 32000, block * samples))
    builder.write_reminder()


def measure_model(model: str, flags: Flags, folder: Path) -> list[list[str]]:
    """A row of the table for each side."""
    results: list[list[Result]] = [[] for _ in _SIDES]
    for number in range(flags.rounds):
        for (strategy, processes), found in zip(_SIDES, results, strict=True):
            place = folder / f"{model}-{strategy}-{number}"
            place.mkdir()
            found.append(measure_run(model, strategy, processes, flags, place))
            rate = found[-1].wall_rate
            print(
                f"{model}M, {processes} x {strategy}, round {number}: {rate:.0f} tokens/s", file=sys.stderr, flush=True
            )
    rows = []
    for (strategy, processes), found in zip(_SIDES, results, strict=True):
        pairs = list(zip(found, results[0], strict=True))
        rows.append(
            [
                f"mdm {model}M",
                str(processes),
                "none" if processes == 1 else strategy,
                f"{statistics.median(one.wall_rate for one in found):.0f}",
                f"{statistics.median(one.wall_rate / single.wall_rate for one, single in pairs):.2f}",
                f"{statistics.median(one.processor_rate for one in found):.0f}",
                f"{statistics.median(one.processor_rate / single.processor_rate for one, single in pairs):.2f}",
                f"{max(one.peak_gb for one in found):.2f}",
                f"{statistics.median(one.data_wait_share for one in found):.1%}",
                f"{found[0].loss:.4f}",
            ]
        )
    return rows


def measure_run(model: str, strategy: str, processes: int, flags: Flags, folder: Path) -> Result:
    """Train in `folder`, which is empty, and time the counted steps from the lines that training prints.

    Raises:
        RuntimeError: training failed.
    """
    import psutil

    last = _UNCOUNTED_STEPS + flags.steps
    values = {
        "model": model, "max_steps": last, "batch_size": flags.batch_size, "block_size": flags.length, "log_interval": 1,
        "val_samples": 0, "compile": "off", "precision": flags.precision, "accelerator": "cpu", "devices": processes,
        "strategy": strategy, "warmup_steps": 0, "data_dir": folder.parent / "data",
    }  # fmt: skip
    command = [sys.executable, str(_ROOT / "pretrain" / "train_mdm.py")]
    command += [f"--{name}={value}" for name, value in values.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "errors").open("w") as errors:
        training = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    members: list[psutil.Process] = []
    marks: list[tuple[float, list[float]]] = []
    loss = 0.0
    assert training.stdout is not None
    for line in training.stdout:
        found = _STEP_LINE.search(line)
        if found and int(found[1]) in (_UNCOUNTED_STEPS, last):
            now = time.perf_counter()
            # The same ones both times: training starts its other processes before the first step.
            members = members or [psutil.Process(training.pid), *psutil.Process(training.pid).children(recursive=True)]
            marks.append((now, [sum(member.cpu_times()[:2]) for member in members]))
            loss = float(found[2])
    if training.wait() or len(marks) < 2:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(folder / 'errors').read_text()}")
    tokens = flags.steps * flags.batch_size * flags.length
    (begun, used_before), (ended, used_after) = marks
    busiest_s = max(after - before for after, before in zip(used_after, used_before, strict=True))
    (metrics,) = folder.glob("out/*/version_0/metrics.csv")
    with metrics.open(newline="") as file:
        counted = [row for row in csv.DictReader(file) if int(row["step"]) > _UNCOUNTED_STEPS]
    waited_s = sum(float(row["data/wait_ms"]) for row in counted) / 1000
    return Result(
        wall_rate=tokens / (ended - begun),
        processor_rate=tokens / busiest_s,
        peak_gb=max(float(row["memory/peak_gb"]) for row in counted),
        data_wait_share=waited_s / (ended - begun),
        loss=loss,
    )


if __name__ == "__main__":
    run(main)
