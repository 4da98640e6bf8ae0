"""Tokenizers small enough to train in a test, in both forms that users have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from scripts.train_tokenizer import train_sentencepiece

CORPUS = Path(__file__).resolve().parents[2] / "data" / "tinyshakespeare" / "input.txt"


def training_lines(count: int = 4000) -> Iterator[str]:
    """The first lines of the bundled corpus, and what it lacks: digits, accents, runs of spaces."""
    yield from CORPUS.read_text(encoding="utf-8").split("\n")[:count]
    yield from ["  two  spaces   three", "0 12 2048", "déjà vu, naïve, Straße"] * 20


def train_small_tokenizer(folder: Path, vocab_size: int = 500, lines: int = 4000) -> Path:
    """Train `tokenizer.model` into a folder, from so many lines of the corpus; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(training_lines(lines), vocab_size))
    return folder


def convert_to_tokenizer_json(source: Path, destination: Path) -> Path:
    """Write `tokenizer.json` from a SentencePiece BPE model: what `transformers` users have of the same tokenizer.

    A merge's rank is the id of the piece it makes (BPE learnt them in this order); special tokens as LLaMA's.
    """
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    vocabulary = {model.id_to_piece(number): number for number in range(model.vocab_size())}
    merges = []
    for piece, number in vocabulary.items():
        if model.is_byte(number) or number < 3:
            continue
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += [
            (-model.get_score(number), vocabulary[left], vocabulary[right], left, right) for left, right in known
        ]
    added = [
        {
            "id": number,
            "content": content,
            "special": True,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for number, content in enumerate(("<unk>", "<s>", "</s>"))
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    decoders = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    description = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": [f"{left} {right}" for _, _, _, left, right in sorted(merges)],
        },
    }
    destination.mkdir(parents=True, exist_ok=True)
    (destination / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (destination / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return destination
