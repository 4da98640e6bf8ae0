"""Pack SlimPajama into the files train_slim* and validation* that training reads; TinyLlama's flags and names.

    python scripts/prepare_slimpajama.py --source_path SlimPajama-627B --tokenizer_path TOKENIZER \\
        --destination_path /dataset/slim_star_combined --split validation
    python scripts/prepare_slimpajama.py --source_path SlimPajama-627B --tokenizer_path TOKENIZER \\
        --destination_path /dataset/slim_star_combined --split train --shards 512 --executor slurm --slurm_partition cpu

Reads {source_path}/{split}/chunk*/*.jsonl.zst without the subset RedPajamaGithub, whose code StarCoder holds; writes
{split}_slimpajama_{shard}_{counter}.bin with its indexes and manifests. An interrupted shard goes on by the same command.
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
    """train, validation or test; training reads the first two."""
    shards: int = 64
    """Parts that are made apart, each of whole source files; decides the files."""

    def problems(self) -> list[str]:
        """What is impossible about these values, one line each."""
        found = super().problems()
        if self.split not in ("train", "validation", "test"):
            found.append(f"--split {self.split}: expected train, validation or test")
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

    sources = find_sources([f"{path.rstrip('/')}/{flags.split}" for path in flags.source_path], flags.percentage)
    flags.limit_shards(len(sources))
    plan = PackingPlan(
        sources=sources,
        rules=DocumentRules(skip_subsets=("RedPajamaGithub",)),
        tokenizer=Tokenizer(flags.tokenizer_path),
        destination=Path(flags.destination_path),
        prefix=f"{flags.split}_slimpajama",
        chunk_size=flags.chunk_size,
        drop_last=flags.drop_last,
    )
    prepare(flags, plan)


if __name__ == "__main__":
    run(main)
