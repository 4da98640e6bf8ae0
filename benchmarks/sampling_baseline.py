"""Masked-diffusion sampling as published: every step reads the whole row and computes with every position's logits.

The plain side of `sampling.py`'s comparison, in a process of its own: float64 Gumbel noise and softmax over the whole
vocabulary at every position, one top-k over the batch, logits of all positions, no step left out. The published formula,
argmax exp(logit) / (-log u)^temperature, draws its noise at temperature 0 as well, where it becomes 1; `shortcut` takes the
argmax there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_gpt.model.layers import Transformer


@torch.no_grad()
def sample(
    model: Transformer, prompt: Tensor, shape: tuple[int, int], temperature: float, greedy: bool, shortcut: bool = False
) -> Tensor:
    """Complete prompts (B, P) to (B, context length); `shape` is (context length, steps)."""
    context_length, steps = shape
    mask_id = model.config.mask_id
    rows = torch.full((len(prompt), context_length), mask_id)
    rows[:, : prompt.size(1)] = prompt
    times = torch.linspace(1, 1e-5, steps + 1)
    for step in range(steps):
        mask = rows == mask_id
        logits = model(rows)
        noisy = logits
        if temperature > 0 or not shortcut:
            wide = logits.to(torch.float64)
            noise = (-torch.log(torch.rand_like(wide))) ** temperature
            noisy = wide.exp() / noise
        tokens = noisy.argmax(-1)
        share = 1 - times[step + 1] / times[step] if step < steps - 1 else torch.ones(())
        if not greedy:
            reveal = mask & (torch.rand(rows.shape) < share)
            rows = torch.where(reveal, tokens, rows)
            continue
        probability = logits.to(torch.float64).softmax(-1).gather(2, tokens[..., None]).squeeze(2)
        confidence = torch.where(mask, probability, -torch.inf).flatten()
        count = int(mask.sum() * share)
        if count:
            chosen = confidence.topk(count).indices
            rows.view(-1)[chosen] = tokens.flatten()[chosen]
    return rows
