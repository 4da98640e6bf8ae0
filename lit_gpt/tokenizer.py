"""Text to token ids and back, from a local tokenizer or one on the Hugging Face hub.

Reads SentencePiece's `tokenizer.model` or the `tokenizers` library's `tokenizer.json`; of a LLaMA tokenizer both forms
give the same ids. Decisions: special tokens are not read from text (`<s>` typed by an author is three characters, in both
forms) unless a tokenizer is asked to (`reading`), as the published fine-tunings and evaluations do; `decode` gives back
exactly the encoded text, newlines and runs of spaces included. Two things a LLaMA-style model cannot keep: U+2581, its own
sign for a space, comes back as a space, and half of a surrogate pair, which no UTF-8 text can hold, as U+FFFD.
Torch, numpy and both tokenizer libraries are imported when they are used.

V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lit_gpt.files import parse_json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

# LLaMA's 32,000 pieces where TinyLlama publishes them: what the published models were trained with.
DEFAULT_SOURCE = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
SPECIAL_TOKENS = ("ids", "text")
"""What `<s>`, `</s>` and `<unk>` inside a text become: their ids (published), or the characters that they are."""
_SENTENCEPIECE = "tokenizer.model"
_TOKENIZERS = "tokenizer.json"
_TOKENIZERS_CONFIG = "tokenizer_config.json"
_SPACE = "\u2581"
# What is kept for each id must stay in proportion to the file; models leave a few ids out at most.
_MOST_IDS_PER_PIECE = 100
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class _Backend(Protocol):
    """What both libraries are reduced to."""

    vocab_size: int
    bos_id: int
    eos_id: int
    special: dict[str, int]
    """Special tokens: their texts and ids."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def token_bytes(self) -> list[int]: ...


