"""How torch.distributed.checkpoint writes and reads our shards: it plans who saves and who needs which rows, this moves them.

torch's own storage reads its description of a checkpoint by pickle; this one needs none, because what is where is read from
the shards' headers (`shard_files`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from lit_gpt.checkpoints.shard_files import SavedTensor, read_parts, write_shard
from lit_gpt.files import FileStamp


class ShardWriter(StorageWriter):
    """Writes a process's tensors into a file of its own; the first process learns what all have written.

    Args:
        folder: exists, and all processes see it.
        commit: called on the first process with the stamps of all files by name, when they are on the disk.
    """

    def __init__(self, folder: Path, commit: Callable[[dict[str, FileStamp]], None]) -> None:
        self._folder, self._commit = folder, commit

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between two saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is to be set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each process that has something to write its file's name."""
        writers = [index for index, plan in enumerate(plans) if plan.items]
        names = {
            index: f"shard-{number:05d}-of-{len(writers):05d}.safetensors" for number, index in enumerate(writers, 1)
        }
        return [dataclasses.replace(plan, storage_data=names.get(index)) for index, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's file; the result of every tensor in it is the file's name and stamp."""
        parts: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor) and item.tensor_data is not None
            if tensor.numel():  # a process without rows of a small tensor
                parts[item.index.fqn] = (tensor, tuple(item.tensor_data.chunk.offsets))
        results = []
        if parts:
            stamp = write_shard(self._folder / plan.storage_data, parts)
            results = [WriteResult(item.index, 0, (plan.storage_data, stamp)) for item in plan.items]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Hand the stamps of all files on."""
        self._commit(dict(result.storage_data for written in results for result in written))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path."""
        return True


class ShardReader(StorageReader):
    """Reads the rows that a process asks for.

    Args:
        index: what the files hold.
        check: called with a tensor's name and the rows that were read, before they are used.
    """

    def __init__(self, index: Mapping[str, SavedTensor], check: Callable[[str, Tensor], None]) -> None:
        self._index, self._check = index, check

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between two loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in torch's words."""
        tensors: dict[str, Any] = {
            name: TensorStorageMetadata(
                properties=TensorProperties(dtype=saved.dtype),
                size=torch.Size(saved.shape),
                chunks=[
                    ChunkStorageMetadata(offsets=_offsets(part.first_row, part.shape), sizes=torch.Size(part.shape))
                    for part in saved.parts
                ],
            )
            for name, saved in self._index.items()
        }
        files = {
            MetadataIndex(name, _offsets(part.first_row, part.shape)): part.file
            for name, saved in self._index.items()
            for part in saved.parts
        }
        return Metadata(state_dict_metadata=tensors, storage_data=files)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Note which part is in which file."""
        self._files = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read, check and copy what was planned, file by file."""
        by_file: dict[Path, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._files[item.storage_index], []).append(item)
        for path, items in by_file.items():
            read_parts(path, {item.storage_index.fqn for item in items}, self._copier(items, planner))
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _copier(self, items: list[ReadItem], planner: LoadPlanner) -> Callable[[Any], None]:
        def copy(file: Any) -> None:
            for item in items:
                rows = tuple(
                    slice(begin, begin + length)
                    for begin, length in zip(item.storage_offsets, item.lengths, strict=True)
                )
                read = file.get_slice(item.storage_index.fqn)[rows]
                self._check(item.storage_index.fqn, read)
                planner.resolve_tensor(item).detach().copy_(read)

        return copy

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path."""
        return True


def _offsets(first_row: int, shape: tuple[int, ...]) -> torch.Size:
    return torch.Size([first_row, *[0] * (len(shape) - 1)] if shape else [])
