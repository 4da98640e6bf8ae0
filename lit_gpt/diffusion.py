"""The masked diffusion process as pure tensor functions: times, masking probability, masking, and the loss's weights.

Randomness stays apart from arithmetic: `diffusion_times` and `forward_process` take counters or uniform numbers and are
deterministic in them, `loss_weights` draws nothing.

Sources: Sahoo et al. 2024 (arXiv 2406.07524), Shi et al. 2024 (arXiv 2406.04329), SMDM (arXiv 2410.18514).

B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_gpt.randomness import Stream, hash_tensor, uniform

EPS = 1e-3
"""Smallest masking probability in training (published value): keeps the weight 1/p below 1000."""
_GOLDEN_RATIO = 0.6180339887498949


def diffusion_times(seed: int, step: int, rows: Tensor, global_batch_size: int) -> Tensor:
    """Times t ~ U(0, 1), stratified over the global batch: row j gets (stratum(j) + u_j) / B.

    The strata are permuted at every step; without that, the first device would only ever see small times.

    Args:
        seed: the run's seed.
        step: the optimizer step.
        rows: (B,) int64, the rows' numbers in the global batch.
        global_batch_size: number of strata.

    Returns:
        (B,) float64; each is uniform, and a row's time depends on (seed, step, its number) alone.
    """
    everyone = torch.arange(global_batch_size, device=rows.device)
    keys = hash_tensor(seed, int(Stream.TIME_STRATA), step, everyone)
    stratum = torch.empty_like(everyone)
    stratum[keys.argsort()] = everyone
    jitter = uniform(seed, int(Stream.DIFFUSION_TIME), step, rows)
    return (stratum[rows] + jitter) / global_batch_size


def low_discrepancy_times(samples: Tensor, draw: int, draws: int) -> Tensor:
    """Fixed times for validation: sequence i, draw d gets (d + frac(i * golden ratio)) / draws.

    Every sequence has one time in each of `draws` equal strata, and the sequences together fill each stratum evenly, so
    the estimate varies little and two runs see the same noise.

    Args:
        samples: (B,) int64 numbers of the sequences.
        draw: in [0, draws).
        draws: draws per sequence.

    Returns:
        (B,) float64 in [0, 1).
    """
    # In float32 sequence 20,000 would have one of about a thousand times, 0 among them.
    return (draw + ((samples.double() + 0.5) * _GOLDEN_RATIO) % 1.0) / draws


def masking_probability(t: Tensor, eps: float = EPS) -> Tensor:
    """p = (1 - eps) t + eps, the chance of every token to be masked at time t; same shape, float32."""
    return ((1 - eps) * t + eps).float()


def mean_masking_probability(eps: float = EPS) -> float:
    """E[p] = (1 + eps) / 2 for t ~ U(0, 1): the share of the tokens that is masked on average."""
    return (1 + eps) / 2


def forward_process(
    input_ids: Tensor, p_mask: Tensor, uniforms: Tensor, mask_id: int, maskable: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mask each token with probability p.

    Args:
        input_ids: (B, T) int64, clean.
        p_mask: (B,) float32.
        uniforms: (B, T) uniform in [0, 1); a token is masked where its number is below p.
        mask_id: id of [MASK].
        maskable: (B, T) bool, False at prompts and padding; None if every token may be masked.

    Returns:
        noisy_input (B, T) int64 and mask (B, T) bool, True where [MASK].
    """
    mask = uniforms < p_mask[:, None]
    if maskable is not None:
        mask &= maskable
    return torch.where(mask, mask_id, input_ids), mask


def loss_weights(mask: Tensor, p_mask: Tensor, row_weights: Tensor) -> Tensor:
    """Weights whose product with the cross-entropies sums to the loss: row_weight / p at masked tokens, 0 elsewhere.

    With row_weight = 1 / (B T) this is the published sum over masked positions of CE / p, divided by batch * length.

    Args:
        mask: (B, T) bool.
        p_mask: (B,) float32.
        row_weights: (B,) float, one over the denominator.

    Returns:
        (B, T) float32.
    """
    return mask * (row_weights / p_mask).float()[:, None]


def cross_entropy_weights(mask: Tensor, row_weights: Tensor) -> Tensor:
    """Weights of the mean cross-entropy of masked tokens: row_weight / E[p] at each, whatever its row's rate; 0 elsewhere.

    The bound's weight 1 / p counts all rates alike; this one counts a rate by the tokens that it masks. It is no bound, and
    its gradient varies less. E[p] instead of the number of tokens that happen to be masked keeps it blind to how a step is
    cut up.

    Args:
        mask: (B, T) bool.
        row_weights: (B,) float, one over the denominator.

    Returns:
        (B, T) float32.

    Source: the simplified objective of "Scaling Beyond Masked Diffusion Language Models" (arXiv 2602.15014).
    """
    return mask * (row_weights / mean_masking_probability()).float()[:, None]
