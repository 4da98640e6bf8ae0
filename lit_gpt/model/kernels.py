"""The arithmetic that decides speed: attention, RMSNorm, rotary, SwiGLU, and linear + cross-entropy on chosen rows.

Each is one function with a torch implementation that runs anywhere. Attention can also run on flash-attn or xformers
where they are installed and the tensors suit them, or on one of torch's own fast kernels; the elementwise kernels are
fused by torch.compile, which the trainer applies to whole blocks (`layers.Transformer.compile_blocks`) and, on GPUs, this
file to the softmax of the loss. This is the only file that knows what is installed, and it looks only when asked.

B batch, T query tokens, S key tokens, H heads, G query groups (key/value heads), D head size, C width, V vocabulary, N rows.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION_CHOICES = ("auto", "torch", "flash_attn", "xformers", "torch_flash", "torch_cudnn")
_PACKAGES = ("flash_attn", "xformers")
# Torch's own by name: the one that is meant, then those for tensors that it does not take. The other fast one is left
# out, because torch prefers cuDNN to flash or flash to cuDNN by its own judgement of the GPU.
_TORCH_KERNELS = {
    "torch_flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "torch_cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
# Calls of a kernel that is timed: cuDNN makes its plan in the first one, and clocks rise.
_WARM_UP_CALLS, _TIMED_CALLS = 3, 10
# Logits of the loss that exist at one time, in elements: 64 MB of float32 on CPUs, where 512 rows of 32000 took 385 ms in
# one chunk, 410 in two and 516 in eight (each chunk adds a pass over the head's gradient). On GPUs such a pass weighs as
# much as the products of 500 rows, so the chunks are larger.
_CPU_CHUNK_ELEMENTS, _GPU_CHUNK_ELEMENTS = 16 * 2**20, 128 * 2**20
# Keys up to which attention in bf16 on a CPU is two products: torch's flash kernel there does not use the bf16 units (4x256
# tokens, 6 heads, forward and backward: 9.9 ms, by products 3.7); beyond, the scores would take too much memory.
_PRODUCTS_KEYS = 256

_attention_choice = "torch"
_compile_loss = False


def choose(attention_kernel: str, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> str:
    """Fix the implementations for this process and say which they are.

    Args:
        attention_kernel: one of ATTENTION_CHOICES; `auto` takes flash-attn on CUDA in half precision if it is installed,
            then xformers, else torch (whose scaled_dot_product_attention chooses among kernels of its own). Training
            gives the name that `measured_attention` found instead.
        device: where the model runs.
        dtype: what the matrix products run in.
        compiled: whether torch.compile fuses the elementwise kernels.

    Returns:
        One line for the console.

    Raises:
        ValueError: a forced package is not installed or cannot run on this device and dtype.
    """
    global _attention_choice, _compile_loss
    suits = _suits_fast_attention(device, dtype)
    if attention_kernel not in ATTENTION_CHOICES:
        raise ValueError(
            f"attention kernel {attention_kernel!r} is unknown: choose from {', '.join(ATTENTION_CHOICES)}"
        )
    if attention_kernel == "auto":
        attention_kernel = next(iter(_installed() if suits else []), "torch")
    elif attention_kernel != "torch":
        if attention_kernel in _PACKAGES and attention_kernel not in _installed():
            raise ValueError(
                f"attention kernel {attention_kernel} is not installed: pip install 'smdm[fused]', or use torch"
            )
        if not suits:
            raise ValueError(
                f"attention kernel {attention_kernel} needs CUDA in bf16 or fp16, not {device.type} in "
                f"{str(dtype).removeprefix('torch.')}: use torch"
            )
    # On CPUs the loss's passes in place beat the compiled ones (385 ms to 513 ms for 512 rows); GPUs want fewer passes.
    _attention_choice, _compile_loss = attention_kernel, compiled and device.type != "cpu"
    blocks, loss = ("fused by torch.compile" if flag else "torch" for flag in (compiled, _compile_loss))
    return f"kernels: attention {attention_kernel}; rms_norm, rotary and swiglu {blocks}; linear + cross-entropy {loss}"


def measured_attention(
    shape: tuple[int, int, int, int], groups: int, is_causal: bool, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Time forward and backward of the attention kernels that are there, if there are several.

    Args:
        shape: (B, H, T, D) of the queries.
        groups: G, of the keys and values.
        is_causal: as `attention`.
        device: where the model runs.
        dtype: what the matrix products run in.

    Returns:
        Milliseconds by name, the fastest first; empty where `choose` has nothing to choose among.
    """
    if not _suits_fast_attention(device, dtype):
        return {}
    batch, _, length, size = shape
    key_shape = (batch, groups, length, size)
    q, k, v = (
        torch.randn(each, device=device, dtype=dtype, requires_grad=True) for each in (shape, key_shape, key_shape)
    )
    names = [*_installed(), *_torch_kernels(q, k, v, is_causal)]
    return fastest(names, lambda name: _milliseconds(name, q, k, v, is_causal)) if len(names) > 1 else {}


