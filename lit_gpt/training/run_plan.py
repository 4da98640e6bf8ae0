"""What a pretraining run will take, before it is started: steps, tokens, time, memory of a GPU, sizes of its files.

Steps, tokens and FLOPs are training's own functions. Memory is counted from what the model keeps for its backward pass,
tensor by tensor, without torch.compile (which keeps less); `tests/training/test_run_plan.py` holds it to 15 % of what
torch's profiler counts in real steps of one process and of several that share a model. Not counted: what the driver,
the libraries and gaps between tensors take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lit_gpt.config import Config
from lit_gpt.model import kernels
from lit_gpt.model.layers import Transformer
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.training import schedule, speed_monitor
from lit_gpt.training.strategies import strategy_name

# Of a masked diffusion model's positions, the share that is masked and so scored: the mean of p = (1 - eps) t + eps.
_SCORED_SHARE = {"arm": 1.0, "mdm": 0.5005}
# Of a GPU's memory, what a plan fills at most.
_MEMORY_SHARE = 0.9
_FLOAT32 = 4


@dataclass(frozen=True)
class GpuKind:
    """What NVIDIA's data sheets say of a GPU."""

    memory_gb: float
    """Memory in units of 1e9 bytes."""
    bf16_tflops: float
    """Peak of matrix products in bfloat16 without sparsity, in 1e12 FLOPs a second."""


GPU_KINDS = {
    "a100-40": GpuKind(40, 312),
    "a100": GpuKind(80, 312),
    "h100": GpuKind(80, 989),
    "h200": GpuKind(141, 989),
    "b200": GpuKind(180, 2250),
    "l40s": GpuKind(48, 362),
    "a6000": GpuKind(48, 155),
    "4090": GpuKind(24, 165),
}
"""By the names that `--gpu` takes."""


@dataclass(frozen=True)
class StepShape:
    """What decides the memory of a step beside the model's config."""

    model_class: type[Transformer]
    """GPT or TransEncoder."""
    precision: str
    """bf16-mixed, bf16-true or 32-true."""
    checkpointing: bool | str
    """Whether activations are computed again in the backward pass: as `--activation_checkpointing`."""
    logits_at_once: int
    """Logits of the loss that exist at one time (`kernels.chunk_elements`)."""

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number that matrix products read."""
        return _FLOAT32 if self.precision == "32-true" else 2

    @property
    def parameter_bytes(self) -> int:
        """Bytes of a parameter, a gradient and an optimizer's moment."""
        return 2 if self.precision == "bf16-true" else _FLOAT32


