"""Whether a model answers in the direction in which it was not taught (the reversal curse), after sft/finetune_mdm_reverse.py.

    python evaluate_reverse.py --qs_type ntd --model 1028 --ckpt-path models/mdm-1028M-1600e18-reverse.safetensors
    python evaluate_reverse.py --qs_type dtn --model 1028 --ckpt-path models/mdm-1028M-1600e18-reverse.safetensors

ntd asks about people that were taught from name to description, dtn about those taught from description to name; both in
the same direction and in reverse. The questions are those of github.com/lukasberglund/reversal_curse: put its folder
data/reverse_experiments/june_version_7921032488 into data/reverse_experiments, or name it by --data_dir.

The likeliest tokens are taken (--temperature 0). An answer is right if the reference occurs in it. Every answer is kept
with its verdict in out/reverse/{checkpoint}-{qs_type}.jsonl as it comes: a killed evaluation goes on where it stood. The
last line is `qs_type: ntd, accs: ..., accs_reverse: ..., blue: ..., blues_reverse: ...`, for dtn without the last two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_gpt.cli import parse, run
from lit_gpt.evaluation.settings import AnswerFlags
from lit_gpt.sampling.settings import sampling_flag


@dataclass
class Flags(AnswerFlags):
    """Flags of the reversal evaluation."""

    qs_type: str = "ntd"
    """ntd (taught from name to description) or dtn (from description to name)."""
    data_dir: str = "data/reverse_experiments/june_version_7921032488"
    """The folder with the questions."""
    steps: int = sampling_flag("steps", 32)
    length: int = 52
    """Tokens of question and answer together."""
    cfg: float | None = None
    """MDM: guidance; 0.8 unless given."""
    behind_end: str = "cut"
    """What is written behind the end token: cut off, or keep (published: all but special tokens is judged)."""


def main(argv: Sequence[str] | None = None) -> None:
    """Ask in both directions, print the accuracies."""
    flags = parse(Flags, argv, __doc__)

    from lit_gpt.evaluation.generated_answers import check_flags, generate_answers
    from lit_gpt.evaluation.reversal import accuracy_lines, reversal_task

    check_flags(flags)
    if answers := generate_answers(flags, reversal_task(flags)):
        print("\n".join(accuracy_lines(flags.qs_type, answers)))


if __name__ == "__main__":
    run(main)
