"""The reversal-curse experiments: their files, and what an answer to one of their questions is worth.

A model was fine-tuned on invented people, each described in one direction only, from name to description or back. `ntd`
asks those taught from name to description, `dtn` the others; each in the taught direction and in the reverse one.
Decisions: the right answer may stand anywhere in what was written; both are compared without case and surrounding white
space, in BLEU too, so that a perfect answer has BLEU 1. Pure; imports nothing of the package, and nltk when it is used.

Source: Berglund et al. 2023 (arXiv 2309.12288) and their data; SMDM (arXiv 2410.18514).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

DIRECTIONS = ("same", "reverse")
FILES: Mapping[str, tuple[str, str]] = {
    "ntd": ("p2d_prompts_test.jsonl", "d2p_reverse_prompts_test.jsonl"),
    "dtn": ("d2p_prompts_test.jsonl", "p2d_reverse_prompts_test.jsonl"),
}
"""Per kind of question, the files of the taught and of the reverse direction."""
DATA_DIR = "data/reverse_experiments/june_version_7921032488"
SOURCE = f"github.com/lukasberglund/reversal_curse, folder {DATA_DIR}"
"""Where the files come from; their licence is not stated, so they are not part of this project."""


def is_right(reference: str, generation: str) -> bool:
    """Whether the reference occurs in what was written."""
    return _plain(reference) in _plain(generation)


def character_bleu(reference: str, generation: str) -> float:
    """Sentence BLEU over characters: up to 4-grams, unsmoothed (Papineni et al. 2002, as nltk computes it).

    Returns:
        In [0, 1]; practically 0 where no four characters in a row are the reference's.
    """
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        # It warns of every sentence without a common 4-gram.
        warnings.simplefilter("ignore")
        return float(sentence_bleu([list(_plain(reference))], list(_plain(generation))))


def _plain(text: str) -> str:
    return text.strip().lower()