@dataclass(frozen=True)
class GpuMemory:
    """Memory of one GPU in a step that is not the first, in bytes."""

    parameters: float
    """Its share of them, whole ones where blocks compute, and copies in bf16 where products read those."""
    gradients: float
    """Whole ones, or where they are sharded and no micro batches accumulate those that are there at the peak."""
    optimizer: float
    """AdamW's two moments."""
    activations: float
    """The most that a micro batch adds, the logits apart."""
    logits: float
    """A chunk of logits, where the peak is in the loss; else 0."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits


def parameter_count(config: Config, model_class: type[Transformer]) -> int:
    """Parameters, the embedding and the head included."""
    rows = model_class.embedding_rows(config) + config.padded_vocab_size
    return config.non_embedding_params + rows * config.n_embd


def micro_batch_memory(config: Config, shape: StepShape, rows: int) -> tuple[float, float]:
    """What a micro batch adds at its peak: (activations, logits), in bytes.

    The peak is in the loss, when all blocks' activations are there, or in the backward pass of the last block.
    """
    width, inner, size = config.n_embd, config.intermediate_size, shape.compute_bytes
    tokens = rows * config.block_size
    key_width = config.n_query_groups * config.head_size
    qkv = width + 2 * key_width
    # Each norm keeps its input and the normed input in float32, and its output.
    norm = (2 * _FLOAT32 + size) * width
    # Rotated queries and keys, values (a view of qkv), attention's output and its copy; gate, silu, up and their product.
    block = 2 * norm + size * (qkv + width + key_width + 2 * width + 4 * inner)
    residual = _FLOAT32 * width
    # Of these, what a product or attention has made; and the two products whose outputs are added to the residual stream.
    products = size * (qkv + width + 2 * inner)
    kept_of_block = {
        False: block,
        True: residual,
        "selective": residual + products + 2 * size * width + _FLOAT32 * config.n_head,
    }
    again = {False: 0, True: block - residual, "selective": block - residual - products}[shape.checkpointing]
    kept = tokens * config.n_layer * kept_of_block[shape.checkpointing]
    head = width * config.padded_vocab_size
    scored = int(tokens * _SCORED_SHARE[shape.model_class.kind])
    # The head's gradient; in half precision also the head's copy and a product before it is added.
    loss = tokens * norm + 2 * size * width * scored + head * (shape.parameter_bytes if size == _FLOAT32 else 8)
    chunks = max(1, round(scored * config.padded_vocab_size / shape.logits_at_once))
    logits = -(-scored // chunks) * config.padded_vocab_size * (_FLOAT32 if size == _FLOAT32 else 2 * size + _FLOAT32)
    backward = tokens * (size * (2 * inner + width) + again)
    return (kept + loss, logits) if loss + logits > backward else (kept + backward, 0.0)


def gpu_memory(config: Config, shape: StepShape, rows: int, shards: int, accumulating: bool) -> GpuMemory:
    """Memory of a GPU in a training step.

    Args:
        config: of the model.
        shape: the rest of the model's side.
        rows: of a micro batch.
        shards: GPUs that share parameters, gradients and moments; 1 is DDP, whose buckets are the gradients.
        accumulating: whether a step has several micro batches, between which sharded parameters and gradients stay whole.
    """
    total, each = parameter_count(config, shape.model_class), shape.parameter_bytes
    blocks, head = config.non_embedding_params, config.n_embd * config.padded_vocab_size
    parameters, moments, gradients = each * total / shards, 2 * each * total / shards, float(each * total)
    activations, logits = micro_batch_memory(config, shape, rows)
    if shards == 1:
        if shape.precision == "bf16-mixed":
            # Autocast keeps what it has cast until the micro batch ends.
            parameters += 2 * blocks
        return GpuMemory(parameters, gradients, moments, activations, logits)
    # Gathered: embedding and head from forward to backward; of blocks two, the next one while one computes, or all while
    # micro batches accumulate. Blocks are gathered in what they compute in (`strategies._shard`).
    two_blocks = 2 * blocks / config.n_layer
    parameters += each * (total - blocks) + shape.compute_bytes * (blocks if accumulating else two_blocks)
    if accumulating:
        return GpuMemory(parameters, gradients, moments, activations, logits)
    # In the loss there is the head's gradient alone, which counts there; behind it that of a block, and what is sent of
    # another. When the backward pass ends there are all shares besides, and the embedding's, but no activations.
    gradients = 0.0 if logits else each * (head + two_blocks)
    at_end = each * (total / shards + total - blocks + two_blocks)
    if gradients + activations + logits < at_end:
        return GpuMemory(parameters, at_end, moments, 0.0, 0.0)
    return GpuMemory(parameters, gradients, moments, activations, logits)


def largest_micro_batch(
    config: Config, shape: StepShape, device_rows: int, shards: int, memory_bytes: float
) -> tuple[int, GpuMemory]:
    """The largest divisor of a device's rows that fits into its memory, and what it takes; (0, of one row) if none does."""
    divisors = [rows for rows in range(device_rows, 0, -1) if device_rows % rows == 0]
    for rows in divisors:
        memory = gpu_memory(config, shape, rows, shards, rows < device_rows)
        if memory.total <= memory_bytes * _MEMORY_SHARE:
            return rows, memory
    return 0, gpu_memory(config, shape, 1, shards, device_rows > 1)


