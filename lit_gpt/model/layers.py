"""The blocks that the causal and the bidirectional model share, and the base class that turns them into a model.

Parameter names are the published checkpoints' (`transformer.h.N.attn.attn.weight`, ...), so a state dict loads without
renaming. Positions and visibility are explicit arguments, because a row's result may not depend on the other rows of its
batch.

B batch, T tokens, S cached and new tokens, W chosen columns, C width, H heads, G query groups, D head size, V padded
vocabulary.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.config import Config
from lit_gpt.model import kernels
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.model.visibility import Visibility


class RMSNorm(nn.Module):
    """`kernels.rms_norm` with its weight (C,), ones at the start."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return kernels.rms_norm(x, self.weight, self.eps)


class AttentionContext(NamedTuple):
    """What attention needs in every block beside the hidden states; computed once for a forward pass."""

    rope: tuple[Tensor, Tensor]
    """cos and sin at the tokens' positions, (T, D/2) or (B, 1, T, D/2) float32 each."""
    is_causal: bool
    """As `kernels.attention`."""
    mask: Tensor | None
    """As `kernels.attention`."""
    columns: Tensor | None = None
    """(B, W) int64: the only columns whose output is wanted; None for all."""
    query_rope: tuple[Tensor, Tensor] | None = None
    """`rope` at `columns`, (B, 1, W, D/2); None without `columns`."""


class KeyValueCache(Protocol):
    """Keys and values of tokens that were read before, per layer; the new tokens attend to them too.

    The new tokens stand in the last columns, unless every token attends to every other.
    """

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take the new tokens' keys and values (B, G, T, D) in; returns those of all columns, (B, G, S, D)."""
        ...

    def total_columns(self, new_tokens: int) -> int:
        """S: how many columns there are with so many new tokens."""
        ...


LayerUpdate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""`KeyValueCache.update` of one layer."""


class SelfAttention(nn.Module):
    """Multi-head attention with rotary positions; q, k and v come from one matrix, rows in query groups."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        rows = (config.n_head + 2 * config.n_query_groups) * config.head_size
        self.attn = nn.Linear(config.n_embd, rows, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, context: AttentionContext, cached: LayerUpdate | None = None) -> Tensor:
        """(B, T, C) to (B, T, C), or to (B, W, C) at the context's columns."""
        q, k, v = self._project(x, context.columns)
        q, k = kernels.rotary(q, *(context.query_rope or context.rope)), kernels.rotary(k, *context.rope)
        if cached is not None:
            k, v = cached(k, v)
        y = kernels.attention(q, k, v, context.is_causal, context.mask)
        return self.proj(y.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T or W, D), at some columns or all; keys and values (B, G, T, D)."""
        batch, length, width = x.shape
        heads, groups, size = self.config.n_head, self.config.n_query_groups, self.config.head_size
        per_group = heads // groups
        # Each group's rows are its query heads, then one key head, then one value head.
        if columns is None:
            qkv = self.attn(x).view(batch, length, groups, per_group + 2, size)
            q, k, v = qkv.split((per_group, 1, 1), dim=3)
            q, k, v = q.reshape(batch, length, heads, size), k.squeeze(3), v.squeeze(3)
        else:
            by_group = self.attn.weight.view(groups, per_group + 2, size, width)
            q = F.linear(_at_columns(x, columns), by_group[:, :-2].reshape(-1, width)).view(batch, -1, heads, size)
            k, v = F.linear(x, by_group[:, -2:].reshape(-1, width)).view(batch, length, groups, 2, size).unbind(3)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _at_columns(x: Tensor, columns: Tensor) -> Tensor:
    """(B, T, C) at columns (B, W): (B, W, C)."""
    return x[torch.arange(len(x), device=x.device)[:, None], columns]


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

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = SelfAttention(config)
        self.norm_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.keeps_products = False
        """Keep the outputs of matrix products and attention for backward, and compute everything else again there."""

    def forward(self, x: Tensor, context: AttentionContext, cached: LayerUpdate | None = None) -> Tensor:
        """(B, T, C) to (B, T, C), or to (B, W, C) at the context's columns."""
        if self.keeps_products and torch.is_grad_enabled():
            # In here, where torch.compile sees it: around a compiled block it would see none of the products.
            return torch.utils.checkpoint.checkpoint(
                self._compute, x, context, cached, use_reentrant=False, context_fn=_keep_products
            )
        return self._compute(x, context, cached)

    def _compute(self, x: Tensor, context: AttentionContext, cached: LayerUpdate | None) -> Tensor:
        attended = self.attn(self.norm_1(x), context, cached)
        x = (x if context.columns is None else _at_columns(x, context.columns)) + attended
        return x + self.mlp(self.norm_2(x))


def _keep_products() -> Any:
    """The contexts of a forward pass and its repetition in backward, for `torch.utils.checkpoint`."""
    return torch.utils.checkpoint.create_selective_checkpoint_contexts(_is_kept)


def _is_kept(context: Any, operation: Any, *_: Any, **__: Any) -> Any:
    """Whether an operation's output is kept: matrix products and attention, by any kernel."""
    name = operation.overloadpacket.__name__
    kept = name in ("mm", "addmm", "bmm", "baddbmm") or "attention" in name or "flash" in name
    policy = torch.utils.checkpoint.CheckpointPolicy
    return policy.MUST_SAVE if kept else policy.PREFER_RECOMPUTE


