"""The names of run folders and exported models, as users' scripts and the released checkpoints spell them."""

from __future__ import annotations

from lit_gpt.config import Config

# Source: the published scripts' global batch; names mention it only where it differs.
_PUBLISHED_BATCH = 256
# Budgets outside of this range (in 1e18) are written as a plain count: 1e13, not 1e-05e18.
_LEAST_IN_1E18, _MOST_IN_1E18 = 0.01, 1e6


def run_name(kind: str, config: Config, flops: float, ssl_ratio: float | None = None) -> str:
    """Name of a pretraining run and its folder: `arm-1028M-100.0`, `mdm-170M-60.0-ssl-0.01`.

    Args:
        kind: `arm` or `mdm`.
        config: of the model.
        flops: budget in 1e18, written as Python writes a float.
        ssl_ratio: share of random lengths; None for runs that have none.
    """
    name = f"{kind}-{config.size_label}M-{float(flops)}"
    return name if ssl_ratio is None else f"{name}-ssl-{float(ssl_ratio)}"


def export_name(
    kind: str,
    config: Config,
    flops: float,
    ssl_ratio: float | None = None,
    global_batch_size: int = _PUBLISHED_BATCH,
    suffix: str | None = None,
) -> str:
    """Name of an exported model, without `.safetensors`: `mdm-1028M-3300e18-rsl-0.01-bs-1024`.

    Args:
        kind: `arm` (written `ar`) or `mdm`.
        config: of the model.
        flops: budget in 1e18; below 0.01 it becomes a plain count (`1e13`).
        ssl_ratio: share of random lengths; None for runs that have none.
        global_batch_size: sequences of an optimizer step; named where it is not 256.
        suffix: of a fine-tuning, such as `sharegpt`.
    """
    scaled = _LEAST_IN_1E18 <= flops < _MOST_IN_1E18
    # A product with 1e18 carries rounding of its own (1e-05 * 1e18 = 10000000000000.002): 6 digits drop it.
    budget = f"{flops:g}e18" if scaled else _scientific(flops * 1e18)
    parts = ["ar" if kind == "arm" else kind, f"{config.size_label}M", budget]
    if ssl_ratio is not None:
        parts.append(f"rsl-{ssl_ratio:g}")
    if global_batch_size != _PUBLISHED_BATCH:
        parts.append(f"bs-{global_batch_size}")
    if suffix:
        parts.append(suffix.lstrip("-"))
    return "-".join(parts)


def _scientific(count: float) -> str:
    """`1e13`, `2.5e15`: as %g, but always with an exponent and no sign or zeros in it."""
    mantissa, exponent = f"{count:.5e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
