"""Where a checkpoint's tokenizer is: inside the exported file, where the record says, or beside the file."""

from __future__ import annotations

import itertools
from pathlib import Path

from lit_gpt.checkpoints.export import SUFFIX, WeightsRecord, read_record
from lit_gpt.config import Config
from lit_gpt.tokenizer import DEFAULT_SOURCE, Tokenizer, model_file


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
        ValueError: it is another than the recorded one, has more tokens than the model, or is damaged.
    """
    if given:
        tokenizer = _given_tokenizer(given, path, record)
    else:
        held = record.held_tokenizer(path) if record else None
        tokenizer = held or _named_tokenizer(Path(path), record)
    if tokenizer.vocab_size > config.padded_vocab_size:
        raise ValueError(
            f"{tokenizer.source} has {tokenizer.vocab_size} tokens, {path} knows "
            f"{config.padded_vocab_size}: give the tokenizer that it was trained with ({_REMEDY})"
        )
    return tokenizer


_PROBE = "The quick brown fox,  jumps over 12345 lazy dogs.\n\tD\u00e9j\u00e0 vu \u2615 - don't!"
_REMEDY = "--tokenizer FOLDER, or tokenizer=FOLDER"


def _given_tokenizer(given: str, path: Path | str, record: WeightsRecord | None) -> Tokenizer:
    """The tokenizer that a user names; one that gives the checkpoint's own ids other meanings is refused."""
    fingerprint = record.tokenizer.get("fingerprint") if record else None
    folder = Path(given)
    # A folder may have the model in both forms, and the recorded one may be the second.
    forms = [folder / name for name in ("tokenizer.model", "tokenizer.json")]
    first = open_tokenizer(given)
    # Opened only when it is its turn: a damaged second form does not matter where the first is the recorded one.
    others = (open_tokenizer(str(file)) for file in forms if file.is_file())
    for tokenizer in itertools.chain([first], others):
        if fingerprint in (None, tokenizer.fingerprint):
            return tokenizer
    held = record.held_tokenizer(path) if record else None
    if held is None or not _same_tokens(held, first):
        raise _another(given, path)
    return first


def _same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers are one in two forms: equal lengths of all ids' texts, equal ids of a text with much in it."""
    if one.vocab_size != other.vocab_size or (one.bos_id, one.eos_id) != (other.bos_id, other.eos_id):
        return False
    lengths_agree = bool((one.token_bytes() == other.token_bytes()).all())
    return lengths_agree and one.encode_ids(_PROBE) == other.encode_ids(_PROBE)


def _another(source: str, path: Path | str) -> ValueError:
    return ValueError(
        f"{source} is another tokenizer than the one that {path} was trained with (by its SHA-256): its ids mean other "
        f"texts; give that one ({_REMEDY})"
    )


def _named_tokenizer(path: Path, record: WeightsRecord | None) -> Tokenizer:
    """The tokenizer that a record names, where it was or beside the checkpoint; TinyLlama's on the hub if it names none.

    One with another hash than the record's is passed over, and refused where there is no other. Only what is known to be
    a name on the hub is asked for there: `data/tokenizer`, a folder that is gone, could be somebody's.
    """
    recorded = record.tokenizer if record else {}
    source, fingerprint = recorded.get("source"), recorded.get("fingerprint")
    folder = path if path.is_dir() else path.parent
    places = [str(folder)] if model_file(folder) else []
    named = source or DEFAULT_SOURCE
    whose = "which the checkpoint was trained with" if source else "the default, since the checkpoint names none"
    if Path(named).exists():
        places.insert(0, named)
    elif named == DEFAULT_SOURCE or recorded.get("hub") is True:
        places.append(named)
    wrong = []
    for place in places:
        try:
            tokenizer = open_tokenizer(place)
        except FileNotFoundError as error:
            if place != places[-1]:
                # A recorded folder that was emptied: the tokenizer may be beside the checkpoint.
                continue
            raise FileNotFoundError(f"{error} ({whose}; {_REMEDY} names another)") from error
        if fingerprint in (None, tokenizer.fingerprint):
            return tokenizer
        wrong.append(place)
    if wrong:
        raise _another(wrong[0] if Path(named).exists() else wrong[-1], path)
    raise FileNotFoundError(f"{named}: no such tokenizer here ({whose}; {_REMEDY} names another)")
