"""The blocks that the causal and the bidirectional model share, and the base class that turns them into a model.

Decisions: parameter names are the published checkpoints' (SPEC: `transformer.h.N.attn.attn.weight`, ...), so a state
dict loads without renaming; whether attention is causal is one class attribute of the model; positions and padding are
explicit arguments, because a row's result may not depend on its batch-mates. May import kernels and config only.

B batch, T tokens, S cached and new tokens, C width, H heads, G query groups, D head size, V padded vocabulary.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.config import Config
from lit_gpt.model import kernels


class RMSNorm(nn.Module):
    """`kernels.rms_norm` with its weight (C,), ones at the start."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return kernels.rms_norm(x, self.weight, self.eps)


class LayerCache:
    """Keys and values of one layer, in memory that is allocated once.

    Attributes:
        k: (B, G, capacity, D).
        v: (B, G, capacity, D).
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def append(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write (B, G, T, D) at column `start`; returns all keys and values up to start + T."""
        end = start + k.size(2)
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        return self.k[:, :, :end], self.v[:, :, :end]


class SelfAttention(nn.Module):
    """Multi-head attention with rotary positions; q, k and v come from one matrix, rows in query groups."""

    def __init__(self, config: Config, causal: bool) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        rows = (config.n_head + 2 * config.n_query_groups) * config.head_size
        self.attn = nn.Linear(config.n_embd, rows, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        key_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        start: int = 0,
    ) -> Tensor:
        """(B, T, C) to (B, T, C); see `Transformer.hidden_states` for the arguments."""
        batch, length, _ = x.shape
        heads, groups, size = self.config.n_head, self.config.n_query_groups, self.config.head_size
        per_group = heads // groups
        # Each group's rows are its query heads, then one key head, then one value head.
        qkv = self.attn(x).view(batch, length, groups, per_group + 2, size)
        q, k, v = qkv.split((per_group, 1, 1), dim=3)
        q = kernels.rotary(q.reshape(batch, length, heads, size).transpose(1, 2), *rope)
        k = kernels.rotary(k.squeeze(3).transpose(1, 2), *rope)
        v = v.squeeze(3).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v, start)
        y = kernels.attention(q, k, v, self.causal, key_mask)
        return self.proj(y.transpose(1, 2).reshape(batch, length, heads * size))

    def look_from(
        self,
        seen: Tensor,
        own: Tensor,
        rope: tuple[Tensor, Tensor],
        own_rope: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
    ) -> Tensor:
        """What some positions see: `forward` with keys and values of all tokens and queries of a few.

        Args:
            seen: (B, T, C).
            own: (B, W, C), the rows of `seen` that look.
            rope: of all tokens.
            own_rope: of those that look.
            key_mask: (B, T) bool or None.

        Returns:
            (B, W, C).
        """
        assert not self.causal
        batch, length, width = seen.shape
        heads, groups, size = self.config.n_head, self.config.n_query_groups, self.config.head_size
        by_group = self.attn.weight.view(groups, heads // groups + 2, size, width)
        q = F.linear(own, by_group[:, :-2].reshape(-1, width)).view(batch, -1, heads, size).transpose(1, 2)
        k, v = F.linear(seen, by_group[:, -2:].reshape(-1, width)).view(batch, length, groups, 2, size).unbind(3)
        q, k = kernels.rotary(q, *own_rope), kernels.rotary(k.transpose(1, 2), *rope)
        y = kernels.attention(q, k, v.transpose(1, 2), False, key_mask)
        return self.proj(y.transpose(1, 2).reshape(batch, -1, heads * size))


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.n_embd, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return self.w3(kernels.swiglu(self.w1(x), self.w2(x)))


class MLP(nn.Module):
    """The feed-forward half of a block; the extra level is in the published parameter names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.swiglu = SwiGLU(config)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return self.swiglu(x)


class Block(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(x))."""

    def __init__(self, config: Config, causal: bool) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = SelfAttention(config, causal)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        key_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        start: int = 0,
    ) -> Tensor:
        """(B, T, C) to (B, T, C); see `Transformer.hidden_states` for the arguments."""
        x = x + self.attn(self.norm_1(x), rope, key_mask, cache, start)
        return x + self.mlp(self.norm_2(x))

    def look_from(
        self,
        x: Tensor,
        columns: Tensor,
        rope: tuple[Tensor, Tensor],
        own_rope: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
    ) -> Tensor:
        """`forward` at some columns (B, W) of (B, T, C) only: (B, W, C)."""
        rows = torch.arange(len(x), device=x.device)[:, None]
        seen, own = self.norm_1(x), x[rows, columns]
        own = own + self.attn.look_from(seen, seen[rows, columns], rope, own_rope, key_mask)
        return own + self.mlp(self.norm_2(own))


