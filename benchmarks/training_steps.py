"""The training steps that `training_speed.py` and `gpu.py` compare, all on one batch with one count of useful FLOPs.

Each step is forward, backward, clipping to norm 1 and AdamW on the same batch at the same shape, built as its own project
builds it: ours as `lit_gpt.training.loop` does, litgpt's as its pretrain.py (compiled model, plain AdamW), transformers' as its
Trainer (eager, fused AdamW).

B batch, T tokens, L layers, C width, V vocabulary.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import baseline
from lit_gpt import diffusion
from lit_gpt.checkpoints.weights import MODEL_CLASSES
from lit_gpt.config import Config
from lit_gpt.devices import keep_freed_memory
from lit_gpt.model import kernels
from lit_gpt.model.layers import Transformer
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.randomness import Stream, uniform_grid

Step = Callable[[LossTerms], Tensor | float]
"""Takes one step; returns its loss, on the device where that need not be waited for."""
LEARNING_RATE = 2e-4
SEED = 3407


@dataclass(frozen=True)
class Cell:
    """What is trained: a kind of model, its size, and the batch's shape."""

    kind: str
    """arm or mdm."""
    size: int
    """Millions of non-embedding parameters."""
    batch: int
    """Sequences."""
    length: int
    """Tokens of a sequence."""
    device: str = "cpu"
    """Where it is trained; the baseline and the matrix products run on the CPU only."""

    @property
    def config(self) -> Config:
        return Config.from_name(self.size, block_size=max(2048, self.length))

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def make_batch(self, number: int) -> LossTerms:
        """Random tokens and the training weights of step `number`, on the device, as training's reader prepares them."""
        config = self.config
        generator = torch.Generator().manual_seed(SEED + number)
        ids = torch.randint(config.vocab_size, (self.batch, self.length + 1), generator=generator)
        if self.kind == "arm":
            weights = torch.full((self.batch, self.length), 1 / self.tokens)
            return self._placed(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights)
        rows = torch.arange(self.batch)
        p_mask = diffusion.masking_probability(diffusion.diffusion_times(SEED, number, rows, self.batch))
        uniforms = uniform_grid(SEED, Stream.MASK, number, rows, self.length)
        noisy_input, mask = diffusion.forward_process(ids[:, :-1], p_mask, uniforms, config.mask_id)
        weights = diffusion.loss_weights(mask, p_mask, torch.full((self.batch,), 1 / self.tokens))
        return self._placed(noisy_input, ids[:, :-1].contiguous(), weights)

    def _placed(self, input_ids: Tensor, targets: Tensor, weights: Tensor) -> LossTerms:
        device = torch.device(self.device)
        return LossTerms(input_ids, targets, weights, weights != 0).prepared_for(device).to(device)

    @property
    def scored(self) -> int:
        """Rows of the first batch that the loss needs."""
        return int(self.make_batch(0).in_denominator.sum())

    def products(self, scored: int) -> list[tuple[int, int, int, int]]:
        """The step's matrix products with weights, forward and backward: (how often, rows, inner, columns)."""
        config = self.config
        width, mlp, layers = config.n_embd, config.intermediate_size, config.n_layer
        qkv = (config.n_head + 2 * config.n_query_groups) * config.head_size
        linears = [(layers, self.tokens, width, qkv), (layers, self.tokens, width, width)]
        linears += [(2 * layers, self.tokens, width, mlp), (layers, self.tokens, mlp, width)]
        linears += [(1, scored, width, config.padded_vocab_size)]
        shapes = []
        for often, rows, inner, columns in linears:
            shapes += [(often, rows, inner, columns), (often, rows, columns, inner), (often, columns, rows, inner)]
        return shapes

    def useful_flops(self, scored: int) -> float:
        """FLOPs that the step's mathematics needs: 6 per weight and token (the head: per scored token), and attention's.

        Attention is 12 L T C per token (Chowdhery et al. 2022), half of it under a causal mask. Recomputation and logits
        that nothing scores do not count.
        """
        config = self.config
        linear = sum(2.0 * often * rows * inner * columns for often, rows, inner, columns in self.products(scored))
        attention = 12.0 * config.n_layer * self.length * config.n_embd * self.tokens
        return linear + (attention / 2 if self.kind == "arm" else attention)


def build_model(cell: Cell) -> Transformer:
    """Our model of a cell on its device, with initial weights."""
    model = MODEL_CLASSES[cell.kind](cell.config)
    model.init_weights(SEED)
    return model.to(cell.device)


def compute_type(bf16: bool) -> torch.dtype:
    """What matrix products run in."""
    return torch.bfloat16 if bf16 else torch.float32


@functools.cache
def attention_times(cell: Cell, bf16: bool) -> dict[str, float]:
    """Milliseconds by attention kernel at a cell's shape, the fastest first; empty where there is no choice."""
    config, model_class = cell.config, MODEL_CLASSES[cell.kind]
    is_causal, _ = model_class.visibility.attention_arguments(cell.length, cell.length)
    shape = (cell.batch, config.n_head, cell.length, config.head_size)
    device = torch.device(cell.device)
    return kernels.measured_attention(shape, config.n_query_groups, is_causal, device, compute_type(bf16))


