"""Plans of runs against runs: steps and tokens as training prints them, memory and file sizes as they are measured."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_gpt import cli
from lit_gpt.config import Config
from lit_gpt.model import kernels
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.training.run_plan import GPU_KINDS, PretrainingPlan, StepShape, gpu_memory, parameter_count
from scripts.plan_run import main
from tests.support.step_memory import CONFIGS, ROWS, SHARDED_CASE, made_up_terms, most_allocated
from tests.support.training_runs import make_packed_data, read_metrics, run_pretraining

ROOT = Path(__file__).resolve().parents[2]


def measured_memory(shape: StepShape, config: Config) -> float:
    """Bytes of parameters, gradients and moments, and the most that tensors of a second micro batch add to them."""
    model = shape.model_class(config)
    model.init_weights(1)
    model.checkpoint_blocks = shape.checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    terms = made_up_terms(shape, config)

    def micro_batch() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=shape.precision == "bf16-mixed"):
            loss = model.weighted_nll(terms)[0]
        loss.backward()

    micro_batch()
    optimizer.step()
    tensors = [*model.parameters(), *(parameter.grad for parameter in model.parameters())]
    tensors += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return sum(tensor.nbytes for tensor in tensors) + most_allocated(micro_batch)


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("model_class", [GPT, TransEncoder])
@pytest.mark.parametrize("name", ["many layers", "a large vocabulary"])
def test_memory_is_within_15_percent_of_a_real_step(name, model_class, precision, checkpointing):
    config = CONFIGS[name]
    shape = StepShape(model_class, precision, checkpointing, kernels.chunk_elements(torch.device("cpu")))
    planned = gpu_memory(config, shape, ROWS, 1, True)
    measured = measured_memory(shape, config)
    assert planned.total == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("names", "precisions", "replicas"),
    [
        (["many layers"], ("bf16-mixed",), 1),
        pytest.param(CONFIGS, ("bf16-mixed", "32-true"), 1, marks=pytest.mark.slow),
        pytest.param(CONFIGS, ("bf16-mixed", "32-true"), 2, marks=pytest.mark.slow),
    ],
    ids=["short", "fsdp", "hybrid"],
)
def test_memory_of_a_sharded_step_is_within_15_percent(tmp_path, names, precisions, replicas):
    """Steps of FSDP2 in processes that share a model by twos."""
    values = (names, precisions, (False, "selective", True), (2,), (replicas,), (False, True))
    cases = [dict(zip(SHARDED_CASE, case, strict=True)) for case in itertools.product(*values)]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    words = ["tests/support/step_memory.py", tmp_path / "cases.json", tmp_path / "results.json"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    off = {}
    for case, measured in zip(cases, json.loads((tmp_path / "results.json").read_text()), strict=True):
        logits = kernels.chunk_elements(torch.device("cpu"))
        shape = StepShape(TransEncoder, case["precision"], case["checkpointing"], logits)
        planned = gpu_memory(CONFIGS[case["config"]], shape, ROWS, case["shards"], case["accumulating"])
        if planned.total != pytest.approx(measured, rel=0.15):
            off[tuple(case.values())] = planned.total / measured
    assert not off


def test_selective_checkpointing_takes_less_memory_than_none_and_more_than_full():
    config, logits = CONFIGS["many layers"], kernels.chunk_elements(torch.device("cpu"))
    none, selective, full = (
        measured_memory(StepShape(TransEncoder, "bf16-mixed", which, logits), config)
        for which in (False, "selective", True)
    )
    assert full < 0.7 * selective and selective < 0.7 * none


@pytest.mark.parametrize(
    ("script", "ssl_ratio"), [("train_mdm.py", 0.0), ("train_ar.py", 0.0), ("train_mdm_rl.py", 0.5)]
)
def test_steps_tokens_and_files_are_the_runs(tmp_path, script, ssl_ratio):
    make_packed_data(tmp_path / "data")
    extra = {"ssl_ratio": ssl_ratio} if ssl_ratio else {}
    out, _ = run_pretraining(script, tmp_path, flops=2e-9, **extra)
    found = re.search(r": ([\d.e-]+)M non-embedding parameters, (\d+) steps of (\d+) x (\d+) tokens", out)
    config = Config.from_name(
        6, n_layer=2, n_head=2, n_embd=32, intermediate_size=64, n_query_groups=2, vocab_size=64, block_size=32
    )
    model_class = GPT if script == "train_ar.py" else TransEncoder
    plan = PretrainingPlan.of_budget(
        2e-9, config, 8, ssl_ratio, model_class=model_class, gpus=1, gpus_per_node=1, gpu=GPU_KINDS["h100"],
        precision="32-true",
    )  # fmt: skip
    assert found and (plan.steps, plan.batch_size) == (int(found[2]), int(found[3]))
    tokens = int(read_metrics(tmp_path)[-2]["total_tokens"] or read_metrics(tmp_path)[-1]["total_tokens"])
    assert tokens == plan.tokens if not ssl_ratio else tokens == pytest.approx(plan.tokens, rel=0.25)
    count = sum(parameter.numel() for parameter in model_class(config).parameters())
    assert parameter_count(config, model_class) == count
    # Names, settings and alignment come on top: a few hundred bytes a tensor.
    (export,), checkpoint = tmp_path.glob("models/*.safetensors"), max(tmp_path.glob("workdir/*/*/iter-*.pth"))
    for path, planned in zip((checkpoint, export), plan.file_bytes(), strict=True):
        assert planned < path.stat().st_size < planned + 100_000


def test_sharding_and_checkpointing_take_less():
    plan = PretrainingPlan.of_budget(
        1600, Config.from_name(1028), 256, 0.0, model_class=TransEncoder, gpus=16, gpus_per_node=8, gpu=GPU_KINDS["h100"]
    )  # fmt: skip
    memory = {(strategy, checkpointing): (rows, found) for strategy, checkpointing, rows, found in plan.memory()}
    assert memory["fsdp", False][1].optimizer == memory["ddp", False][1].optimizer / 16
    assert memory["hybrid", False][1].optimizer == memory["ddp", False][1].optimizer / 8
    for strategy in ("ddp", "fsdp", "hybrid"):
        assert 1 <= memory[strategy, False][0] < memory[strategy, True][0] <= 16
        assert memory[strategy, False][0] <= memory[strategy, "selective"][0] <= memory[strategy, True][0]
    assert all(found.total <= 0.9 * 80e9 for _, found in memory.values())


def planned(capsys, monkeypatch, *words: str) -> tuple[int, str, str]:
    """The script's exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["plan_run.py", *words])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    return int(end.value.code or 0), *capsys.readouterr()


