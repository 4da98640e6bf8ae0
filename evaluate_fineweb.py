"""Perplexity on text newer than the training data: crawls of FineWeb, or any packed tokens.

    python evaluate_fineweb.py --type mdm --ckpt-path quickstart/mdm/model/mdm-1.05M-1.55e13-bs-16.safetensors \
        --data-dir quickstart --fineweb packed --mc-samples 16                              a look, on a CPU: seconds
    python evaluate_fineweb.py --type arm --model 170 --ckpt-path models/ar-170M-100e18.safetensors --fineweb CC-MAIN-2024-10
    python evaluate_fineweb.py --type mdm --model 170 --ckpt-path models/mdm-170M-100e18.safetensors \
        --fineweb CC-MAIN-2024-18 --mc-samples 128

Reads data/fineweb/{crawl}/validation*.bin (scripts/prepare_fineweb.py makes them) or an old data/fineweb/{crawl}.pkl, in
rows of 2048 tokens. An ARM's loss is exact over 2047 of them. An MDM's is the bound over all 2048: `--estimator mc` draws
noise as in pretraining, with t stratified over the draws; `exact` spends --mc-samples passes on a less noisy one. Rows
that are done are not done again. The last line is `{ckpt}, {crawl}, ppl={x}`.
"""

from __future__ import annotations

from lit_gpt.cli import parse, run
from lit_gpt.evaluation.settings import PerplexityFlags


def main() -> None:
    """Score every row, print the perplexity."""
    flags = parse(PerplexityFlags, None, __doc__)

    from lit_gpt.evaluation.perplexity import evaluate_perplexity

    evaluate_perplexity(flags)


if __name__ == "__main__":
    run(main)
