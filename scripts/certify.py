"""Certify objectives, estimators, samplers and models: each must agree with distributions that are enumerated.

    python scripts/certify.py                                          everything that this package has; under a minute
    python scripts/certify.py --model models/mdm-170M-10e18.safetensors    a checkpoint
    python scripts/certify.py --likelihood my_fork.py:nll --sampler my_fork.py:sample --loss my_fork.py:loss
    python scripts/certify.py --model my_fork.py:logits --mask_id 126336 --vocab_size 126080
    python scripts/certify.py --mistakes                               that known mistakes are caught

A function is named as file.py:name or package.module:name; docs/certify.md says what each is called with. Prints one table;
the exit code is 0 if all checks pass and 2 if any fails. --output keeps everything as JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run


@dataclass
class CertifyFlags:
    """What is certified; without any function or model, this package."""

    model: str = ""
    """A checkpoint, or a function (R, T) tokens to (R, T, V) logits."""
    loss: str = ""
    """A function (model, tokens, mask_id, seed) to nats per token."""
    likelihood: str = ""
    """A function (model, prefix, target, mask_id, seed) to nats, or to (nats, standard error)."""
    perplexity: str = ""
    """A function (model, texts, mask_id, seed) to the perplexity per token."""
    sampler: str = ""
    """A function (model, tokens, mask_id, steps, seed) to tokens without [MASK]."""
    sampler_law: str = "any_order"
    """What the sampler says of itself: any_order, left_to_right, random_order, origin, greedy, threshold or entropy."""
    mask_id: int | None = None
    """Id of [MASK], for --model as a function."""
    vocab_size: int | None = None
    """Tokens that a text may hold, for --model as a function; by default all below the mask."""
    text: str = ""
    """A text that --model must find likely: words for a checkpoint, token ids for a function."""
    distribution: str = ""
    """The toy distribution that --model was trained on: dependent, rule or copy."""
    thorough: bool = False
    """Also what takes minutes: words that float32 noise cannot reach, and more distributions."""
    mistakes: bool = False
    """Run known mistakes in place of the package: each must fail."""
    output: str = ""
    """JSON file with all findings."""
    page: str = ""
    """Markdown file whose table between `<!-- certify -->` lines is written anew."""


def main(argv: Sequence[str] | None = None) -> None:
    """Check, print the table, say the verdict."""
    flags = parse(CertifyFlags, argv, __doc__)

    from lit_gpt.studies.certification import certify_by_flags

    certify_by_flags(flags)


if __name__ == "__main__":
    run(main)
