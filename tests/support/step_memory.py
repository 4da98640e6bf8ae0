"""The memory that tensors take in real steps on CPUs: what a GPU's allocator would hold of them.

    python tests/support/step_memory.py CASES.json RESULTS.json

measures sharded steps: CASES.json lists dictionaries of `SHARDED_CASE`'s keys; RESULTS.json gets each one's bytes on the
first process. Torch's profiler reports every allocation of a tensor; their running sum is what is measured.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lit_gpt.config import Config
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.training import strategies
from lit_gpt.training.run_plan import StepShape

ROWS = 4
# Longer than 256 tokens: up to there bf16 attention on a CPU takes another way than on a GPU. In the last attention is
# next to nothing, as are all activations.
CONFIGS = {
    "many layers": Config("deep", 8, 2, 64, 256, 2, block_size=320, vocab_size=512),
    "a large vocabulary": Config("broad", 2, 4, 96, 288, 2, block_size=384, vocab_size=6000),
    "few tokens": Config("short", 4, 2, 128, 512, 2, block_size=8, vocab_size=512),
}
SHARDED_CASE = ("config", "precision", "checkpointing", "shards", "replicas", "accumulating")


def made_up_terms(shape: StepShape, config: Config) -> LossTerms:
    """A micro batch in which an ARM scores every position and an MDM half of them."""
    count = ROWS * config.block_size
    weights = torch.zeros(count)
    weights[torch.randperm(count)[: count if shape.model_class is GPT else count // 2]] = 1.0
    weights = weights.view(ROWS, -1)
    ids = torch.randint(0, config.vocab_size, (ROWS, config.block_size))
    return LossTerms(ids, ids, weights, weights > 0)


def most_allocated(work: Callable[[], object]) -> int:
    """The most bytes that the tensors of some work add to what is there before."""
    gc.collect()  # of what was there before, nothing goes meanwhile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    allocated = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        most = max(most, allocated)
    return most


def sharded_memory(case: dict[str, Any]) -> int:
    """Bytes of one process's parameters and moments, and the most that a step of FSDP2 adds; every process calls it."""
    from torch.distributed.device_mesh import init_device_mesh

    config = CONFIGS[case["config"]]
    shape = StepShape(TransEncoder, case["precision"], case["checkpointing"], 1)
    model = TransEncoder(config)
    model.checkpoint_blocks = case["checkpointing"]
    mixed = case["precision"] == "bf16-mixed"
    mesh = init_device_mesh("cpu", (case["shards"] * case["replicas"],), mesh_dim_names=("data_parallel",))
    strategies._shard(model, mesh, case["replicas"], mixed)
    wrapped = SimpleNamespace(module=model, transformer=model.transformer)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    passes = 2 if case["accumulating"] else 1

    def step() -> None:
        # As `PreparedModel.train_pass` and Fabric make them.
        for number in range(passes):
            last = number + 1 == passes
            strategies.keep_gathered(wrapped, number > 0 or not last, not last)
            model.set_requires_gradient_sync(last)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                loss = model.weighted_nll(terms)[0]
            loss.backward()
            del loss

    terms = made_up_terms(shape, config)
    step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    local = [parameter.to_local().nbytes for parameter in model.parameters()]
    return 3 * sum(local) + most_allocated(step)


def _measure(rank: int, world: int, store: str, cases: list[dict[str, Any]], output: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = [sharded_memory(case) for case in cases]
    if rank == 0:
        Path(output).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def main() -> None:
    """Start the processes of the cases, which all have as many."""
    cases = json.loads(Path(sys.argv[1]).read_text())
    (world,) = {case["shards"] * case["replicas"] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, f"{folder}/store", cases, sys.argv[2])
        torch.multiprocessing.start_processes(_measure, arguments, world, start_method="spawn")


if __name__ == "__main__":
    main()