@dataclass(frozen=True)
class PretrainingPlan:
    """A pretraining on some GPUs."""

    config: Config
    """Of the model."""
    model_class: type[Transformer]
    """GPT or TransEncoder."""
    steps: int
    """Optimizer steps."""
    batch_size: int
    """Sequences of a step, over all GPUs."""
    tokens_per_sample: float
    """Their mean length."""
    gpus: int
    """All of them."""
    gpus_per_node: int
    """Those that hybrid sharding shards over."""
    gpu: GpuKind
    """Their kind."""
    precision: str = "bf16-mixed"
    """As `--precision`."""

    @classmethod
    def of_budget(
        cls, flops: float, config: Config, batch_size: int, ssl_ratio: float, **others: object
    ) -> PretrainingPlan:
        """The plan of a budget in 1e18 FLOPs; the other fields by name.

        Raises:
            ValueError: the budget does not pay for one step.
        """
        length = schedule.mean_random_length(config.block_size, ssl_ratio)
        steps = schedule.budget_steps(flops, config.size_in_millions, batch_size, length)
        return cls(config, steps=steps, batch_size=batch_size, tokens_per_sample=length, **others)  # type: ignore[arg-type]

    @property
    def tokens(self) -> float:
        """Training tokens; on average, where lengths are random."""
        return self.steps * self.batch_size * self.tokens_per_sample

    def hours(self, mfu: float) -> float:
        """Duration at a share of the GPUs' peak."""
        length = round(self.tokens_per_sample)
        ids = torch.empty((1, length), dtype=torch.int64, device="meta")
        scored = round(length * _SCORED_SHARE[self.model_class.kind])
        terms = LossTerms(ids, ids, ids, ids)
        sample = speed_monitor.training_flops(self.config, terms, self.model_class.visibility, scored)
        return sample * self.batch_size * self.steps / (self.gpus * self.gpu.bf16_tflops * 1e12 * mfu) / 3600

    def file_bytes(self) -> tuple[int, int]:
        """(checkpoint with the optimizer's state, exported weights in float32)."""
        count, each = parameter_count(self.config, self.model_class), 2 if self.precision == "bf16-true" else _FLOAT32
        return 3 * each * count, _FLOAT32 * count

    def memory(self) -> Iterator[tuple[str, bool | str, int, GpuMemory]]:
        """By strategy and activation checkpointing, the least first: (strategy, checkpointing, micro batch or 0, memory)."""
        strategies = {"ddp": 1, "fsdp": self.gpus, "hybrid": min(self.gpus, self.gpus_per_node)}
        for strategy, shards in strategies.items():
            for checkpointing in (False, "selective", True):
                logits = kernels.chunk_elements(torch.device("cuda"))
                shape = StepShape(self.model_class, self.precision, checkpointing, logits)
                rows = self.batch_size // self.gpus
                yield (
                    strategy,
                    checkpointing,
                    *largest_micro_batch(self.config, shape, rows, shards, self.gpu.memory_gb * 1e9),
                )

    def lines(self, mfu: float, price_per_gpu_hour: float | None = None) -> Iterator[str]:
        """The plan for a console.

        Args:
            mfu: share of the GPUs' peak that training reaches.
            price_per_gpu_hour: of one GPU; None leaves the price out.
        """
        config, hours = self.config, self.hours(mfu)
        yield (
            f"{self.model_class.kind} {config.size_in_millions:.4g}M non-embedding parameters, {self.steps} steps of "
            f"{self.batch_size} x {config.block_size} tokens: {self.tokens:.4g} tokens"
        )
        price = "" if price_per_gpu_hour is None else f", price {hours * self.gpus * price_per_gpu_hour:,.0f}"
        yield (
            f"time: {hours:.1f} hours on {self.gpus} GPUs at {mfu:.0%} of {self.gpu.bf16_tflops:g} TFLOPs "
            f"({hours * self.gpus:.0f} GPU hours{price})"
        )
        checkpoint, export = self.file_bytes()
        yield f"files: a checkpoint {checkpoint / 1e9:.2f} GB, the exported model {export / 1e9:.2f} GB"
        if self.gpus > 1:
            default = strategy_name("auto", self.gpus, parameter_count(config, self.model_class))
            yield f"strategy: auto is {default} here"
        yield f"memory of a GPU of {self.gpu.memory_gb:g} GB, in GB ({self.precision}; largest micro batch that fits):"
        yield "strategy  checkpointing  micro batch  parameters  gradients  optimizer  activations  logits   total"
        for strategy, checkpointing, rows, memory in self.memory():
            parts = (memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.logits)
            sizes = "".join(f"{part / 1e9:{w}.1f}" for part, w in zip(parts, (12, 11, 11, 13, 8), strict=True))
            fits = f"{rows:11d}" if rows else "       none"
            recomputed = checkpointing if isinstance(checkpointing, str) else "yes" if checkpointing else "no"
            yield f"{strategy:8}  {recomputed:>13}  {fits}{sizes}{memory.total / 1e9:8.1f}"
