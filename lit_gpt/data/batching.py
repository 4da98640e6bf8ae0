"""From sample numbers to a device's micro batches.

Step s (from 0) trains on samples s * B ... s * B + B - 1 of the data set, in that order. A *group* is a fixed run of
consecutive rows of a step; what the published recipe decides per micro batch (a random length, one denominator) is
decided per group, from sample numbers alone. So neither the number of devices nor the micro batch changes the loss: a
micro batch holds rows of one length, of one group or several, so that none is padded for another.

B rows, T tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lit_gpt.data.packed_dataset import Extent, Sample

# Threads that read a step's samples, samples that one of them reads before it looks for more, and how long the next ones
# are waited for until more threads read. Files in the page cache (0.05 ms a sample) keep one thread busy; eight, which hand
# Python's lock over at every call of the system, read 13,659 samples/s at best where one read 23,858 and this 19,704
# (15 rounds in turn of 2,048 samples in 30,000 files, on 2 cores). Where each sample takes 3 ms, all eight soon read.
READER_THREADS = 8
_PIECE_SAMPLES = 4
_PATIENCE_S = 0.001

Prepared = TypeVar("Prepared")
"""What training makes of a micro batch before a device sees it."""


class Dataset(Protocol):
    """What training reads: sample k is a pure function of k."""

    block_length: int

    def __getitem__(self, k: int) -> Sample: ...

    def extent(self, k: int) -> Extent:
        """Tokens of sample k and of its prompt, without reading them."""
        ...

    def epochs(self, samples: int) -> float:
        """How often `samples` samples go through the data."""
        ...

    def describe(self) -> str:
        """One line for the console: files, blocks, tokens."""
        ...


class ValidationData(Protocol):
    """What validation reads: a finite number of sequences."""

    block_length: int

    def __getitem__(self, index: int) -> Sample: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Group:
    """What an objective decides for one group of rows."""

    length: int
    """Rows are cut to this many input tokens."""
    denominator: float
    """The group's loss is its weighted sum of cross-entropies divided by this."""


class GroupRule(Protocol):
    """Decides a `Group` from the step, the group's number in it, and its rows' token counts."""

    def __call__(self, step: int, group: int, extents: Sequence[Extent]) -> Group:
        """Decide one group."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """One micro batch of one device."""

    tokens: Tensor
    """(B, T + 1) int64: T input tokens, which is the length of the rows' groups, and the one after them."""
    lengths: Tensor
    """(B,) int64: how many tokens of the row are real, before it was cut; behind them is padding."""
    prompt_lengths: Tensor
    """(B,) int64: how many tokens at the row's start are given; none in pretraining."""
    rows: Tensor
    """(B,) int64: the rows' numbers in the step's global batch (in validation: of the sequence)."""
    row_weights: Tensor
    """(B,) float64: 1 / (denominator * groups in the step)."""
    step: int
    """Optimizer step, from 0."""
    step_tokens: int = 0
    """Input tokens of the whole training step, over all its micro batches and devices."""


@dataclass(frozen=True)
class StepLayout:
    """How a step's rows are laid out; the same on every device but for `first_row`."""

    global_batch_size: int
    """Rows of a step, over all devices."""
    group_size: int
    """Rows of a group; divides the global batch."""
    micro_batch_size: int
    """Most rows of a micro batch."""
    first_row: int
    """This device's first row."""
    device_rows: int
    """A device's number of rows."""
    lengths_vary: bool = True
    """Whether groups may differ in length."""


def with_micro_batch(layout: StepLayout, size: int) -> StepLayout:
    """The same layout in micro batches of another size."""
    return replace(layout, micro_batch_size=min(size, layout.device_rows))


def largest_group(global_batch_size: int, group_size: int) -> int:
    """The largest divisor of the batch that is at most the published group size."""
    return next(size for size in range(min(group_size, global_batch_size), 0, -1) if global_batch_size % size == 0)


