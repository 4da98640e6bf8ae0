"""benchmarks/gpu.py: every part at toy size on either device, batches that do not fit, and who may write the results."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_parts
from benchmarks.training_steps import STEPS, Cell
from lit_gpt.model import kernels
from lit_gpt.model.loss_terms import LossTerms
from tests.support.gpus import DEVICES


def machine() -> gpu_parts.Machine:
    return gpu_parts.Machine(torch.device("cpu"), bf16=False, compiled=False, matrix_rate=1e9, peak=None)


@pytest.mark.parametrize("device", DEVICES)
def test_every_part_runs_and_is_written(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = gpu.RESULTS.read_bytes() if gpu.RESULTS.exists() else None
    gpu.main(["--toy", "--device", device, "--output", str(tmp_path / "gpu.md")])
    text = (tmp_path / "gpu.md").read_text()
    assert capsys.readouterr().out == text
    assert text.startswith("# One device: ") and "a toy run: no measure of speed" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    speed = {tuple(row[:2]): float(row[4]) for row in rows if len(row) == 9 and row[0] != "model" and "-" not in row[0]}
    ours = "ours" if device == "cuda" else "ours, eager"
    assert {("arm 6M", ours), ("arm 6M", "transformers"), ("mdm 6M", ours)} <= speed.keys()
    assert {("arm 6M", f"{ours}, selective"), ("mdm 6M", f"{ours}, selective")} <= speed.keys()
    attention = re.search(r"^Attention of ours: arm 6M (.+); mdm 6M (.+)\.$", text, re.MULTILINE)
    assert attention
    for words in attention.groups():
        assert words.startswith("torch's own choice" if device == "cpu" else ("torch", "flash_attn", "xformers"))
    passes = {row[0]: float(row[1]) for row in rows if len(row) == 4 and row[0].endswith("6M")}
    assert passes.keys() == {"arm 6M", "mdm 6M"}
    samplers = {"ARM, cache", "origin", "greedy", "threshold", "entropy"}
    samplers |= {f"greedy, blocks of 4, {cache} cache" for cache in ("prefix", "dual")}
    sampled = {row[0]: min(map(float, row[1:])) for row in rows if len(row) == 3 and row[0] in samplers}
    assert sampled.keys() == samplers
    assert min([*speed.values(), *passes.values(), *sampled.values()]) > 0
    assert (gpu.RESULTS.read_bytes() if gpu.RESULTS.exists() else None) == before


def test_the_attention_that_was_chosen_is_said(monkeypatch: pytest.MonkeyPatch):
    """Played times of a GPU's kernels: the first is what the step is built with."""
    chosen: list[str] = []
    times = {"torch_cudnn": 1.25, "torch_flash": 2.0}
    monkeypatch.setattr(kernels, "measured_attention", lambda *arguments: times)
    monkeypatch.setattr(kernels, "choose", lambda name, *others: chosen.append(name))
    cell = Cell("mdm", 6, 1, 24)  # no other test's: times are kept
    STEPS["ours, eager, selective"](cell, False)
    assert chosen == ["torch_cudnn"]
    words = gpu_parts.attention_words(cell, machine())
    assert words == "torch_cudnn (measured: torch_cudnn 1.25 ms, torch_flash 2 ms)"


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch):
    tried = []

    def hungry(cell: Cell, bf16: bool, fits: int = 3):
        def step(batch: LossTerms) -> float:
            tried.append(cell.batch)
            if len(batch.input_ids) > fits:
                raise torch.OutOfMemoryError("played")
            return 0.0

        return step

    workload = dataclasses.replace(gpu_parts.TOY, rounds=1, steps=2)
    monkeypatch.setitem(STEPS, "ours", hungry)
    cell, seconds = gpu_parts.step_seconds("ours", Cell("arm", 6, 8, 16), machine(), workload)
    assert cell.batch == 2 and seconds > 0 and tried == [8, 4, 2, 2, 2]
    monkeypatch.setitem(STEPS, "ours", lambda cell, bf16: hungry(cell, bf16, fits=0))
    with pytest.raises(ValueError, match=r"one sequence of arm 6M \(ours\) does not fit"):
        gpu_parts.step_seconds("ours", Cell("arm", 6, 4, 16), machine(), workload)


def test_only_a_full_run_on_a_gpu_writes_the_results(tmp_path: Path):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert gpu.check_flags(gpu.Flags(toy=True), cpu) is None
    assert gpu.check_flags(gpu.Flags(toy=True), cuda) is None
    assert gpu.check_flags(gpu.Flags(), cuda) == gpu.RESULTS
    own = tmp_path / "own.md"
    assert gpu.check_flags(gpu.Flags(toy=True, output=str(own)), cpu) == own
    for device in (cpu, cuda):
        with pytest.raises(ValueError, match="only a full run on a GPU"):
            gpu.check_flags(gpu.Flags(toy=True, output=str(gpu.RESULTS)), device)
    with pytest.raises(ValueError, match="needs a CUDA device.*--toy"):
        gpu.check_flags(gpu.Flags(output=str(own)), cpu)
    with pytest.raises(ValueError, match="there is no folder"):
        gpu.check_flags(gpu.Flags(toy=True, output=str(tmp_path / "none" / "own.md")), cpu)
