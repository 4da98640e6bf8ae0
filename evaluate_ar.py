"""Evaluate an ARM on tasks of lm-evaluation-harness.

    python evaluate_ar.py --tasks lambada_local,next_line --include_path tasks --model ar --model_args \
        ckpt_path=quickstart/arm/model/ar-1.05M-1.55e13-bs-16.safetensors                     bundled tasks, on a CPU
    python evaluate_ar.py --tasks hellaswag,openbookqa,arc_easy,boolq,piqa,social_iqa,race,lambada_standard --model ar \
        --model_args model_name=170,ckpt_path='models/ar-170M-100e18.safetensors'

All flags are the harness's (`--limit`, `--num_fewshot`, `--output_path`, `--log_samples`, ...); `--help` lists them and
what --model_args takes. Likelihoods are exact. Prints the harness's table; a killed evaluation goes on where it stood.
"""

from __future__ import annotations

import sys

from lit_gpt.cli import run


def main() -> None:
    """Hand over to the harness."""
    from lit_gpt.evaluation import lm_harness

    lm_harness.evaluate("ar", sys.argv[1:])


if __name__ == "__main__":
    run(main)
