"""When a run's checkpoints are written and in which form: small ones at once as files, large ones in the background as shards.

Decision: what ended in the background is told where all processes look at the same step, so that all of them go on or end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_gpt import cli, devices, processes
from lit_gpt.checkpoints import run_files, saving
from lit_gpt.checkpoints.markers import checkpoint_path
from lit_gpt.checkpoints.sharded import ShardedSaves
from lit_gpt.files import SaveError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_GB = 1e9


class _Pending(NamedTuple):
    """A save that is being written."""

    path: Path
    step: int
    blocked_s: float
    """For which training waited at its beginning."""


class CheckpointSaves:
    """The saves of one run.

    Args:
        run_dir: the run's folder, whose lock is held.
        shard_above_gb: larger checkpoints are sharded.
        committed: called with every checkpoint that is whole, on the first process, perhaps in the background.
    """

    def __init__(self, run_dir: Path, shard_above_gb: float, committed: Callable[[Path], object]) -> None:
        self._run_dir, self._shard_above_gb, self._committed = run_dir, shard_above_gb, committed
        self._background = ShardedSaves()
        self._pending: _Pending | None = None
        self.saved_step = 0
        """The newest step that is on the disk, as far as this process knows."""
        self.failed_step = 0
        """The newest step that could not be written, and whose error has been raised."""

    def save(
        self, fabric: Fabric, state: dict[str, Any], record: dict[str, Any], keep: int | None, alone: bool = False
    ) -> None:
        """Write a checkpoint, after the one before it; every process calls it, or the first one alone.

        Args:
            fabric: as in `saving.save_checkpoint`, as are the following.
            state: model, optimizer, and plain values.
            record: what the run is.
            keep: how many checkpoints stay.
            alone: the other processes do not take part.

        Raises:
            SaveError: it could not be written, or the one before it.
            ValueError: alone, and the model is sharded over processes.
        """
        self.wait(fabric)
        started = time.perf_counter()
        if saving.state_bytes(state) > self._shard_above_gb * _GB:
            with self._noting_failure(state["step_count"]):
                self._start(fabric, state, record, keep, alone)
            if alone:
                self.settle()
            return
        with self._noting_failure(state["step_count"]):
            path = saving.save_checkpoint(fabric, self._run_dir, state, record, keep, alone)
        if alone:
            self._committed(path)
        else:
            devices.on_rank_zero(fabric, lambda: self._committed(path))
        self.saved_step = state["step_count"]
        devices.say(fabric, f"saved {path} ({time.perf_counter() - started:.1f} s)")

    @contextlib.contextmanager
    def _noting_failure(self, step: int) -> Iterator[None]:
        try:
            yield
        except SaveError:
            self.failed_step = step
            raise

    def _start(
        self, fabric: Fabric, state: dict[str, Any], record: dict[str, Any], keep: int | None, alone: bool
    ) -> None:
        """Begin to write a folder of shards."""
        started = time.perf_counter()
        if alone:
            saving.check_alone(fabric, state)

        def committed(path: Path) -> None:
            run_files.remove_replaced(path, keep)
            self._committed(path)

        self._background.start(fabric, self._run_dir, saving.unwrapped(state), record, committed, alone)
        path = checkpoint_path(self._run_dir, state["iter_num"], sharded=True)
        self._pending = _Pending(path, state["step_count"], time.perf_counter() - started)

    def look(self, fabric: Fabric) -> None:
        """Tell of a save that has ended in the background; every process calls it, at the same steps.

        Raises:
            SaveError: it could not be written.
        """
        if self._pending is not None and not devices.any_process(fabric, not self._background.written):
            self.wait(fabric)

    def wait(self, fabric: Fabric) -> None:
        """Wait for the save in the background, if there is one; every process calls it.

        Raises:
            SaveError: it could not be written.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        started = time.perf_counter()
        try:
            with self._noting_failure(pending.step):
                seconds = self._background.wait()
        except SaveError as error:
            raise SaveError(f"{error}; {devices.on_rank_zero(fabric, self._last_good)}") from error
        self.saved_step = pending.step
        blocked_s = pending.blocked_s + time.perf_counter() - started
        devices.say(fabric, f"saved {pending.path} ({blocked_s:.1f} s, and {seconds:.1f} s in the background)")

    def _last_good(self) -> str:
        return saving.last_good(self._run_dir)

    def settle(self, lost_a_process: bool = False) -> None:
        """Before an error ends the run: let the save in the background end, without asking the other processes.

        Args:
            lost_a_process: the error says that one is gone; that this keeps the save from ending is not said again.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            self._background.wait()
            self.saved_step = pending.step
        # The error that ends the run is the one to tell.
        except Exception as error:
            lost = isinstance(error, RuntimeError) and processes.lost_a_process(error)
            reason = "a process that has a part of it is gone" if lost else error
            if not (lost and lost_a_process):
                cli.warn(f"step {pending.step} could not be saved: {reason}")
