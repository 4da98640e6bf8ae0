"""From one text file to packed tokens: the stages that every study and the quickstart begin with."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lit_gpt.pipeline import Pipeline, Stage


def packed_text(pipeline: Pipeline, text: Path, vocab_size: int, block_size: int, stages: int) -> Stage:
    """Split a text, train a tokenizer on its training part, and pack both parts: the pipeline's first three stages.

    They lie in `text` (train.txt, validation.txt), `tokenizer` and `packed`.

    Args:
        pipeline: whose stages these are.
        text: the corpus.
        vocab_size: pieces of the tokenizer.
        block_size: tokens of a sequence.
        stages: of the whole pipeline, for the titles.

    Returns:
        The stage `packed`.

    Raises:
        FileNotFoundError, ValueError: the text is missing or too short, or a script's own message.
    """
    split = _split_text(pipeline, text, f"1/{stages} split the text")
    tokenizer = _train_tokenizer(pipeline, split, vocab_size, f"2/{stages} train a tokenizer")
    settings = {**tokenizer.settings, "block_size": block_size}
    stage = pipeline.begin("packed", f"3/{stages} pack the tokens", settings)
    if stage.result is not None:
        return stage
    for name, prefix in (("train", "train_slim"), ("validation", "validation")):
        command = ["scripts/prepare_text.py", "--source_path", split.folder / f"{name}.txt", "--prefix", prefix]
        command += ["--destination_path", stage.folder, "--tokenizer_path", tokenizer.folder]
        pipeline.run([*command, "--chunk_size", 1024 * (block_size + 1), "--suggest", "false"])
    stage.finish({})
    return stage


def _split_text(pipeline: Pipeline, path: Path, title: str) -> Stage:
    """Cut the corpus by position: the last tenth, from the start of a paragraph, is for validation."""
    if not path.is_file():
        raise FileNotFoundError(f"--text {path}: no such file; give a text file")
    text = path.read_bytes().decode("utf-8", errors="replace")
    settings = {"text": hashlib.sha256(text.encode()).hexdigest()}
    stage = pipeline.begin("text", title, settings)
    if stage.result is not None:
        return stage
    tenth = len(text) * 9 // 10
    paragraph = text.find("\n\n", tenth)
    cut = paragraph + 2 if paragraph >= 0 else tenth
    if not text[:cut].strip() or not text[cut:].strip():
        raise ValueError(f"--text {path}: too short to split into training and validation text")
    for name, part in (("train.txt", text[:cut]), ("validation.txt", text[cut:])):
        (stage.folder / name).write_bytes(part.encode())
    pipeline.console.print(f"  {cut:,} characters to train on, {len(text) - cut:,} to validate on")
    stage.finish({})
    return stage


def _train_tokenizer(pipeline: Pipeline, text: Stage, vocab_size: int, title: str) -> Stage:
    """Learn pieces from the training text only."""
    stage = pipeline.begin("tokenizer", title, {**text.settings, "vocab_size": vocab_size})
    if stage.result is None:
        command = ["scripts/train_tokenizer.py", "--source_path", text.folder / "train.txt"]
        pipeline.run([*command, "--destination_path", stage.folder, "--vocab_size", vocab_size])
        stage.finish({})
    return stage
