"""Pack text into the .bin files that training reads.

    python scripts/prepare_text.py --source_path TEXT --tokenizer_path TOKENIZER --destination_path workdir/data
    python scripts/prepare_text.py --source_path src docs --as_text '*.py' '*.md' --destination_path workdir/code
    python scripts/prepare_text.py --source_path hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT --shards 14 \\
        --destination_path /dataset/fineweb_edu

Reads .txt, .jsonl (also .gz, .zst) and .parquet, and as plain text any file that is named, on all cores, and shows
progress. A corpus of many files is made in shards, here, as a Slurm array or on Ray (--executor). Started again after an
interruption it goes on where it was, with the same result. Ends with the number of files, documents and
tokens, and a training command that fits them; the destination then holds {prefix}_0000000000.bin ..., indexes of where
documents end, manifests and the tokenizer.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import Interrupted, parse, run
from lit_gpt.data.preparation_settings import PreparationFlags


@dataclass
class PrepareFlags(PreparationFlags):
    """Flags of the preparation."""

    prefix: str = "train_slim"
    """Of the file names; training reads train_slim, train_star and validation."""
    document: str = "file"
    """Of a plain text file: file (all of it is one document) or line (each line that is not blank)."""
    as_text: list[str] = field(default_factory=list)
    """Patterns of names, such as '*.py': a folder's files of these names are plain text, too. A named file always is."""
    text_field: str = "text"
    """Field of .jsonl records, or column of .parquet files, with the text."""
    skip_subsets: list[str] = field(default_factory=lambda: ["RedPajamaGithub"])
    """SlimPajama records of these subsets are left out, as TinyLlama does (its code comes from StarCoder)."""
    validation_fraction: float = 0.0
    """Share of the documents, chosen by their hash, that goes to the prefix validation."""
    suggest: bool = True
    """Print a training command that fits, at the end; a few training steps are timed for it."""

    def problems(self) -> list[str]:
        """What is impossible about these values, one line each."""
        found = super().problems()
        if self.document not in ("file", "line"):
            found.append(f"--document {self.document}: expected file or line")
        if not 0 <= self.validation_fraction < 1:
            found.append(f"--validation_fraction {self.validation_fraction:g}: expected a share in [0, 1)")
        if self.validation_fraction and self.prefix.startswith("validation"):
            found.append("--validation_fraction and --prefix validation exclude each other")
        if not self.prefix or "/" in self.prefix or self.prefix.startswith("."):
            found.append(f"--prefix {self.prefix!r}: expected the beginning of a file name")
        return found


def main() -> None:
    """Check the flags, pack, say what came out."""
    flags = parse(PrepareFlags, None, __doc__)
    if problems := flags.problems():
        raise ValueError("; ".join(problems))

    from lit_gpt.data.preparation_plan import PackingPlan
    from lit_gpt.data.text_files import find_sources
    from lit_gpt.data.text_sources import DocumentRules
    from lit_gpt.tokenizer import Tokenizer
    from lit_gpt.ui.preparation_display import prepare

    plan = PackingPlan(
        sources=find_sources(flags.source_path, flags.percentage, flags.as_text),
        rules=DocumentRules(flags.document, flags.text_field, tuple(flags.skip_subsets)),
        tokenizer=Tokenizer(flags.tokenizer_path),
        destination=Path(flags.destination_path),
        prefix=flags.prefix,
        chunk_size=flags.chunk_size,
        validation_fraction=flags.validation_fraction,
        drop_last=flags.drop_last,
    )
    manifests = prepare(flags, plan)
    if flags.suggest and manifests and not flags.prefix.startswith("validation"):
        tokens = sum(made["tokens"] for made in manifests if next(iter(made["files"]), "").startswith(flags.prefix))
        suggest(flags, tokens, plan.tokenizer.vocab_size)


def suggest(flags: PrepareFlags, tokens: int, vocab_size: int) -> None:
    """Print a training command; the data is finished whatever becomes of this."""
    try:
        from lit_gpt.training.suggested_run import suggest_run

        suggested = suggest_run(tokens, vocab_size, flags.chunk_size)
    except Interrupted as error:
        error.args = ("interrupted: the data is finished; a training command was not chosen",)
        raise
    except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:  # such as no memory on the GPU
        print(f"the data is finished; no training command could be chosen: {' '.join(str(error).split())[:200]}")
        return
    weights = "" if flags.prefix.startswith("train_slim") else f" --data_weights '{{{flags.prefix}: 1}}'"
    print(f"train with: {suggested.command} --data_dir {flags.destination_path}{weights}")
    print(f"that is {suggested.reason}")


if __name__ == "__main__":
    run(main)
