"""Let a model judge MT-bench answers; gen_model_answer.py comes before, show_result.py after.

    python eval/gen_judgment.py --judge-model gpt-4o-2024-05-13 --dry_run                      what it would send, and how much
    OPENAI_API_KEY=... python eval/gen_judgment.py --parallel 10 --judge-model gpt-4o-2024-05-13
    OPENAI_API_KEY=... python eval/gen_judgment.py --mode pairwise-all --model-list arm mdm --judge-model gpt-4o-2024-05-13
    ANTHROPIC_API_KEY=... python eval/gen_judgment.py --judge-model claude-... --reference-file FILE.jsonl
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python eval/gen_judgment.py --judge-model NAME

It says first how many matches, requests and tokens it is about, and at a terminal asks. Judgments are written as they
come: after Ctrl-C, a kill or a failure the same command judges what is left, and anew what has changed since.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run
from lit_gpt.evaluation.mt_bench.settings import MtBenchJudgmentFlags


def main(argv: Sequence[str] | None = None) -> None:
    """Judge what is not judged yet."""
    flags = parse(MtBenchJudgmentFlags, argv, __doc__)

    from lit_gpt.evaluation.mt_bench.judgment_run import write_judgments

    write_judgments(flags)


if __name__ == "__main__":
    run(main)
