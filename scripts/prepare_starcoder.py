"""Pack StarCoder's training data into the files train_star* that training reads; TinyLlama's flags and names.

    python scripts/prepare_starcoder.py --source_path starcoderdata --tokenizer_path TOKENIZER \\
        --destination_path /dataset/slim_star_combined --split train

Reads the column content of {source_path}/{language}/*.parquet; writes train_starcoder_{shard}_{counter}.bin with its
indexes and manifests. An interrupted shard goes on by the same command. --executor slurm and ray spread the shards.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run
from lit_gpt.data.preparation_settings import PreparationFlags


@dataclass
class Flags(PreparationFlags):
    """Flags of the preparation."""

    split: str = "train"
    """train: StarCoder's data has no other."""
    shards: int = 32
    """Parts that are made apart, each of whole source files; decides the files (TinyLlama's 32)."""

    def problems(self) -> list[str]:
        """What is impossible about these values, one line each."""
        found = super().problems()
        if self.split not in ("train",):
            found.append(f"--split {self.split}: StarCoder's data has train only")
        return found


def main() -> None:
    """Check the flags, pack, say what came out."""
    flags = parse(Flags, None, __doc__)
    if problems := flags.problems():
        raise ValueError("; ".join(problems))

    from lit_gpt.data.preparation_plan import PackingPlan
    from lit_gpt.data.text_files import find_sources
    from lit_gpt.data.text_sources import DocumentRules
    from lit_gpt.tokenizer import Tokenizer
    from lit_gpt.ui.preparation_display import prepare

    sources = find_sources(flags.source_path, flags.percentage)
    flags.limit_shards(len(sources))
    plan = PackingPlan(
        sources=sources,
        rules=DocumentRules(text_field="content"),
        tokenizer=Tokenizer(flags.tokenizer_path),
        destination=Path(flags.destination_path),
        prefix=f"{flags.split}_starcoder",
        chunk_size=flags.chunk_size,
        drop_last=flags.drop_last,
    )
    prepare(flags, plan)


if __name__ == "__main__":
    run(main)
