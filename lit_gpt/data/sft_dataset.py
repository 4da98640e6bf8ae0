"""Fine-tuning data: a file of examples is tokenized once, in parallel, kept, and then read at any position.

Decisions: the preparation is a `datasets` pipeline whose result lies in a folder named by what it was made from (the
file's hash, the format, the tokenizer, the length limit), so that nothing stale is served and a second run starts at
once; its Arrow files are mapped, not loaded. What cannot be used is counted by reason and said; too many malformed
records are refused. As in pretraining, sample k is a pure function of k: its epoch is k // n, and each epoch has a
pseudo-random order of its own, in which short and long examples stay mixed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_gpt.data.packed_dataset import Extent, Sample
from lit_gpt.data.sft_formats import SFT_FORMATS, Malformed, SftFormat, Unusable
from lit_gpt.files import SaveError, cannot_write, file_sha256, make_folder, read_json_object, write_json
from lit_gpt.randomness import Stream, permute_index
from lit_gpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pyarrow

DEFAULT_EXAMPLES_CACHE = Path("~/.cache/smdm/sft")
"""Where prepared examples are kept."""
_RECORDS_AT_ONCE = 256
# Records below which a second process costs more to start than it saves.
_RECORDS_FOR_A_WORKER = 2000
_INFO = "info.json"
_TOO_LONG = "too long"


@dataclass(frozen=True)
class ExamplePreparation:
    """How a file becomes examples."""

    data_format: SftFormat
    """Of the file."""
    path: Path
    tokenizer: Tokenizer
    max_length: int
    """Tokens; a record of which an example is longer is left out."""
    max_malformed: float
    """Largest share of malformed records."""
    workers: int
    """Processes."""
    cache: Path
    """Folder of what was prepared."""


class SftDataset:
    """Prepared examples as endless training data; a `batching.Dataset`.

    Args:
        folder: from `prepare_examples`.
        row_length: tokens of a padded row that the model reads; a sample has one more.
        pad_id: what rows are padded with.
        seed: decides the orders.
    """

    def __init__(self, folder: Path, row_length: int, pad_id: int, seed: int) -> None:
        from datasets import Dataset

        self.block_length, self.pad_id, self.seed = row_length + 1, pad_id, seed
        self.info = read_json_object(folder / _INFO)
        table = Dataset.load_from_disk(str(folder)).with_format("arrow")[:]
        self._chunks = [_Chunk.of(chunk) for chunk in table.column("tokens").chunks]
        self._prompt_lengths = table.column("prompt_length").to_numpy()
        self._ends = np.cumsum([len(chunk.offsets) - 1 for chunk in self._chunks])

    def __len__(self) -> int:
        return len(self._prompt_lengths)

    def __getitem__(self, k: int) -> Sample:
        index = self._index(k)
        tokens = self.tokens(index)
        row = np.full(self.block_length, self.pad_id, dtype=np.int64)
        row[: len(tokens)] = tokens
        return Sample(row, len(tokens), int(self._prompt_lengths[index]))

    def tokens(self, index: int) -> np.ndarray:
        """The tokens of the file's example `index`, prompt and response."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._chunks[number].row(index - (int(self._ends[number - 1]) if number else 0))

    def extent(self, k: int) -> Extent:
        """Tokens of sample k and of its prompt, without padding."""
        index = self._index(k)
        return Extent(len(self.tokens(index)), int(self._prompt_lengths[index]))

    def _index(self, k: int) -> int:
        epoch, place = divmod(k, len(self))
        return permute_index(place, len(self), self.seed, int(Stream.DATA_ORDER), epoch)

    @property
    def fingerprint(self) -> str:
        """What decides content and order, the seed apart."""
        return f"{self.info['fingerprint']}:{self.block_length}:{self.pad_id}"

    def epochs(self, samples: int) -> float:
        """How often `samples` samples go through the data."""
        return samples / len(self)

    def describe(self) -> str:
        """One line for the console."""
        return f"{self.info['path']}, {len(self):,} examples, {self.info['tokens']:,} tokens"