def fastest(candidates: Sequence[str], timer: Callable[[str], float]) -> dict[str, float]:
    """Every candidate's time, the least first; those that the timer cannot run are left out."""
    times = {}
    for name in candidates:
        try:
            times[name] = timer(name)
        except (RuntimeError, ValueError):  # a package's own refusal of this GPU or shape; others may take it
            continue
    return dict(sorted(times.items(), key=lambda item: item[1]))


def _milliseconds(name: str, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> float:
    """Mean time of a kernel's forward and backward on a GPU, by the GPU's own clock."""
    upstream = torch.ones_like(q)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for call in range(_WARM_UP_CALLS + _TIMED_CALLS):
        if call == _WARM_UP_CALLS:
            start.record()
        torch.autograd.grad(_chosen_attention(name, q, k, v, is_causal), (q, k, v), upstream)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _TIMED_CALLS


def _suits_fast_attention(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def _installed() -> list[str]:
    """The packages with attention kernels that are installed."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name)]


def _torch_kernels(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> list[str]:
    """Those of torch's own kernels that take these tensors."""
    backends = torch.backends.cuda
    params = backends.SDPAParams(q, k, v, None, 0.0, is_causal, q.size(1) != k.size(1))
    usable = {
        "torch_flash": backends.can_use_flash_attention(params),
        "torch_cudnn": backends.can_use_cudnn_attention(params),
    }
    return [name for name, can_use in usable.items() if can_use]


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, per head; see `Visibility.attention_arguments`.

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D); each key head serves H / G query heads.
        v: (B, G, S, D).
        is_causal: query i sees keys 0 to i; for T = S and without a mask.
        mask: bool, broadcasts to (B, H, T, S), False where a query does not see a key; None if each sees every key. A
            query without any key gives 0.

    Returns:
        (B, H, T, D), dtype of q.
    """
    if mask is None:
        if _attention_choice != "torch":
            return _chosen_attention(_attention_choice, q, k, v, is_causal)
        if q.size(2) == k.size(2) <= _PRODUCTS_KEYS and q.dtype == torch.bfloat16 and q.device.type == "cpu":
            return _attention_by_products(q, k, v, is_causal)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.size(1) != k.size(1)
    )


def _attention_by_products(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """`attention` of short rows as two batched products with all scores between them, the softmax in float32."""
    repeat = q.size(1) // k.size(1)
    if repeat > 1:
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * q.size(-1) ** -0.5
    if is_causal:
        past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~past, -torch.inf)
    return scores.softmax(-1).to(q.dtype) @ v


def _chosen_attention(name: str, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """`attention` by flash-attn or xformers, which both take (B, T, H, D) and CUDA half precision, or by a kernel of torch."""
    if name in _TORCH_KERNELS:
        with sdpa_kernel(_TORCH_KERNELS[name], set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=q.size(1) != k.size(1))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if name == "flash_attn":
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, causal=is_causal).transpose(1, 2)
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    repeat = q.size(2) // k.size(2)
    if repeat > 1:
        k, v = (x.repeat_interleave(repeat, dim=2) for x in (k, v))
    return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask() if is_causal else None).transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 (Zhang & Sennrich 2019).

    Args:
        x: (..., C).
        weight: (C,).
        eps: added to the mean square.

    Returns:
        (..., C) in the autocast dtype where autocast is on, so that what backward keeps is small; else dtype of x.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    device = x.device.type
    return normed.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves (x1, x2) of every head to (x1 cos - x2 sin, x2 cos + x1 sin), in float32 (Su et al. 2021).

    Args:
        x: (B, H, T, D).
        cos: (T, D/2) or (B, 1, T, D/2) float32.
        sin: likewise.

    Returns:
        (B, H, T, D), dtype of x.
    """
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020); same shape and dtype as its arguments."""
    return F.silu(gate) * up


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i row_weights_i * CE(hidden_i weight^T, targets_i), without ever holding all logits.

    Rows go through the head in chunks. The gradient is formed in the same pass while a chunk's softmax is at hand (the
    weights of the sum are known), so backward only scales it and the logits are computed once.

    Args:
        hidden: (N, C).
        weight: (V, C), the head.
        targets: (N,) int64 in [0, V).
        row_weights: (N,) float32; carries 1/p, the denominator, anything that multiplies a row's loss.

    Returns:
        The weighted sum (scalar float32, differentiable in hidden and weight) and the cross-entropies in nats ((N,)
        float32, detached).
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # Casting here, outside the Function, lets autograd cast the gradients back.
    return _LinearCrossEntropy.apply(hidden.to(dtype), weight, targets, row_weights.float())  # type: ignore[no-any-return]


class _LinearCrossEntropy(torch.autograd.Function):
    """The work of `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        rows = hidden.size(0)
        head = weight.to(hidden.dtype)
        nll = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight and rows == 0 else None
        # Chunks of equal size: a small last one would cost a pass over the head's gradient like any other.
        chunks = max(1, round(rows * weight.size(0) / chunk_elements(hidden.device)))
        step = max(1, -(-rows // chunks))
        softmax = _compiled_softmax_gradient() if _compile_loss else _softmax_gradient
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, rows, step):
                part = slice(start, start + step)
                logits = hidden[part] @ head.T
                if not (need_hidden or need_weight):
                    wide = logits.float()
                    nll[part] = wide.logsumexp(-1) - wide.gather(1, targets[part, None]).squeeze(1)
                    continue
                nll[part], gradient = softmax(logits, targets[part], row_weights[part])
                if grad_hidden is not None:
                    torch.mm(gradient, head, out=grad_hidden[part])
                if need_weight:
                    grad_weight = _add_product(grad_weight, gradient.T, hidden[part], weight.dtype)
                # Before the next chunk's logits are allocated: two chunks at a time would double the peak.
                del logits, gradient
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(nll)
        return torch.dot(nll, row_weights), nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        # Training calls backward on the sum itself: multiplying by one would cost a pass over the head's gradient.
        # A GPU is not asked: the host would wait for it.
        if scale.device.type != "cpu" or scale.numpy() != 1.0:
            grad_hidden = None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype)
            grad_weight = None if grad_weight is None else grad_weight * scale
        return grad_hidden, grad_weight, None, None


def chunk_elements(device: torch.device) -> int:
    """Logits of the loss that exist at one time, in elements, give or take half: what bounds its memory."""
    return _CPU_CHUNK_ELEMENTS if device.type == "cpu" else _GPU_CHUNK_ELEMENTS


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right in `dtype`; in float32 the product is added as it is formed, without a tensor of its own."""
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if left.dtype == dtype else total.add_(left @ right)


def _softmax_gradient(logits: Tensor, targets: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (N,) float32 of logits (N, V), and row_weights * (softmax - onehot) in the logits' dtype.

    In float32 the gradient overwrites the logits: fresh memory of this size costs more than the arithmetic. Head and
    loss of 512 rows took 720 ms with new tensors, 434 ms in place, 420 ms for the matrix products alone (one core).
    `F.linear_cross_entropy` has no weights per row and no losses per row beside the sum, so it does not serve here.
    """
    wide = logits.float()
    picked = wide.gather(1, targets[:, None])
    top = wide.amax(-1, keepdim=True)
    wide.sub_(top).exp_()
    total = wide.sum(-1, keepdim=True)
    nll = (total.log() + top - picked).squeeze(1)
    wide.mul_(row_weights[:, None] / total)
    wide.scatter_add_(1, targets[:, None], -row_weights[:, None])
    return nll, wide.to(logits.dtype)


@functools.cache
def _compiled_softmax_gradient() -> Callable[..., tuple[Tensor, Tensor]]:
    """`_softmax_gradient` in fewer passes; rows vary from step to step, so the shape is dynamic."""
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    return torch.compile(_softmax_gradient, dynamic=True)
