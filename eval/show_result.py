"""Show what a judge made of MT-bench answers, as tables and a picture; gen_judgment.py comes before.

    python eval/show_result.py --judge-model gpt-4o-2024-05-13
    python eval/show_result.py --judge-model gpt-4o-2024-05-13 --mode pairwise-all --model-list arm mdm

Ratings: the published tables, `########## First turn ##########` and so on, then the same by model with what was left
out, by category, and data/mt_bench/radar.png. Of pairs those count whose first model is in --model-list.
Comparisons: wins, losses and ties, where a pair is a tie if its two orders disagree, and half a win in the adjusted rate.
Judgments without a rating or verdict are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run
from lit_gpt.evaluation.mt_bench.settings import MtBenchResultFlags


def main(argv: Sequence[str] | None = None) -> None:
    """Read, count, print, draw."""
    flags = parse(MtBenchResultFlags, argv, __doc__)

    from lit_gpt.evaluation.mt_bench.benchmark_files import BenchmarkFiles
    from lit_gpt.evaluation.mt_bench.shown_results import (
        category_means,
        pair_table,
        rating_tables,
        read_shown_judgments,
    )

    path, lines = read_shown_judgments(flags)
    print(f"{path}, {flags.mode}\n")
    if flags.mode != "single":
        print(pair_table(lines, flags))
        return
    bench = BenchmarkFiles(flags.bench_name)
    means = category_means(bench, lines)
    print(rating_tables(lines, means, flags.bench_name))
    if not means or flags.radar == "off":
        return

    from lit_gpt.files import make_folder
    from lit_gpt.ui.plots import plot_radar

    picture = Path(flags.radar) if flags.radar else bench.folder / "radar.png"
    make_folder(picture.parent)
    plot_radar(means.by_model, means.categories, f"Mean rating by {flags.judge_model}, by category", picture)
    print(f"\n{picture}")


if __name__ == "__main__":
    run(main)
