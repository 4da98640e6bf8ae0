"""Answer MT-bench's questions with a fine-tuned ARM or MDM; first of gen_judgment.py and show_result.py.

    python eval/gen_model_answer.py --model-id 1028 --model-type arm --model-path models/ar-1028M-100e18-sharegpt.safetensors
    python eval/gen_model_answer.py --model-id 1028 --model-type mdm --model-path models/mdm-1028M-1600e18.safetensors \
        --steps 128 --cfg-scale 0.6 --answer-file data/mt_bench/model_answer/mdm.jsonl
    torchrun --nproc_per_node 8 eval/gen_model_answer.py ...                                        on eight GPUs

Only first turns are answered, by sampling at temperature 1; second turns stay empty. Answers are written as they come:
after Ctrl-C or a kill the same command goes on. The last line is `{answer_file}, inference time: {s} s`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run
from lit_gpt.evaluation.settings import MtBenchAnswerFlags


def main(argv: Sequence[str] | None = None) -> None:
    """Answer every question, print where and how fast."""
    flags = parse(MtBenchAnswerFlags, argv, __doc__)

    from lit_gpt.evaluation.mt_bench.answers import write_answers

    if written := write_answers(flags):
        path, elapsed_s = written
        print(f"{path}, inference time: {elapsed_s:.1f} s")


if __name__ == "__main__":
    run(main)
