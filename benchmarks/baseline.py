"""The plain training step that `training_speed.py` measures ours against: what one writes first, and no more.

Eager torch, logits for every position with `F.cross_entropy`, AdamW parameter by parameter. It is a model of its own, so
that nothing done to `lit_gpt` can make it faster; its parameters bear the same names, so that both can start from the same
weights and be held to the same loss. May import `lit_gpt.config` only.

B batch, T tokens, H heads, D head size, C width, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.config import Config


class PlainNorm(nn.Module):
    """RMSNorm, step by step."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class PlainAttention(nn.Module):
    """Multi-head attention with rotary positions (as many key heads as query heads)."""

    def __init__(self, config: Config, causal: bool) -> None:
        super().__init__()
        assert config.n_head == config.n_query_groups, "the baseline knows the published sizes only"
        self.heads, self.causal = config.n_head, causal
        self.attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        batch, length, width = x.shape
        qkv = self.attn(x).view(batch, length, self.heads, 3, -1)
        q, k, v = (part.squeeze(3).transpose(1, 2) for part in qkv.split(1, dim=3))
        q, k = (_rotate(part, cos, sin) for part in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


class PlainMLP(nn.Module):
    """w3(silu(w1 x) * w2 x), under the published names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.swiglu = nn.ModuleDict(
            {
                "w1": nn.Linear(config.n_embd, config.intermediate_size, bias=False),
                "w2": nn.Linear(config.n_embd, config.intermediate_size, bias=False),
                "w3": nn.Linear(config.intermediate_size, config.n_embd, bias=False),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        layers = self.swiglu
        return layers["w3"](F.silu(layers["w1"](x)) * layers["w2"](x))


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: Config, causal: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = PlainNorm(config), PlainNorm(config)
        self.attn, self.mlp = PlainAttention(config, causal), PlainMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.attn(self.norm_1(x), cos, sin)
        return x + self.mlp(self.norm_2(x))


class PlainModel(nn.Module):
    """Embedding, blocks, final norm, head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config, causal: bool) -> None:
        super().__init__()
        rows = config.padded_vocab_size + (not causal)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(rows, config.n_embd),
                "h": nn.ModuleList(PlainBlock(config, causal) for _ in range(config.n_layer)),
                "ln_f": PlainNorm(config),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        inverse = config.rope_theta ** (-torch.arange(0, config.head_size, 2).float() / config.head_size)
        angles = torch.outer(torch.arange(config.block_size).float(), inverse)
        self.register_buffer("cos", angles.cos().bfloat16().float(), persistent=False)
        self.register_buffer("sin", angles.sin().bfloat16().float(), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of input_ids (B, T)."""
        length = input_ids.size(1)
        x = self.transformer["wte"](input_ids)
        blocks = cast(nn.ModuleList, self.transformer["h"])
        for block in blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        return self.lm_head(self.transformer["ln_f"](x))


def loss(model: nn.Module, input_ids: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """sum(weights * CE) over the logits of all positions; weights (B, T) are 0 where nothing is scored."""
    logits = model(input_ids)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return (cross_entropy * weights.flatten()).sum()


def optimizer(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW, one parameter after the other."""
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, foreach=False, fused=False
    )


def step(model: nn.Module, adamw: torch.optim.AdamW, batch: tuple[Tensor, Tensor, Tensor], bf16: bool) -> float:
    """One optimizer step, the gradient clipped to 1.

    Args:
        model: a PlainModel.
        adamw: its optimizer.
        batch: input_ids, targets and weights, (B, T) each.
        bf16: whether matrix products run in bfloat16 (autocast).

    Returns:
        The loss.
    """
    adamw.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        total = loss(model, *batch)
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
    adamw.step()
    return total.item()
