"""Train a SentencePiece tokenizer on text.

    python scripts/train_tokenizer.py --source_path TEXT --destination_path workdir/tokenizer --vocab_size 4096

Byte-pair pieces as LLaMA's, with byte fallback and nothing normalised, so that any text comes back exactly, newlines
and runs of spaces included; ids 0 <unk>, 1 <s>, 2 </s>, then the 256 bytes. Takes a few seconds per MB and writes
tokenizer.model; the same text and flags give the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run, warn

if TYPE_CHECKING:
    from lit_gpt.data.text_files import TextFile
    from lit_gpt.data.text_sources import DocumentRules

# SentencePiece keeps all sentences in memory, about ten times their size.
_MAX_BYTES = 1 << 30
# Bytes of a sentence; SentencePiece leaves longer ones out, so longer lines are cut.
_SENTENCE_BYTES = 1 << 16
# Written into the model file, so the same on every machine.
_THREADS = 4


@dataclass
class TokenizerFlags:
    """Flags of the tokenizer's training."""

    source_path: list[str] = field(default_factory=list)
    """Files, folders or glob patterns of text (.txt, .jsonl, .jsonl.zst, .parquet); several follow one flag."""
    destination_path: str = ""
    """Folder for tokenizer.model; made if it is missing. A tokenizer that is there is replaced."""
    vocab_size: int = 4096
    """Pieces, the 3 special ones and the 256 bytes included."""
    document: str = "file"
    """Of a .txt file: file or line; learning goes line by line either way."""
    as_text: list[str] = field(default_factory=list)
    """Patterns of names, such as '*.py': a folder's files of these names are plain text, too."""
    text_field: str = "text"
    """Field of .jsonl records, or column of .parquet files, with the text."""


def main() -> None:
    """Read, learn, write."""
    flags = parse(TokenizerFlags, None, __doc__)
    if not flags.source_path or not flags.destination_path:
        raise ValueError("give --source_path (files, folders or patterns of text) and --destination_path (a folder)")
    if flags.document not in ("file", "line"):
        raise ValueError(f"--document {flags.document}: expected file or line")

    from lit_gpt.data.text_files import find_sources
    from lit_gpt.data.text_sources import DocumentRules
    from lit_gpt.files import make_folder, write_file
    from lit_gpt.tokenizer import Tokenizer

    sources = find_sources(flags.source_path, as_text=flags.as_text)
    folder = Path(flags.destination_path)
    make_folder(folder)
    model = train_sentencepiece(
        read_sentences(sources, DocumentRules(flags.document, flags.text_field)), flags.vocab_size
    )
    path = folder / "tokenizer.model"
    write_file(path, lambda file: file.write(model))
    tokenizer = Tokenizer(path)
    print(f"{path}: {tokenizer.vocab_size:,} pieces, sha256 {tokenizer.fingerprint[:16]}")


def read_sentences(sources: list[TextFile], rules: DocumentRules) -> Iterator[str]:
    """The lines of all documents, long ones in parts, up to a fixed number of bytes."""
    from lit_gpt.data.text_sources import ReadPosition, read_raw_records

    taken = 0
    for batch in read_raw_records(sources, rules, ReadPosition()):
        for document in batch.texts(rules):
            for line in document.split("\n"):
                for start in range(0, len(line), _SENTENCE_BYTES // 4):
                    part = line[start : start + _SENTENCE_BYTES // 4].encode(errors="replace").decode()
                    taken += len(part.encode())
                    yield part
                if taken > _MAX_BYTES:
                    warn(f"learning from the first {taken >> 20} MiB of the text only: more needs too much memory")
                    return


def train_sentencepiece(lines: Iterator[str], vocab_size: int) -> bytes:
    """A SentencePiece model of some sentences, as the bytes of its file.

    Raises:
        ValueError: the vocabulary does not fit the text.
    """
    import io

    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            # What makes decode(encode(text)) == text for text with newlines and runs of spaces.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            # LLaMA's choices: digits one by one, rare characters as bytes.
            split_digits=True,
            character_coverage=0.99995,
            max_sentence_length=_SENTENCE_BYTES,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--vocab_size {vocab_size} does not fit this text: SentencePiece says: {reason}") from error
    return model.getvalue()


if __name__ == "__main__":
    run(main)
