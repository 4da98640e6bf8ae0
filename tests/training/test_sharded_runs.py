"""Whole runs whose checkpoints are folders of shards, by the real scripts; and runs that go on with fewer processes."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_gpt.checkpoints.weights import state_hash
from tests.checkpoints.test_saving import flip_a_bit
from tests.checkpoints.test_sharded import largest_file
from tests.support.training_runs import (
    make_packed_data,
    one_thread_environment,
    pretraining_command,
    read_losses,
    read_metrics,
    run_pretraining,
    run_pretraining_process,
)

FLAGS: dict[str, Any] = {
    "max_steps": 12, "save_interval": 3, "keep_checkpoints": 0, "val_samples": 0, "log_interval": 1,
    "shard_checkpoints_gb": 0,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_packed_data(tmp_path / "data")
    return tmp_path


def checkpoints(folder: Path) -> dict[int, Path]:
    """A run's checkpoints by their micro steps, in either form."""
    return {
        int(path.name[5:11]): path for path in sorted(folder.glob("workdir/*/*/iter-*-ckpt*")) if path.suffix != ".json"
    }


def exported(folder: Path) -> str:
    (path,) = folder.glob("models/*.safetensors")
    return state_hash(load_file(path))


def test_a_run_goes_on_from_shards_and_from_a_file_bit_for_bit(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    single = tmp_path_factory.mktemp("single")
    make_packed_data(single / "data")
    run_pretraining("train_mdm.py", single, **FLAGS | {"shard_checkpoints_gb": 10})
    out, err = run_pretraining("train_mdm.py", folder, **FLAGS)
    assert not err and out.count("s in the background)") == 4 and "saving took " in out
    assert list(checkpoints(folder)) == [3, 6, 9, 12] and all(path.is_dir() for path in checkpoints(folder).values())
    assert read_losses(folder) == read_losses(single)
    assert exported(folder) == exported(single)
    rows = read_metrics(folder)
    times = [
        [float(row[f"time/{name}"]) for name in ("train", "val", "save", "total")] for row in rows if row["time/save"]
    ]
    assert times[0][2] < times[-1][2]
    assert all(train + val + save == pytest.approx(total) for train, val, save, total in times)
    # Back to the sixth step, from there on in files; and to the ninth, a file, from there on in shards.
    for number, form in ((6, 10), (9, 0)):
        flags = FLAGS | {"resume": checkpoints(folder)[number], "overwrite": "true", "shard_checkpoints_gb": form}
        out, err = run_pretraining("train_mdm.py", folder, **flags)
        assert not err and f"resumed at step {number} of 12" in out
        assert read_losses(folder) == read_losses(single)
        assert exported(folder) == exported(single)
        assert checkpoints(folder)[12].is_dir() == (form == 0)
    assert [path.is_dir() for path in checkpoints(folder).values()] == [True, True, False, True]


def test_a_damaged_one_is_passed_over_and_a_failed_save_loses_nothing(folder: Path):
    with largest_file(150_000):
        out, err = run_pretraining("train_mdm.py", folder, code=2, **FLAGS | {"max_steps": 4, "save_interval": 2})
    assert "Traceback" not in err and err.count("cannot write") == 2
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "iter-000002-ckpt" in lines[0] and "File too large" in lines[0]
    assert lines[0].endswith("there is no earlier checkpoint") and not checkpoints(folder)
    assert not list(folder.glob("workdir/*/*/*.tmp"))
    run_pretraining("train_mdm.py", folder, **FLAGS | {"max_steps": 4, "save_interval": 2})
    flip_a_bit(next(checkpoints(folder)[4].glob("*.safetensors")))
    out, err = run_pretraining(
        "train_mdm.py", folder, **FLAGS | {"max_steps": 4, "save_interval": 2, "overwrite": "true"}
    )
    assert "resumed at step 2 of 4" in out and "iter-000004-ckpt: the bytes of shard-00001-of-00001" in err
    unfinished = checkpoints(folder)[4].with_suffix(".01234567.tmp")
    unfinished.mkdir()
    run_pretraining("train_mdm.py", folder, **FLAGS | {"max_steps": 4})
    assert not unfinished.exists()


def test_a_signal_waits_for_the_save(folder: Path):
    process = subprocess.Popen(
        [sys.executable, *pretraining_command("train_mdm.py", folder, **FLAGS | {"max_steps": 5000})],
        cwd=folder, env=one_thread_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 4: "):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=100)
    assert process.returncode == 143 and "Traceback" not in err, err
    step = max(checkpoints(folder))
    assert f"SIGTERM: stopped at step {step} of 5000 and saved" in err
    assert not list(folder.glob("workdir/*/*/*.tmp"))


# --- several processes --------------------------------------------------------------------------------------------


def free_port() -> str:
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def run_machines(folder: Path, machines: int, processes: int, **flags: Any) -> str:
    """Run the training as so many machines, which are all this one, of so many processes each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(machines), "--nproc_per_node"]
    address = ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    agents = [
        subprocess.Popen(
            [*launcher, str(processes), "--node_rank", str(rank), *address]
            + pretraining_command("train_mdm.py", folder, **flags),
            cwd=folder,
            env=one_thread_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        for rank in range(machines)
    ]
    try:
        outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0] * machines, outputs
    return outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("shards", [True, False], ids=["shards", "file"])
@pytest.mark.parametrize(("strategy", "machines"), [("ddp", 1), ("fsdp", 1), ("hybrid", 2)])
def test_a_run_of_four_processes_goes_on_with_two_and_with_one(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, strategy: str, machines: int, shards: bool
):
    """The batches are the same, so the losses are, but for the order of sums."""
    unbroken = tmp_path_factory.mktemp("unbroken")
    make_packed_data(unbroken / "data")
    flags = FLAGS | {"save_interval": 100, "seed": 2**33 + 5, "strategy": strategy}
    run_pretraining("train_mdm.py", unbroken, **{**flags, "strategy": "auto", "max_steps": 24})
    flags["shard_checkpoints_gb"] = 0 if shards else 10
    flags |= {"max_steps": 24, "save_interval": 8}
    run_machines(folder, machines, 4 // machines, **flags)
    for start, processes in ((8, 2), (16, 1)):
        flags |= {"resume": checkpoints(folder)[start], "overwrite": "true"}
        if processes == 1:
            flags["strategy"] = "auto"
            out, _ = run_pretraining_process("train_mdm.py", folder, **flags)
        else:
            out = run_machines(folder, machines, processes // machines, **flags)
        assert f"resumed at step {start} of 24" in out and f"device: {processes} x cpu" in out
    path = checkpoints(folder)[16]
    assert path.is_dir() == shards and (not shards or len(list(path.glob("*.safetensors"))) == 2)
    losses, expected = read_losses(folder), read_losses(unbroken)
    assert list(losses) == list(range(1, 25))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert torch.tensor(list(losses.values())).isfinite().all()
