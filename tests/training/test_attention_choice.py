"""Attention by measurement, the timer played: the first process decides, at the run's shape, and every process follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_gpt.model import kernels
from tests.support.training_runs import (
    make_packed_data,
    pretraining_command,
    run_pretraining,
    run_python,
)

# Which kernel is fastest differs by process here; the second's would be refused on a CPU.
PLAYED = """
import json, os, runpy, sys
from pathlib import Path
from lit_gpt.model import kernels

rank = os.environ.get("LOCAL_RANK", "0")

def measured(*arguments):
    return {"torch": 1.5, "torch_cudnn": 2.25} if rank == "0" else {"torch_cudnn": 1.0, "torch": 2.0}

kernels.measured_attention = measured
# The second process is started by this one's command line, which so must stay.
script, *words = sys.argv[1:]
sys.path[0] = str(Path(script).parent)
runpy.run_path(script, run_name="played_script")["main"](words)
Path(f"choice-{rank}.json").write_text(json.dumps(kernels._attention_choice))
"""
FLAGS = {"max_steps": 2, "log_interval": 1, "val_samples": 0, "micro_batch_size": 2, "n_query_groups": 1}


def test_every_process_follows_the_first(tmp_path: Path):
    make_packed_data(tmp_path / "data")
    (tmp_path / "played.py").write_text(PLAYED)
    command = pretraining_command("train_ar.py", tmp_path, **FLAGS, devices=2)
    done = run_python(tmp_path, "played.py", *command, timeout=200)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("kernels: "))
    assert line.startswith("kernels: attention torch; ")
    assert line.endswith("; measured: torch 1.5 ms, torch_cudnn 2.25 ms")
    assert [json.loads((tmp_path / f"choice-{rank}.json").read_text()) for rank in (0, 1)] == ["torch", "torch"]


@pytest.mark.parametrize(("script", "causal"), [("train_ar.py", True), ("train_mdm.py", False)])
def test_it_is_measured_once_at_the_runs_shape_unless_a_flag_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, causal: bool
):
    asked = []

    def measured(*arguments: object) -> dict[str, float]:
        asked.append([str(value) for value in arguments])
        return {}

    monkeypatch.setattr(kernels, "measured_attention", measured)
    make_packed_data(tmp_path / "data")
    out, _ = run_pretraining(script, tmp_path, **FLAGS, precision="bf16-mixed")
    assert asked == [["(2, 2, 32, 16)", "1", str(causal), "cpu", "torch.bfloat16"]]
    assert "kernels: attention torch; " in out and "measured" not in out
    run_pretraining(script, tmp_path, **FLAGS, attention_kernel="torch", overwrite="true", resume="never")
    assert len(asked) == 1
