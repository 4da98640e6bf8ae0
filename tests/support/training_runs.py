"""Small real training runs for the tests: packed data, and the scripts as a user starts them."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_gpt import cli
from lit_gpt.data.packed_format import PackedDatasetBuilder
from lit_gpt.randomness import hash_int

ROOT = Path(__file__).resolve().parents[2]
# A shape that trains a step in milliseconds.
SHAPE = {
    "model": 6, "n_layer": 2, "n_head": 2, "n_embd": 32, "intermediate_size": 64, "n_query_groups": 2,
    "vocab_size": 64, "block_size": 32, "batch_size": 8, "warmup_steps": 5, "learning_rate": 3e-3, "min_lr": 3e-4,
    "compile": "off", "precision": "32-true", "val_draws": 2, "val_samples": 6,
}  # fmt: skip


def make_packed_data(folder: Path) -> Path:
    """Packed tokens that can be learnt: each token mostly decides the next one; the last chunk is partly filled."""
    for prefix, documents in (("train_slim", 60), ("validation", 12)):
        builder = PackedDatasetBuilder(folder, prefix, chunk_size=33 * 8, sep_token=1, vocab_size=64)
        for document in range(documents):
            tokens = [2 + hash_int(document) % 60]
            for position in range(39):
                noise = hash_int(document, position)
                tokens.append(2 + (tokens[-1] * 5 + (noise % 60 if noise % 7 == 0 else 1)) % 60)
            builder.add_array(np.array(tokens))
        builder.write_reminder()
    return folder


def pretraining_command(script: str, folder: Path, **flags: object) -> list[str]:
    """A script's command line in `folder`, where data lies in `data`."""
    return script_command(f"pretrain/{script}", **{**SHAPE, "data_dir": folder / "data", **flags})


def script_command(script: str, **flags: object) -> list[str]:
    """A script's path and its flags."""
    return [str(ROOT / script), *(f"--{name}={value}" for name, value in flags.items())]


def one_thread_environment() -> dict[str, str]:
    """One thread per process, so that tests share the machine and sums keep their order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_python(folder: Path, *words: object, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Run a Python script in `folder`, where it finds this project's modules, to its good end."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={**one_thread_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def restore_interrupts() -> None:
    """For a child process: below a shell's background job Ctrl-C is ignored, and would be in what a test starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_pretraining(script: str, folder: Path, **flags: object) -> subprocess.Popen[str]:
    """Start a pretraining script by python, in `folder`."""
    return start_script(pretraining_command(script, folder, **flags), folder)


def start_script(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start a script by python, in `folder`; its output is read line by line."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=one_thread_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore_interrupts,
    )


def run_pretraining(script: str, folder: Path, code: int = 0, **flags: object) -> tuple[str, str]:
    """`run_script_main` for a pretraining script."""
    return run_script_main(pretraining_command(script, folder, **flags), folder, code)


def run_script_main(arguments: list[str], folder: Path, code: int = 0) -> tuple[str, str]:
    """Run a script's main to its end in this process, as `cli.run` does, in `folder`; returns what it printed."""
    path, *arguments = arguments
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    out, err = io.StringIO(), io.StringIO()
    console = contextlib.ExitStack()
    console.enter_context(contextlib.chdir(folder))
    console.enter_context(contextlib.redirect_stdout(out))
    console.enter_context(contextlib.redirect_stderr(err))
    with console, pytest.raises(SystemExit) as end:
        cli.run(lambda: module.main(arguments))
    assert (end.value.code or 0) == code, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


def run_pretraining_process(script: str, folder: Path, code: int = 0, **flags: object) -> tuple[str, str]:
    """Run a script to its end as a user starts it; returns what it printed."""
    process = start_pretraining(script, folder, **flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out, err


def kill_after_lines(command: list[str], path: Path, count: int) -> None:
    """Start a command and kill it, without warning, as soon as a file has so many lines."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread_environment()
    )
    end = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    process.wait()


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """All rows of the only run's CSV below `folder`."""
    (path,) = folder.glob("out/*/version_0/metrics.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_losses(folder: Path, name: str = "metric/train_loss") -> dict[int, float]:
    """Step to a metric, where it was logged."""
    return {int(row["step"]): float(row[name]) for row in read_metrics(folder) if row[name]}


def differing_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not bit for bit the same in two of `final_state`."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def assert_same_run(one: Path, other: Path) -> None:
    """The only runs below two folders ended with the same weights and optimizer, and logged the same losses."""
    assert differing_tensors(final_state(one), final_state(other)) == []
    assert read_losses(one) == read_losses(other)


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """Model and optimizer tensors of the newest checkpoint below `folder`, flattened."""
    path = max(folder.glob("workdir/*/*/iter-*-ckpt.pth"))
    checkpoint = torch.load(path, weights_only=True)
    flat = {f"model.{name}": value for name, value in checkpoint["model"].items()}
    for number, state in checkpoint["optimizer"]["state"].items():
        flat.update({f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in state.items()})
    return flat
