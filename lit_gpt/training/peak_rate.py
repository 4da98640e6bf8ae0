"""One rule for the peak learning rate of a size: for suggested runs and for scaling studies.

Two rates are known: this project's quickstart takes 2e-3 at 1.05M parameters, and the published code 2e-4 for all of its runs.
Of those the rule takes the sizes from 170M on, where most of the published results are; small models bear more. What lies
between and below is ours: the cube root of the size up to the smallest published one, 6M (studies check it there by runs at
other factors, docs/scaling_laws.md), and from there the power law that meets the published rate at 170M.
"""

from __future__ import annotations

import math

_QUICKSTART_SIZE, _QUICKSTART_RATE = 1.05e6, 2e-3
_SMALL_EXPONENT = -1 / 3
_LEAST_PUBLISHED_SIZE = 6e6
_PUBLISHED_SIZE, _PUBLISHED_RATE = 170e6, 2e-4


def ruled_rate(non_embedding_params: int) -> float:
    """Peak learning rate of a number of parameters without embeddings, to three digits."""
    size = min(non_embedding_params, _LEAST_PUBLISHED_SIZE)
    rate = _QUICKSTART_RATE * (size / _QUICKSTART_SIZE) ** _SMALL_EXPONENT
    if non_embedding_params > _LEAST_PUBLISHED_SIZE:
        exponent = math.log(_PUBLISHED_RATE / rate) / math.log(_PUBLISHED_SIZE / _LEAST_PUBLISHED_SIZE)
        rate = max(_PUBLISHED_RATE, rate * (non_embedding_params / _LEAST_PUBLISHED_SIZE) ** exponent)
    return float(f"{rate:.3g}")
