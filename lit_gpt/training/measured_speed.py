"""How fast a model trains on this machine, measured on two steps of it: for suggested runs and for planned studies."""

from __future__ import annotations

import time

import torch

from lit_gpt import devices
from lit_gpt.config import Config
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.model.loss_terms import LossTerms

STEPS = 3
"""The first makes the optimizer's state and warms the kernels up; the faster of the others counts."""
_SCORED_SHARE = 0.5
# A GPU is not busy with less.
_PROBE_TOKENS = {"cpu": 1024, "cuda": 8192}
# Two cores against one (docs/results/processes.md).
_SHARED_CORES = 0.85


def probe_rows(block_size: int) -> int:
    """Sequences of a measured step, whatever the batch of the run is."""
    return max(1, _PROBE_TOKENS[_device_type()] // block_size)


def tokens_per_second(config: Config, causal: bool = False) -> float:
    """Training speed, uncompiled, in bf16 where that is native.

    Of a GPU's the time of the steps is measured. On CPUs one core's own time is, so that other programs do not count, and
    all cores are taken to train as much as that many of it, less what they lose together.

    Args:
        config: of the model; it is built whole.
        causal: whether it is an ARM, which scores every token; a masked diffusion model scores half of them.
    """
    device = torch.device(_device_type())
    with torch.random.fork_rng(devices=[]):
        model = (GPT if causal else TransEncoder)(config).to(device)
        ids = torch.randint(config.vocab_size, (probe_rows(config.block_size), config.block_size), device=device)
        scored = torch.rand(ids.shape, device=device) < (1 if causal else _SCORED_SHARE)
    inputs = ids if causal else ids.masked_fill(scored, config.mask_id)
    terms = LossTerms(inputs, ids, scored.float(), scored)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    threads = torch.get_num_threads()
    clock, gain = (time.perf_counter, 1.0) if device.type == "cuda" else (time.process_time, threads * _SHARED_CORES)
    torch.set_num_threads(1)
    seconds = []
    try:
        for _ in range(STEPS):
            start_s = clock()
            with torch.autocast(device.type, torch.bfloat16, enabled=devices.has_native_bf16(device.type)):
                model.weighted_nll(terms)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - start_s)
    finally:
        torch.set_num_threads(threads)
    return gain * ids.numel() / min(seconds[1:])


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