def test_the_script_prints_steps_price_and_every_strategy(capsys, monkeypatch):
    words = ["--model", "170", "--flops", "10", "--gpus", "8", "--gpu", "a100"]
    code, out, err = planned(capsys, monkeypatch, *words, "--price_per_gpu_hour", "2", "--mfu", "0.5")
    assert (code, err) == (0, "")
    steps = int(10e12 / (6 * Config.from_name(170).size_in_millions * 256 * 2048))
    assert f", {steps} steps of 256 x 2048 tokens: " in out
    gpu_hours, price = re.search(r"\((\d+) GPU hours, price (\d+)\)", out).groups()
    assert int(price) == pytest.approx(2 * int(gpu_hours), abs=2)
    # Six FLOPs a parameter and token, and a bit for attention and the head.
    assert 1 < int(gpu_hours) / (10e18 / (312e12 * 0.5 * 3600)) < 1.5
    assert re.findall(r"^(ddp|fsdp|hybrid) +(no|selective|yes)", out, re.MULTILINE) == [
        (strategy, word) for strategy in ("ddp", "fsdp", "hybrid") for word in ("no", "selective", "yes")
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "h1000"], "--gpu h1000: choose from a100-40, a100, h100"),
        (["--gpus", "7"], "--batch_size 256 does not split over 7 GPUs"),
        (["--gpus", "0"], "--gpus 0: at least 1"),
        (["--flops", "1e-9"], "does not pay for one step"),
        (["--model", "171"], "unknown model size '171'"),
        (["--mfu", "2"], "--mfu 2: expected more than 0 and at most 1"),
        (["--kind", "gpt"], "--kind gpt: choose from mdm, arm"),
        (["--batch_size", str(2**60), "--flops", "1e30"], "--batch_size 1152921504606846976: at most"),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, monkeypatch, words, message):
    code, out, err = planned(capsys, monkeypatch, "--model", "6", "--flops", "1", *words)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