def step_batches(
    dataset: Dataset, rule: GroupRule, layout: StepLayout, step: int, readers: ThreadPoolExecutor | None = None
) -> list[MicroBatch]:
    """This device's micro batches of one step, the longest rows first; as many on every device.

    Sharded models meet in every pass, so a device whose rows have fewer lengths makes more micro batches of them.

    Args:
        dataset: the training data.
        rule: the objective's decision per group.
        layout: rows, groups, micro batches.
        step: optimizer step, from 0.
        readers: threads that read the samples; without, the caller's own.

    Returns:
        The batches, on the CPU; the same whatever the threads.
    """
    first_sample = step * layout.global_batch_size

    @functools.cache
    def decide(index: int) -> Group:
        members = range(index * layout.group_size, (index + 1) * layout.group_size)
        return rule(step, index, [dataset.extent(first_sample + row) for row in members])

    def plan(first_row: int) -> list[list[int]]:
        rows = range(first_row, first_row + layout.device_rows)
        return _same_lengths({row: decide(row // layout.group_size).length for row in rows}, layout.micro_batch_size)

    own = plan(layout.first_row)
    if layout.lengths_vary:
        first_rows = range(0, layout.global_batch_size, layout.device_rows)
        own = _split_up(own, max(len(plan(first_row)) for first_row in first_rows))
    groups_per_step = layout.global_batch_size // layout.group_size
    # Every device decides all groups where they differ, so it knows the others' tokens without asking.
    first_group = layout.first_row // layout.group_size
    decided = range(groups_per_step) if layout.lengths_vary else [first_group] * groups_per_step
    step_tokens = layout.group_size * sum(decide(index).length for index in decided)
    samples = _read_samples(dataset, [first_sample + row for rows in own for row in rows], readers)
    batches = []
    for rows in own:
        row_samples = list(itertools.islice(samples, len(rows)))
        groups = [decide(row // layout.group_size) for row in rows]
        batch = _collate(row_samples, groups, rows, groups_per_step)
        batches.append(replace(batch, step=step, step_tokens=step_tokens))
    return batches


def _read_samples(dataset: Dataset, numbers: list[int], readers: ThreadPoolExecutor | None) -> Iterator[Sample]:
    """The samples, in the order of their numbers in the list; read by as many threads as have to wait."""

    def read(piece: list[int]) -> list[Sample]:
        return [dataset[number] for number in piece]

    if readers is None:
        yield from read(numbers)
        return
    pieces = (numbers[start : start + _PIECE_SAMPLES] for start in range(0, len(numbers), _PIECE_SAMPLES))
    ahead = 1
    reading: deque[Future[list[Sample]]] = deque()
    while True:
        reading.extend(readers.submit(read, piece) for piece in itertools.islice(pieces, ahead - len(reading)))
        if not reading:
            return
        if futures.wait([reading[0]], _PATIENCE_S).done:
            yield from reading.popleft().result()
        else:
            ahead = min(2 * ahead, len(numbers))


def _same_lengths(lengths: dict[int, int], largest: int) -> list[list[int]]:
    """Rows to micro batches of one length and at most `largest` rows each, the longest first, else in the rows' order."""
    by_length: dict[int, list[int]] = {}
    for row, length in lengths.items():
        by_length.setdefault(length, []).append(row)
    return [
        rows[start : start + largest]
        for _, rows in sorted(by_length.items(), reverse=True)
        for start in range(0, len(rows), largest)
    ]


def _split_up(plan: list[list[int]], count: int) -> list[list[int]]:
    """The same rows in `count` micro batches: the smallest that can be are halved, full ones stay as they were measured."""
    plan = list(plan)
    while len(plan) < count:
        index = min((i for i, rows in enumerate(plan) if len(rows) > 1), key=lambda i: len(plan[i]))
        rows = plan[index]
        plan[index : index + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return plan


def _collate(samples: list[Sample], groups: list[Group], rows: Sequence[int], groups_per_step: int) -> MicroBatch:
    """Stack samples, cut to their groups' length, without a step."""
    tokens = np.stack([sample.tokens[: groups[0].length + 1] for sample in samples])
    weights = [1.0 / (group.denominator * groups_per_step) for group in groups]
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        lengths=torch.tensor([sample.length for sample in samples]),
        prompt_lengths=torch.tensor([sample.prompt_length for sample in samples]),
        rows=torch.tensor(list(rows)),
        row_weights=torch.tensor(weights, dtype=torch.float64),
        step=0,
    )


def prefetched_steps(
    dataset: Dataset,
    rule: GroupRule,
    layout: StepLayout,
    steps: Iterable[int],
    prepare: Callable[[MicroBatch], Prepared],
    threads: int = READER_THREADS,
) -> Iterator[tuple[int, list[Prepared]]]:
    """`step_batches` of each step, read by up to several threads and prepared by one, a step ahead of training.

    The order of a whole corpus opens another file for nearly every sample, and a file system far away takes
    milliseconds to open one: the threads then wait for several at a time.
    """

    def read(step: int) -> list[Prepared]:
        return [prepare(batch) for batch in step_batches(dataset, rule, layout, step, readers)]

    with ThreadPoolExecutor(threads, "files") as readers, ThreadPoolExecutor(1, "reader") as reader:
        reading: tuple[int, Future[list[Prepared]]] | None = None
        for step in steps:
            ahead = step, reader.submit(read, step)
            if reading is not None:
                yield reading[0], reading[1].result()
            reading = ahead
        if reading is not None:
            yield reading[0], reading[1].result()


def validation_batches(
    dataset: ValidationData, count: int, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[MicroBatch]:
    """A device's share of the first `count` validation sequences, whole rows.

    Every device gets the same number of batches, because sharded models meet in every forward pass; rows that fill up the
    last ones repeat sequence 0 with weight 0.

    Args:
        dataset: validation sequences.
        count: how many are validated on, over all devices.
        micro_batch_size: rows of a batch.
        rank: this device.
        world_size: devices.
    """
    block = Group(length=dataset.block_length - 1, denominator=1.0)
    per_round = micro_batch_size * world_size
    for start in range(0, count, per_round):
        first = start + rank * micro_batch_size
        rows = range(first, first + micro_batch_size)
        samples = [dataset[row if row < count else 0] for row in rows]
        batch = _collate(samples, [block] * len(samples), rows, 1)
        yield replace(batch, row_weights=(batch.rows < count).double())
