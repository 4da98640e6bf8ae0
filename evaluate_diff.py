"""Evaluate an MDM on tasks of lm-evaluation-harness.

    python evaluate_diff.py --tasks lambada_local,next_line --include_path tasks --model mdlm --model_args \
        ckpt_path=quickstart/mdm/model/mdm-1.05M-1.55e13-bs-16.safetensors,nll_type=exact     bundled tasks, on a CPU
    python evaluate_diff.py --tasks lambada_standard --model mdlm --batch_size 16 --model_args \
        model_name=1028,ckpt_path='models/mdm-1028M-3300e18-rsl-0.01-bs-1024.safetensors',nll_type='chain_rule',greddy=True,cfg=1.1

`nll_type` is mc (published; mc_num draws), chain_rule (published) or exact (the same bound as mc with far less noise;
budget forward passes, or with decide=0.01 as many as a multiple-choice question needs). All flags are the harness's; `--help`
lists them and what --model_args takes. Prints the harness's table, then the estimator's standard error; a killed evaluation
goes on where it stood. The paper's settings: eval_mdm.sh.
"""

from __future__ import annotations

import sys

from lit_gpt.cli import run


def main() -> None:
    """Hand over to the harness."""
    from lit_gpt.evaluation import lm_harness

    lm_harness.evaluate("mdlm", sys.argv[1:])


if __name__ == "__main__":
    run(main)
