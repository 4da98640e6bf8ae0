"""Reading a step's samples from several threads: the same batches, in the same order, whatever the threads."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from lit_gpt.data import batching
from lit_gpt.data.batching import Group, StepLayout, prefetched_steps, step_batches
from lit_gpt.data.packed_dataset import Extent, Sample, open_mixture
from lit_gpt.data.packed_format import PackedDatasetBuilder

LAYOUT = StepLayout(48, group_size=4, micro_batch_size=5, first_row=16, device_rows=32)


def rule(step, group, extents):
    """Groups of three lengths, as random lengths and fine-tuning have them."""
    return Group(length=(4, 2, 3)[(step + group) % 3], denominator=1.0 + sum(extent.length for extent in extents))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    for prefix, count in (("train_slim", 700), ("train_star", 300)):
        builder = PackedDatasetBuilder(folder, prefix, 10, 1, vocab_size=32000)
        builder.add_array(np.arange(2, 2 + count))
        builder.write_reminder()
    return open_mixture(folder, {"train_slim": 0.7, "train_star": 0.3}, 5, 32000, 3)


def numbers(batches):
    return [
        [getattr(batch, name).tolist() for name in ("tokens", "lengths", "rows", "row_weights")] + [batch.step]
        for batch in batches
    ]


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_threads_change_nothing(mixture, threads):
    steps = [0, 1, 2, 7, 10**9]
    found = prefetched_steps(mixture, rule, LAYOUT, steps, lambda batch: batch, threads)
    expected = [(step, numbers(step_batches(mixture, rule, LAYOUT, step))) for step in steps]
    assert [(step, numbers(batches)) for step, batches in found] == expected


class Samples:
    """Sample k, of k alone; `read` is told of each."""

    block_length = 5

    def __init__(self, read):
        self.read = read

    def __getitem__(self, k):
        self.read(k)
        return Sample(np.full(5, k), 5)

    def extent(self, k):
        return Extent(5)


def test_samples_are_waited_for_together():
    """Four reads that each wait until the others have begun; one thread alone would wait for ever."""
    all_reading = threading.Barrier(4, timeout=60)
    first_of_its_thread = threading.local()

    def read(k):
        if not getattr(first_of_its_thread, "done", False):
            first_of_its_thread.done = True
            all_reading.wait()

    ((_, batches),) = prefetched_steps(Samples(read), rule, LAYOUT, [3], lambda batch: batch, threads=4)
    for batch in batches:
        assert batch.tokens[:, 0].tolist() == (3 * 48 + batch.rows).tolist()


def test_samples_that_are_there_at_once_are_read_by_one_thread_at_a_time(monkeypatch):
    """Threads that have nothing to wait for only wait for each other."""
    monkeypatch.setattr(batching, "_PATIENCE_S", 60)
    reading, most = [], []

    def read(k):
        reading.append(k)
        time.sleep(0.001)
        most.append(len(reading))
        reading.remove(k)

    ((_, batches),) = prefetched_steps(Samples(read), rule, LAYOUT, [3], lambda batch: batch)
    assert len(most) == sum(len(batch.rows) for batch in batches) > 16 and max(most) == 1


def test_of_several_samples_that_cannot_be_read_the_first_is_named():
    def read(k):
        if k >= 48 + 30:
            raise ValueError(f"sample {k} cannot be read")

    same_length = StepLayout(48, 48, 48, 0, 48)
    steps = prefetched_steps(Samples(read), lambda *_: Group(4, 1.0), same_length, [0, 1, 2], lambda batch: batch)
    assert next(steps)[0] == 0
    with pytest.raises(ValueError, match="sample 78 cannot be read"):
        next(steps)
