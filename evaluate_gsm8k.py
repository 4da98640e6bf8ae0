"""Accuracy on GSM8K, grade-school word problems, of a model fine-tuned for them (sft/finetune_mdm_gsm8k.py).

    python evaluate_gsm8k.py --ckpt_path models/mdm-1028M-3300e18-rsl-gsm8k.safetensors
    torchrun --nproc_per_node 8 evaluate_gsm8k.py --ckpt_path models/mdm-1028M-3300e18-rsl-gsm8k.safetensors
    python evaluate_gsm8k.py --ckpt_path workdir/finetune/mdm-gsm8k-6M --limit 16 --steps 64              a look, on a CPU

A question is answered in two rounds: from `Question: ...` the model writes its thought, and from the text of both the
answer, behind `####`; --length counts everything, the question too. An ARM gets a second round where the first, which
ends with its end token, gave no answer. The last answer in the text counts. By --grader default it is right if it
equals the target as a number, units, `x =`, \\boxed{} and their like aside; by --grader published if it is the same
text after the published normalisation. Both shares are printed, and `Acc:` is the chosen one's.

Every answer is kept with its verdict in out/gsm8k/{checkpoint}.jsonl as it comes: a killed evaluation goes on where it
stood. The last line is `Acc: {x}`, a fraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_gpt.cli import parse, run
from lit_gpt.evaluation.settings import AnswerFlags
from lit_gpt.sampling.settings import sampling_flag


@dataclass
class Flags(AnswerFlags):
    """Flags of the GSM8K evaluation."""

    data: str = "data/gsm8k/test.jsonl"
    """The questions: JSON lines with question and target."""
    cfg1: float | None = None
    """MDM: guidance in the first round; 0.1 unless given."""
    cfg2: float | None = None
    """MDM: guidance in the second round; 0.1 unless given."""
    grader: str = "default"
    """Which rule `Acc:` follows: default (equal as numbers) or published (equal as normalised texts)."""
    temperature: float = sampling_flag("temperature", 0.1)


def main(argv: Sequence[str] | None = None) -> None:
    """Ask every question, print the accuracy."""
    flags = parse(Flags, argv, __doc__)

    from lit_gpt.evaluation.generated_answers import check_flags, generate_answers
    from lit_gpt.evaluation.gsm8k import graded_lines, gsm8k_task

    check_flags(flags)
    if answers := generate_answers(flags, gsm8k_task(flags)):
        print("\n".join(graded_lines(flags.grader, answers)))


if __name__ == "__main__":
    run(main)