class Tokenizer:
    """Encodes and decodes text.

    Attributes:
        source: where it was asked for: the folder, file or hub name.
        contents: the bytes of its files by name: the one that holds the model, and a `tokenizer.json`'s settings.
        fingerprint: SHA-256 (hex) of the model file.
        vocab_size: number of ids.
        bos_id: id of the token that begins a text; the end token's where there is none.
        eos_id, eos_text: of the token that ends a document; no text where the file does not call it special.
        special_tokens: one of `SPECIAL_TOKENS`.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        """Load a tokenizer.

        Args:
            source: a folder with `tokenizer.model` or `tokenizer.json` (the first wins), such a file, or a name on the
                hub, which is downloaded once (HF_HUB_OFFLINE=1 keeps to what has been).

        Raises:
            FileNotFoundError: nothing there; says where it looked.
            ValueError: the file is no tokenizer, or has no end-of-text token.
        """
        model, *settings = _find(os.fspath(source))
        contents = {_TOKENIZERS if model.suffix == ".json" else _SENTENCEPIECE: model.read_bytes()}
        contents |= {path.name: path.read_bytes() for path in settings}
        self._load(os.fspath(source), str(model), contents)

    @classmethod
    def from_contents(cls, contents: Mapping[str, bytes], source: str, special_tokens: str = "text") -> Tokenizer:
        """The tokenizer whose files' bytes are at hand.

        Args:
            contents: as the attribute: `tokenizer.model`, or `tokenizer.json` and perhaps `tokenizer_config.json`.
            source: where they come from.
            special_tokens: as the attribute.

        Raises:
            ValueError: they are no tokenizer.
        """
        tokenizer = cls.__new__(cls)
        tokenizer._load(source, source, dict(contents))
        tokenizer.special_tokens = special_tokens
        return tokenizer

    def reading(self, special_tokens: str) -> Tokenizer:
        """The same tokenizer, which reads special tokens inside a text as is asked for.

        Args:
            special_tokens: one of `SPECIAL_TOKENS`.

        Raises:
            ValueError: another word.
        """
        if special_tokens not in SPECIAL_TOKENS:
            raise ValueError(f"special_tokens {special_tokens}: choose from {', '.join(SPECIAL_TOKENS)}")
        other = Tokenizer.__new__(Tokenizer)
        vars(other).update(vars(self), special_tokens=special_tokens)
        return other

    def _load(self, source: str, place: str, contents: dict[str, bytes]) -> None:
        """Set everything; `place` names the model in errors."""
        name = next((name for name in (_SENTENCEPIECE, _TOKENIZERS) if name in contents), None)
        if name is None:
            raise ValueError(f"{place}: has no {_SENTENCEPIECE} or {_TOKENIZERS}")
        self.source, self.contents, self.special_tokens = source, contents, "text"
        self.fingerprint = hashlib.sha256(contents[name]).hexdigest()
        if name == _TOKENIZERS:
            settings = contents.get(_TOKENIZERS_CONFIG, b"{}")
            self._backend: _Backend = _TokenizersBackend(place, contents[name], settings)
        else:
            self._backend = _SentencePieceBackend(place, contents[name])
        self.vocab_size = self._backend.vocab_size
        self.bos_id = self._backend.bos_id
        self.eos_id = self._backend.eos_id
        self.eos_text = next((text for text, number in self._backend.special.items() if number == self.eos_id), "")
        longest_first = sorted(map(re.escape, self._backend.special), key=len, reverse=True)
        self._special_text = re.compile(f"({'|'.join(longest_first)})")

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes get the contents: they need not find the files."""
        return Tokenizer.from_contents, (self.contents, self.source, self.special_tokens)

    def __repr__(self) -> str:
        return f"Tokenizer({self.source!r}, vocab_size={self.vocab_size})"

    def encode(self, text: str, bos: bool = False, eos: bool = True) -> torch.Tensor:
        """Encode one text.

        Args:
            text: any string.
            bos: begin with `bos_id`.
            eos: end with `eos_id` (the default, as users' preparation scripts expect).

        Returns:
            (n,) int64.
        """
        import torch

        ids = [self.bos_id] * bos + self.encode_ids(text) + [self.eos_id] * eos
        return torch.tensor(ids, dtype=torch.int64)

    def encode_ids(self, text: str) -> list[int]:
        """The ids of one text, without special tokens before and behind it.

        Those inside it are read as `special_tokens` says. A text between two of them is encoded like a whole one, with
        LLaMA's dummy space before it, as `transformers` does.
        """
        special = self._backend.special
        if self.special_tokens == "text" or not special:
            return self._encode_plain(text)
        ids: list[int] = []
        for piece in filter(None, self._special_text.split(text)):
            ids += [special[piece]] if piece in special else self._encode_plain(piece)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        try:
            return self._backend.encode(text)
        except (UnicodeEncodeError, RuntimeError, TypeError):
            return self._backend.encode(valid_text(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; special tokens are left out.

        Args:
            ids: a list, an array or a tensor of one dimension.

        Returns:
            The text; `decode(encode(text)) == text`. The dummy space that a LLaMA-style model puts before a text is
            removed, so a part of a text loses one leading space.

        Raises:
            ValueError: an id that the tokenizer does not have, such as the mask or the padding of a model's vocabulary.
        """
        numbers = [int(number) for number in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        foreign = next((number for number in numbers if not 0 <= number < self.vocab_size), None)
        if foreign is not None:
            raise ValueError(f"token id {foreign} has no text: {self.source} has ids from 0 to {self.vocab_size - 1}")
        special = self._special_ids
        return self._backend.decode([number for number in numbers if number not in special])

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """How many UTF-8 bytes of text each id stands for.

        Byte pieces count 1, special tokens 0. Over a text's tokens the sum is the text's UTF-8 length, plus 1 where the
        model puts a dummy space before each text (LLaMA's does): that space is part of the first piece.

        Returns:
            (V,) int64.
        """
        return self._token_bytes.copy()

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._backend.special.values())

    @cached_property
    def _token_bytes(self) -> npt.NDArray[np.int64]:
        import numpy as np

        return np.asarray(self._backend.token_bytes(), dtype=np.int64)


def valid_text(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which JSON escapes can bring and UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class _SentencePieceBackend:
    """`tokenizer.model`."""

    def __init__(self, path: str, content: bytes) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ValueError(f"{path}: not a SentencePiece model ({len(content)} bytes); copy it again") from error
        self.vocab_size = self._model.vocab_size()
        self.eos_id = _end_token(path, self._model.eos_id())
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else self.eos_id
        ids = range(self.vocab_size)
        special_ids = [n for n in ids if self._model.IsControl(n) or self._model.IsUnknown(n)]
        self.special = {self._model.id_to_piece(n): n for n in special_ids}

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def token_bytes(self) -> list[int]:
        return [self._bytes_of(number) for number in range(self.vocab_size)]

    def _bytes_of(self, number: int) -> int:
        if self._model.IsControl(number) or self._model.IsUnknown(number) or self._model.IsUnused(number):
            return 0
        if self._model.IsByte(number):
            return 1
        return len(self._model.id_to_piece(number).replace(_SPACE, " ").encode())


class _TokenizersBackend:
    """`tokenizer.json`, with the names of its special tokens from `tokenizer_config.json` where there is one."""

    def __init__(self, path: str, content: bytes, settings: bytes) -> None:
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_buffer(content)
            self._model.no_truncation()
            self._model.no_padding()
            self._model.encode_special_tokens = True
            self.encode("Some models fail with their first text: \U0001f600")
            description, names = _object(parse_json(content)), _object(parse_json(settings))
            added = [
                (token["id"], token["content"], token["special"]) for token in description.get("added_tokens") or []
            ]
            self._byte_level = "ByteLevel" in json.dumps(description.get("decoder") or {})
            self._byte_fallback = bool(_object(description["model"]).get("byte_fallback"))
        # The library raises bare Exception for any content it cannot use, and worse where its own code fails.
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path}: not a tokenizer of the tokenizers library ({reason}); copy it again") from error
        self._pieces = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._pieces.values(), default=-1) + 1
        if self.vocab_size > _MOST_IDS_PER_PIECE * len(self._pieces):
            raise ValueError(f"{path}: {len(self._pieces)} pieces have ids up to {self.vocab_size - 1}; copy it again")
        self.special = {text: number for number, text, special in added if special}
        self._added = {number: text for number, text, _ in added}
        self.eos_id = _end_token(path, self._special(names, "eos_token", "</s>"))
        bos_id = self._special(names, "bos_token", "<s>")
        self.bos_id = bos_id if bos_id >= 0 else self.eos_id

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)

    def token_bytes(self) -> list[int]:
        sizes = [0] * self.vocab_size
        special_ids = frozenset(self.special.values())
        for piece, number in self._pieces.items():
            if number not in special_ids:
                sizes[number] = self._bytes_of(piece, number)
        return sizes

    def _bytes_of(self, piece: str, number: int) -> int:
        if number in self._added:
            return len(self._added[number].encode())
        if self._byte_level:
            return len(piece)  # One character of a byte-level piece stands for one byte.
        if self._byte_fallback and _BYTE_PIECE.fullmatch(piece):
            return 1
        return len(piece.replace(_SPACE, " ").encode())

    def _special(self, names: dict[str, Any], role: str, usual: str) -> int:
        name = names.get(role) or usual
        if isinstance(name, dict):
            name = name.get("content")
        return self._pieces.get(name, -1) if isinstance(name, str) else -1


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it holds a JSON {type(value).__name__} where an object is expected")
    return value


def _end_token(path: str, number: int) -> int:
    if number < 0:
        raise ValueError(f"{path}: has no end-of-text token (</s>), which separates documents; use one that has it")
    return number


def model_file(folder: Path) -> Path | None:
    """The file of a folder that a tokenizer is read from: `tokenizer.model`, else `tokenizer.json`, else None."""
    return next((folder / name for name in (_SENTENCEPIECE, _TOKENIZERS) if (folder / name).is_file()), None)


def _find(source: str) -> tuple[Path, ...]:
    """The model file of a folder, file or hub name, and the settings that belong to a `tokenizer.json`."""
    path = Path(source)
    if path.is_dir():
        model = model_file(path)
        if model is None:
            raise FileNotFoundError(
                f"{source}: this folder has no {_SENTENCEPIECE} or {_TOKENIZERS}; give one that has"
            )
    elif path.is_file():
        model = path
    elif _is_hub_name(source):
        return _download(source)
    else:
        raise FileNotFoundError(
            f"{source}: no such tokenizer: expected a folder with {_SENTENCEPIECE} or {_TOKENIZERS}, such a file, or a "
            "name on the hub"
        )
    settings = model.with_name(_TOKENIZERS_CONFIG)
    return (model, settings) if model.suffix == ".json" and settings.is_file() else (model,)


def _is_hub_name(source: str) -> bool:
    """Whether the hub could have a repository of this name: `owner/name`, or an old one of one word."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None and not source.startswith((".", "/"))


def _download(name: str) -> tuple[Path, ...]:
    """Fetch from the hub, or find in its local cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    reason = f"it has no {_SENTENCEPIECE} or {_TOKENIZERS} there"

    def fetch(filename: str) -> Path | None:
        nonlocal reason
        try:
            return Path(hf_hub_download(name, filename))
        except LocalEntryNotFoundError:
            reason = "offline, and not in the local cache"
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
            if not isinstance(error, EntryNotFoundError):
                reason = type(error).__name__
        return None

    if model := fetch(_SENTENCEPIECE):
        return (model,)
    if model := fetch(_TOKENIZERS):
        settings = fetch(_TOKENIZERS_CONFIG)
        return (model,) if settings is None else (model, settings)
    raise FileNotFoundError(
        f"{name}: no such folder or file here, and the hub could not give it ({reason}); "
        f"give a local folder that holds {_SENTENCEPIECE} or {_TOKENIZERS}"
    )