class Transformer(nn.Module):
    """Embedding, blocks, final norm, head. Subclasses say what differs: visibility and the embedding's rows."""

    kind: ClassVar[str]
    """`arm` or `mdm`: how names of runs and exports, and metadata, call the model."""
    visibility: ClassVar[Visibility]
    """Which tokens each token attends to."""
    transformer: Any
    """wte, h (the blocks) and ln_f, under the published names."""
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(self.embedding_rows(config), config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": RMSNorm(config.n_embd, config.norm_eps),
            }
        )
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.checkpoint_blocks = False

    @property
    def checkpoint_blocks(self) -> bool | str:
        """Activation checkpointing: True computes each block again in backward, `selective` all but products and attention."""
        return self._checkpoint_blocks

    @checkpoint_blocks.setter
    def checkpoint_blocks(self, value: bool | str) -> None:
        self._checkpoint_blocks = value
        for block in self.transformer.h:
            block.keeps_products = value == "selective"

    @classmethod
    def from_name(cls, name: str | int, **overrides: Any) -> Self:
        """Build a published size; arguments and errors as `Config.from_name`."""
        return cls(Config.from_name(name, **overrides))

    @classmethod
    def embedding_rows(cls, config: Config) -> int:
        """Rows of the embedding table."""
        return config.padded_vocab_size

    @property
    def parameter_count(self) -> int:
        """Numbers that are learnt, the embedding and the head included."""
        return sum(parameter.numel() for parameter in self.parameters())

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
        if enabled:
            # Else DDP would have each block cut where its buckets end.
            torch._dynamo.config.optimize_ddp = False
        for block in self.transformer.h:
            if enabled:
                block.compile(dynamic=False)
            else:
                block._compiled_call_impl = None

    def forward(
        self, input_ids: Tensor, positions: Tensor | None = None, visibility: Visibility | None = None
    ) -> Tensor:
        """Logits (B, T, V) of every position; arguments as `hidden_states`."""
        return self.lm_head(self.hidden_states(input_ids, positions, visibility))

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        visibility: Visibility | None = None,
        cache: KeyValueCache | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """The final norm's output at every position, or at some.

        Args:
            input_ids: (B, T) int64.
            positions: (B, T) int64 in [0, block_size); None means 0, 1, ... and goes without a cache only.
            visibility: which columns each column attends to, over the cache's and the new ones; None for the model's own.
            cache: keys and values of tokens that were read before; takes in the new ones.
            columns: (B, W) int64, the only columns that are wanted: the last block then computes nothing else but the
                keys and values of the others.

        Returns:
            (B, T, C), or (B, W, C) with `columns`.

        Raises:
            ValueError: the input is longer than the model's block size.
        """
        length, device = input_ids.size(1), input_ids.device
        if positions is None and length > self.config.block_size:
            raise ValueError(f"input of {length} tokens: this model reads at most {self.config.block_size}")
        assert positions is not None or cache is None
        visibility = visibility or self.visibility
        keys = length if cache is None else cache.total_columns(length)
        rope = (self.rope_cos[:length], self.rope_sin[:length]) if positions is None else self._rope_at(positions)
        context = AttentionContext(rope, *visibility.attention_arguments(length, keys, device))
        x = self.transformer.wte(input_ids)
        for layer, block in enumerate(self.transformer.h):
            if columns is not None and layer == self.config.n_layer - 1:
                query_rope = self._rope_at(columns if positions is None else positions.gather(1, columns))
                arguments = visibility.attention_arguments(columns, keys, device)
                context = AttentionContext(rope, *arguments, columns, query_rope)
            if self.checkpoint_blocks is True and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context, None if cache is None else functools.partial(cache.update, layer))
        return self.transformer.ln_f(x)

    def _rope_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin at positions (B, T): (B, 1, T, D/2) each."""
        return self.rope_cos[positions][:, None], self.rope_sin[positions][:, None]

    def weighted_nll(self, terms: LossTerms) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sum of cross-entropies, with the head run only where a weight is not 0.

        Returns:
            sum(weights * CE) as a differentiable scalar; the N cross-entropies in nats, detached float32; and the
            (N,) int64 indices of their positions in the flattened (B * T).
        """
        hidden = self.hidden_states(terms.input_ids, terms.positions, terms.visibility).flatten(0, 1)
        targets, weights = terms.targets.flatten(), terms.weights.flatten()
        scored = terms.scored if terms.scored is not None else weights.nonzero().squeeze(1)
        if len(scored) < len(weights):
            hidden, targets, weights = (rows.index_select(0, scored) for rows in (hidden, targets, weights))
        total, nll = kernels.linear_cross_entropy(hidden, self.lm_head.weight, targets, weights)
        return total, nll, scored


def rope_tables(config: Config) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/D), each (block_size, D/2) float32, rounded as the config says."""
    exponent = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    frequencies = 1.0 / config.rope_theta**exponent
    angles = torch.outer(torch.arange(config.block_size, dtype=torch.float32), frequencies)
    dtype = torch.bfloat16 if config.rope_table_dtype == "bfloat16" else torch.float32
    return angles.cos().to(dtype).float(), angles.sin().to(dtype).float()