def ours(cell: Cell, bf16: bool, compiled: bool = True, checkpointing: bool | str = False) -> Step:
    """`lit_gpt`: the attention that is the fastest here, scored rows only in the head, fused AdamW, compiled blocks."""
    if cell.device == "cpu":
        keep_freed_memory()
    model = build_model(cell)
    model.checkpoint_blocks = checkpointing
    attention = next(iter(attention_times(cell, bf16)), "auto")
    kernels.choose(attention, torch.device(cell.device), compute_type(bf16), compiled)
    model.compile_blocks(compiled)
    adamw = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )

    return _stepper(
        model,
        adamw,
        lambda batch: model.weighted_nll(batch)[0],
        torch.autocast(cell.device, torch.bfloat16, enabled=bf16),
    )


def ours_eager(cell: Cell, bf16: bool) -> Step:
    """`lit_gpt` without torch.compile, as short runs go."""
    return ours(cell, bf16, compiled=False)


def plain(cell: Cell, bf16: bool) -> Step:
    """The baseline, from our weights, so that both must show the same loss."""
    model = baseline.PlainModel(cell.config, cell.kind == "arm")
    model.load_state_dict(build_model(cell).state_dict())
    adamw = baseline.optimizer(model, LEARNING_RATE)
    return lambda batch: baseline.step(model, adamw, batch[:3], bf16)


def litgpt(cell: Cell, bf16: bool) -> Step:
    """litgpt's model and loss as its pretrain.py uses them: torch.compile of the whole model, AdamW at its defaults."""
    from litgpt.config import Config as LitConfig
    from litgpt.model import GPT as LitGPT
    from litgpt.utils import chunked_cross_entropy

    config = cell.config
    shape = LitConfig(
        name="benchmark",
        block_size=config.block_size,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.padded_vocab_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_query_groups=config.n_query_groups,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=config.norm_eps,
        mlp_class_name="LLaMAMLP",
        intermediate_size=config.intermediate_size,
    )
    with torch.device(cell.device):
        model = LitGPT(shape)
    model.max_seq_length = cell.length
    compiled = torch.compile(model)
    adamw = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)

    def loss(batch: LossTerms) -> Tensor:
        return chunked_cross_entropy(compiled(batch.input_ids), batch.targets, chunk_size=0)  # type: ignore[no-any-return]

    return _stepper(model, adamw, loss, torch.autocast(cell.device, torch.bfloat16, enabled=bf16))


def transformers(cell: Cell, bf16: bool) -> Step:
    """transformers' LlamaForCausalLM with its own loss, eager, and the fused AdamW that its Trainer takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = cell.config
    shape = LlamaConfig(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_query_groups,
        max_position_embeddings=config.block_size,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device(cell.device):
        model = LlamaForCausalLM(shape).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss(batch: LossTerms) -> Tensor:
        # It shifts the labels itself, so it scores one token per row fewer than the others.
        return model(input_ids=batch.input_ids, labels=batch.input_ids).loss  # type: ignore[no-any-return]

    return _stepper(model, adamw, loss, torch.autocast(cell.device, torch.bfloat16, enabled=bf16))


def _stepper(
    model: nn.Module, adamw: torch.optim.AdamW, loss: Callable[[LossTerms], Tensor], autocast: torch.autocast
) -> Step:
    """Forward, backward, clip, AdamW."""

    def step(batch: LossTerms) -> Tensor:
        with autocast:
            total = loss(batch)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return total.detach()

    return step


class MatmulRate:
    """The matrix products of a cell alone, in one precision: what the machine reaches on these shapes."""

    def __init__(self, cell: Cell, scored: int, bf16: bool) -> None:
        dtype = torch.bfloat16 if bf16 else torch.float32
        self._work: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self.flops = 0.0
        for often, rows, inner, columns in cell.products(scored):
            left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
            self._work.append((often, left, right, torch.empty(rows, columns, dtype=dtype)))
            self.flops += 2.0 * often * rows * inner * columns

    def step(self, batch: Any = None) -> float:
        """Run every product as often as a training step does, into memory that is there already."""
        for often, left, right, out in self._work:
            for _ in range(often):
                torch.mm(left, right.T, out=out)
        return 0.0


def matmul(cell: Cell, bf16: bool) -> Step:
    """`MatmulRate` on the cell's own batch, as a step."""
    return MatmulRate(cell, cell.scored, bf16).step


STEPS: dict[str, Callable[[Cell, bool], Step]] = {
    "baseline": plain,
    "ours, eager": ours_eager,
    "ours": ours,
    "ours, eager, selective": functools.partial(ours, compiled=False, checkpointing="selective"),
    "ours, selective": functools.partial(ours, checkpointing="selective"),
    "litgpt": litgpt,
    "transformers": transformers,
    "matmul": matmul,
}


def timed_step(name: str, cell: Cell, bf16: bool, threads: int, clock: str) -> Callable[[], tuple[float, float]]:
    """One of `STEPS` as a function that takes one step and returns its seconds and its loss."""
    if threads:
        torch.set_num_threads(threads)
    now = time.perf_counter if clock == "wall" else time.process_time
    step = STEPS[name](cell, bf16)
    # One batch throughout: another would have another number of scored rows, and rounds could not be compared.
    batch = cell.make_batch(0)

    def run() -> tuple[float, float]:
        start = now()
        loss = float(step(batch))
        return now() - start, loss

    return run


def bf16_is_native(seconds: Callable[[Callable[[], Any]], float]) -> tuple[bool, float, float]:
    """Whether bfloat16 products are no slower than half of float32's, and both rates in FLOP/s."""
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(256, 512).to(dtype), torch.randn(512, 512).to(dtype)
        F.linear(left, right)
        rates.append(2.0 * 256 * 512 * 512 / min(seconds(lambda: F.linear(left, right)) for _ in range(3)))  # noqa: B023
    return rates[1] > rates[0] / 2, rates[1], rates[0]