class Transformer(nn.Module):
    """Embedding, blocks, final norm, head. Subclasses say what differs: causality and the embedding's rows."""

    kind: ClassVar[str]
    """`arm` or `mdm`: how names of runs and exports, and metadata, call the model."""
    causal: ClassVar[bool]
    transformer: Any
    """wte, h (the blocks) and ln_f, under the published names."""
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        """Recompute each block in backward instead of keeping its activations (activation checkpointing)."""
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(self.embedding_rows(config), config.n_embd),
                "h": nn.ModuleList(Block(config, self.causal) for _ in range(config.n_layer)),
                "ln_f": RMSNorm(config.n_embd, config.norm_eps),
            }
        )
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    @classmethod
    def from_name(cls, name: str | int, **overrides: Any) -> Self:
        """Build a published size; arguments and errors as `Config.from_name`."""
        return cls(Config.from_name(name, **overrides))

    @classmethod
    def embedding_rows(cls, config: Config) -> int:
        """Rows of the embedding table."""
        return config.padded_vocab_size

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights: N(0, 2/(5C)) for embeddings and linears, N(0, 1/(C L^2)) for what writes to the residual stream.

        A parameter's numbers depend on (seed, its name) alone, so they are the same on every device and world size.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            std = math.sqrt(2 / (5 * self.config.n_embd))
            if name.endswith(("attn.proj.weight", "w3.weight")):
                std = 1 / (math.sqrt(self.config.n_embd) * self.config.n_layer)
            # torch's CPU generator keeps 32 bits of a seed: mix all of ours into them.
            mixed = zlib.crc32(f"{seed}:{name}".encode())
            values = torch.empty(parameter.shape).normal_(0.0, std, generator=torch.Generator().manual_seed(mixed))
            parameter.copy_(values)

    def compile_blocks(self, enabled: bool = True) -> None:
        """Compile every block with torch.compile; they share one compiled code, so it costs one block's compilation."""
        for block in self.transformer.h:
            if enabled:
                block.compile(dynamic=False)
            else:
                block._compiled_call_impl = None

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of every position; arguments as `hidden_states`."""
        return self.lm_head(self.hidden_states(input_ids, positions, key_mask))

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        key_mask: Tensor | None = None,
        caches: list[LayerCache] | None = None,
        start: int = 0,
        columns: Tensor | None = None,
    ) -> Tensor:
        """The final norm's output at every position, or at some.

        Args:
            input_ids: (B, T) int64.
            positions: (B, T) int64 in [0, block_size); None means start, start + 1, ...
            key_mask: (B, S) bool, False where a token is padding that no one may attend to; S = start + T.
            caches: one per layer, to be appended to from column `start`; None without a cache.
            start: columns that the caches hold already.
            columns: (B, W) int64, the only columns that are wanted: the last block then computes nothing else but the
                keys and values of the others. For bidirectional models without caches.

        Returns:
            (B, T, C), or (B, W, C) with `columns`.

        Raises:
            ValueError: the input is longer than the model's block size.
        """
        length = input_ids.size(1)
        if start + length > self.config.block_size and positions is None:
            raise ValueError(f"input of {start + length} tokens: this model reads at most {self.config.block_size}")
        if positions is None:
            rope = (self.rope_cos[start : start + length], self.rope_sin[start : start + length])
        else:
            rope = (self.rope_cos[positions][:, None], self.rope_sin[positions][:, None])
        x = self.transformer.wte(input_ids)
        blocks = list(self.transformer.h)
        for index, block in enumerate(blocks if columns is None else blocks[:-1]):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, rope, key_mask, use_reentrant=False)
            else:
                x = block(x, rope, key_mask, None if caches is None else caches[index], start)
        if columns is not None:
            at = columns if positions is None else positions.gather(1, columns)
            own_rope = (self.rope_cos[at][:, None], self.rope_sin[at][:, None])
            x = blocks[-1].look_from(x, columns, rope, own_rope, key_mask)
        return self.transformer.ln_f(x)

    def weighted_nll(
        self, input_ids: Tensor, targets: Tensor, weights: Tensor, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sum of cross-entropies, with the head run only where a weight is not 0.

        Args:
            input_ids: (B, T) int64, what the model reads.
            targets: (B, T) int64, what each position should predict.
            weights: (B, T) float32, 0 where a position is not scored.
            key_mask: as `hidden_states`.

        Returns:
            sum(weights * CE) as a differentiable scalar; the N cross-entropies in nats, detached float32; and the
            (N,) int64 indices of their positions in the flattened (B * T).
        """
        hidden = self.hidden_states(input_ids, key_mask=key_mask)
        scored = weights.flatten().nonzero().squeeze(1)
        total, nll = kernels.linear_cross_entropy(
            hidden.flatten(0, 1)[scored],
            self.lm_head.weight,
            targets.flatten()[scored],
            weights.flatten()[scored],
        )
        return total, nll, scored


def rope_tables(config: Config) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/D), each (block_size, D/2) float32, rounded as the config says."""
    exponent = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    frequencies = 1.0 / config.rope_theta**exponent
    angles = torch.outer(torch.arange(config.block_size, dtype=torch.float32), frequencies)
    dtype = torch.bfloat16 if config.rope_table_dtype == "bfloat16" else torch.float32
    return angles.cos().to(dtype).float(), angles.sin().to(dtype).float()
