"""Where a checkpoint's tokenizer is: inside the exported file, where the record says, or beside the file."""

from __future__ import annotations

import logging
from pathlib import Path

from lit_gpt.checkpoints.export import SUFFIX, WeightsRecord, read_record
from lit_gpt.config import Config
from lit_gpt.tokenizer import DEFAULT_SOURCE, Tokenizer, model_file

_log = logging.getLogger("lit_gpt")


def open_tokenizer(source: str) -> Tokenizer:
    """A tokenizer from whatever holds one.

    Args:
        source: as for `Tokenizer`, or an exported model with its tokenizer inside.

    Raises:
        FileNotFoundError, ValueError: as `Tokenizer`; the exported model holds none.
    """
    if Path(source).suffix != SUFFIX or not Path(source).is_file():
        return Tokenizer(source)
    record = read_record(source)
    tokenizer = record.held_tokenizer(source) if record else None
    if tokenizer is None:
        raise FileNotFoundError(f"{source}: this model has no tokenizer inside")
    return tokenizer


def find_tokenizer(
    path: Path | str, config: Config, record: WeightsRecord | None, given: str | None = None
) -> Tokenizer:
    """The tokenizer of a checkpoint: as given, else the one inside it, else as `_named_tokenizer`.

    Args:
        path: the checkpoint.
        config: of its model.
        record: of the checkpoint.
        given: a folder, a file (an exported model, too) or a hub name.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it has more tokens than the model, or is damaged.
    """
    held = record.held_tokenizer(path) if record and not given else None
    tokenizer = open_tokenizer(given) if given else held or _named_tokenizer(Path(path), record)
    if tokenizer.vocab_size > config.padded_vocab_size:
        raise ValueError(
            f"{tokenizer.source} has {tokenizer.vocab_size} tokens, {path} knows "
            f"{config.padded_vocab_size}: give the tokenizer that it was trained with ({_REMEDY})"
        )
    return tokenizer


_REMEDY = "--tokenizer FOLDER, or tokenizer=FOLDER"


def _named_tokenizer(path: Path, record: WeightsRecord | None) -> Tokenizer:
    """The tokenizer that a record names, where it was or beside the checkpoint; TinyLlama's on the hub if it names none.

    One with another hash than the record's is passed over, or taken with a warning where there is no other.
    """
    recorded = record.tokenizer if record else {}
    source, fingerprint = recorded.get("source"), recorded.get("fingerprint")
    folder = path if path.is_dir() else path.parent
    places = [str(folder)] if model_file(folder) else []
    named = source or DEFAULT_SOURCE
    places.insert(0 if Path(named).exists() else len(places), named)
    for place in places:
        try:
            tokenizer = open_tokenizer(place)
        except FileNotFoundError as error:
            whose = (
                "which the checkpoint was trained with" if source else "the default, since the checkpoint names none"
            )
            raise FileNotFoundError(f"{error} ({whose}; {_REMEDY} names another)") from error
        if fingerprint in (None, tokenizer.fingerprint):
            return tokenizer
    _log.warning("%s is another tokenizer than the one that %s was trained with", named, path)
    return open_tokenizer(named)