@dataclass(frozen=True)
class _Chunk:
    """A part of the token column: rows one behind the other, and where they begin."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, array: pyarrow.ListArray) -> _Chunk:
        return cls(array.values.to_numpy(), array.offsets.to_numpy())

    def row(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


def prepare_examples(plan: ExamplePreparation) -> Path:
    """Tokenize a file, or find that it has been.

    Returns:
        The folder of the examples. What was left out is said once, when it is prepared.

    Raises:
        FileNotFoundError: there is no such file; the line says where to get it and where to put it.
        ValueError: too many malformed records (the first one's place is named), or nothing is left.
        SaveError: the cache cannot be written.
    """
    from datasets.exceptions import DatasetGenerationError
    from filelock import FileLock

    if not plan.path.is_file():
        raise FileNotFoundError(missing_file_line(plan.data_format, plan.path))
    parts = {
        "version": plan.data_format.version,
        "format": plan.data_format.name,
        "file": file_sha256(plan.path),
        "tokenizer": plan.tokenizer.fingerprint,
        "max_length": plan.max_length,
    }
    if plan.tokenizer.special_tokens != "text":
        parts["special_tokens"] = plan.tokenizer.special_tokens
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    folder = plan.cache.expanduser() / f"{plan.data_format.name}-{fingerprint}"
    make_folder(folder.parent)
    # Several processes of a run ask at the same time: one prepares, the others wait.
    with FileLock(f"{folder}.lock"):
        if not (folder / _INFO).exists():
            try:
                _prepare(plan, folder, parts | {"fingerprint": fingerprint, "path": str(plan.path)})
            except (OSError, DatasetGenerationError) as error:
                cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
                if not isinstance(cause, OSError) or isinstance(cause, SaveError):
                    raise
                raise cannot_write(folder, cause) from error
    info = read_json_object(folder / _INFO)
    _check_share(plan, info)
    return folder


def _prepare(plan: ExamplePreparation, folder: Path, info: dict[str, Any]) -> None:
    """The pipeline: records, examples, what is left out, then the folder under its name."""
    from datasets import Dataset, Features, List, Value
    from datasets.exceptions import DatasetGenerationError

    # The pipeline has no word for it.
    if next(plan.data_format.records(plan.path), None) is None:
        raise ValueError(f"{plan.path} gives no example: it is empty")
    building = folder.with_suffix(".tmp")
    shutil.rmtree(building, ignore_errors=True)
    try:
        read = Dataset.from_generator(
            _records,
            features=Features({"position": Value("int64"), "record": Value("string")}),
            gen_kwargs={"name": plan.data_format.name, "path": str(plan.path)},
            cache_dir=str(building / "records"),
            fingerprint=info["fingerprint"],
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # what the file's reader said
            raise error.__cause__ from None
        raise
    assert isinstance(read, Dataset)
    workers = max(1, min(plan.workers, len(read) // _RECORDS_FOR_A_WORKER))
    examples = read.map(
        _tokenized,
        batched=True,
        batch_size=_RECORDS_AT_ONCE,
        remove_columns=read.column_names,
        fn_kwargs={"name": plan.data_format.name, "tokenizer": plan.tokenizer, "max_length": plan.max_length},
        features=Features(
            {
                "tokens": List(Value("int32")),
                "prompt_length": Value("int32"),
                "reason": Value("string"),
                "position": Value("int64"),
            }
        ),
        num_proc=workers if workers > 1 else None,
        new_fingerprint=f"{info['fingerprint']}-tokens",
        desc=f"tokenizing {plan.path}",
    )
    reasons = np.asarray(examples["reason"], dtype=str)
    kept = np.flatnonzero(reasons == "")
    info |= {"records": len(read), "left_out": _left_out(reasons, np.asarray(examples["position"]))}
    chosen = examples.select(kept).remove_columns(["reason", "position"])
    info["tokens"] = int(sum(len(row) for row in chosen.with_format("numpy")["tokens"])) if len(kept) else 0
    chosen.save_to_disk(str(building / "examples"))
    write_json(building / "examples" / _INFO, info)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(building / "examples", folder)
    shutil.rmtree(building, ignore_errors=True)


def _records(name: str, path: str) -> Any:
    for position, record in SFT_FORMATS[name].records(Path(path)):
        yield {"position": position, "record": record}


def _tokenized(batch: dict[str, list[Any]], name: str, tokenizer: Tokenizer, max_length: int) -> dict[str, list[Any]]:
    """Records to rows: the examples, or one empty row with the reason why there is none."""
    rows: dict[str, list[Any]] = {"tokens": [], "prompt_length": [], "reason": [], "position": []}

    def add(tokens: list[int], prompt_length: int, reason: str, position: int) -> None:
        for column, value in zip(rows.values(), (tokens, prompt_length, reason, position), strict=True):
            column.append(value)

    for position, record in zip(batch["position"], batch["record"], strict=True):
        try:
            examples = SFT_FORMATS[name].examples(record, tokenizer)
        except Unusable as why:
            add([], 0, f"{'malformed: ' if isinstance(why, Malformed) else ''}{why}", position)
            continue
        if any(len(example.prompt) + len(example.response) > max_length for example in examples):
            add([], 0, _TOO_LONG, position)
            continue
        for example in examples:
            add(example.prompt + example.response, len(example.prompt), "", position)
    return rows


def _left_out(reasons: np.ndarray, positions: np.ndarray) -> dict[str, dict[str, int]]:
    """How many records were left out for each reason, and the first one's place."""
    counts = Counter(reason for reason in reasons.tolist() if reason)
    return {
        reason: {"records": count, "first": int(positions[reasons == reason].min())} for reason, count in counts.items()
    }


def left_out_lines(info: dict[str, Any], max_length: int) -> list[str]:
    """What was left out, a line for each reason, with the place of the first record."""
    return [
        f"left out {entry['records']:,} of {info['records']:,} records: "
        f"{f'over {max_length} tokens' if reason == _TOO_LONG else reason} (first: {info['path']}:{entry['first']})"
        for reason, entry in info["left_out"].items()
    ]


def _check_share(plan: ExamplePreparation, info: dict[str, Any]) -> None:
    """Refuse a file of which too much is malformed, or nothing is left."""
    malformed = {reason: entry for reason, entry in info["left_out"].items() if reason.startswith("malformed")}
    count = sum(entry["records"] for entry in malformed.values())
    if count > plan.max_malformed * info["records"]:
        reason, entry = min(malformed.items(), key=lambda item: item[1]["first"])
        raise ValueError(
            f"{plan.path}: {count:,} of {info['records']:,} records are malformed, first {plan.path}:{entry['first']} "
            f"({reason.removeprefix('malformed: ')}): mend the file, or allow a larger share with --max_malformed "
            f"(now {plan.max_malformed:g})"
        )
    if not info["tokens"]:
        raise ValueError(f"{plan.path} gives no example: {'; '.join(left_out_lines(info, plan.max_length))}")


def missing_file_line(data_format: SftFormat, path: Path) -> str:
    """The line for a file that is not there: where a file is to be had, and where it goes."""
    small = data_format.bundled
    bundled = f", or give --data_file {small}, a small one that comes with the code" if small else ""
    return f"no training data: {path} is missing; get it from {data_format.origin} and put it there{bundled}"
