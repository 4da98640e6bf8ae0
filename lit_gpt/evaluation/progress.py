"""The one place that tells what an evaluation costs, and how much of it is done.

Decisions: the cost is told once, before the first pass, summed over all processes; progress counts FLOPs, not requests:
the longest come first, and a request is done only with its batch or round. Passes are seen by hooks on the embedding and
the head, so that no sampler and no estimator has to report them, and the device is never waited for.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from lit_gpt.devices import join_processes
from lit_gpt.evaluation.work import Work, total_work
from lit_gpt.model.flops import forward_flops
from lit_gpt.model.layers import Transformer

Result = TypeVar("Result")
# Where the bar is no terminal's, its lines come ever more slowly, at last after half a minute.
_LONGEST_PAUSE_S = 30.0
_SHORTEST_PAUSE_S = 0.1
# Shown at most as long as requests are unfinished.
_MOST_UNFINISHED = 0.99
_TOLD = re.compile(
    r"[a-z]+: ([\d,]+) requests, ([\d,]+) of them found, [\d,]+ to compute"
    r"(?:: at most ([\d,]+) passes over ([\d,]+) tokens, ([\d.e+]+) FLOPs)?"
)
_BAR_FORMAT = "{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]"


def tell_work(what: str, todo: Work, found: int = 0, note: str = "", everywhere: bool = False) -> None:
    """Say on the first process what is about to be computed; every process calls it, unless one knows all.

    Args:
        what: is computed.
        todo: the cost of what is not there yet.
        found: requests whose results are there already.
        note: more about the cost.
        everywhere: the numbers are those of all processes already.
    """
    rank, processes = join_processes()
    counts = torch.tensor([todo.requests, todo.passes, todo.tokens, todo.flops, found], dtype=torch.float64)
    if processes > 1 and not everywhere:
        torch.distributed.all_reduce(counts)
    requests, passes, tokens, flops, found = counts.tolist()
    if rank or not requests + found:
        return
    line = f"{what}: {requests + found:,.0f} requests, {found:,.0f} of them found, {requests:,.0f} to compute"
    if requests:
        line += f": at most {passes:,.0f} passes over {tokens:,.0f} tokens, {flops:.3g} FLOPs{note}"
    if processes > 1:
        line += f", in {processes} processes"
    # Standard output has the results alone, which scripts read.
    print(line, file=sys.stderr, flush=True)


def read_told(line: str) -> tuple[Work, int] | None:
    """What a line of `tell_work` told: the work, and the requests that were found; None for any other line."""
    found = _TOLD.match(line)
    if found is None:
        return None
    requests, known, passes, tokens = (int(number.replace(",", "")) if number else 0 for number in found.groups()[:4])
    return Work(requests - known, passes, tokens, int(float(found[5] or 0))), known


def end_dry_run() -> None:
    """Say on the first process that there was no more."""
    if not join_processes()[0]:
        print("dry run: nothing was computed, nothing was written", file=sys.stderr, flush=True)


class WorkBar:
    """A bar of the work that is done and the time that is left, a context around the passes.

    Args:
        model: whose passes are counted.
        total: the cost of all that is computed here.
        what: is computed.
        shown: False shows nothing.
    """

    def __init__(self, model: Transformer, total: Work, what: str, shown: bool = True) -> None:
        self.model, self.total, self.what = model, total, what
        self.shown = shown and total.flops > 0
        self.finished = Work()
        self._note = ""
        # FLOPs of passes: since requests were last finished, of the pass that runs, and of all before.
        self._current, self._running, self._before = 0, 0, 0
        # Passes cost more than was foreseen where rows are padded, less where rows are shared or end early.
        self._ratio = 1.0
        self._finished_before = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        from tqdm import tqdm

        self._bar = tqdm(
            total=max(1, self.total.flops),
            desc=self.what,
            bar_format=_BAR_FORMAT,
            smoothing=0,
            miniters=1,
            mininterval=_SHORTEST_PAUSE_S,
            disable=not self.shown,
        )
        self._started, self._is_terminal = time.monotonic(), sys.stderr.isatty()
        if self.shown:
            self._hooks = [
                self.model.transformer.wte.register_forward_pre_hook(self._see_pass),
                self.model.lm_head.register_forward_pre_hook(self._see_head),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is None:
            self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()

    def finish(self, work: Work, note: str = "") -> None:
        """Count work as done, and show how many requests are; `note` stands behind that."""
        self.finished = self.finished + work
        self._note = f", {note}" if note else ""
        self._current, self._running, self._before = 0, 0, self._before + self._current + self._running
        self._show()

    def _see_pass(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A pass begins: those before it are done."""
        if self.finished.flops > self._finished_before:
            self._finished_before = self.finished.flops
            self._ratio = self._before / self.finished.flops or 1.0
        self._current += self._running
        rows, length = inputs[0].shape
        pairs = rows * self.model.visibility.pairs(length)
        self._running = forward_flops(self.model.config, rows * length, pairs, 0)
        self._show()

    def _see_head(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._running += forward_flops(self.model.config, 0, 0, inputs[0].shape[:-1].numel())

    def _show(self) -> None:
        done = self.finished.flops + self._current / self._ratio
        if self.finished.requests < self.total.requests:
            done = min(done, _MOST_UNFINISHED * self._bar.total)
        requests = f"{self.finished.requests} of {self.total.requests} requests{self._note}"
        self._bar.set_postfix_str(requests, refresh=False)
        if not self._is_terminal:
            self._bar.mininterval = min(_LONGEST_PAUSE_S, max(_SHORTEST_PAUSE_S, time.monotonic() - self._started))
        self._bar.update(max(0.0, done - self._bar.n))


def results_with_bar(
    model: Transformer, results: Iterable[tuple[str, Result]], works: Mapping[str, Work], what: str, shown: bool = True
) -> dict[str, Result]:
    """Results by key as they come, behind a bar of their work.

    Args:
        model: as `WorkBar`.
        results: (key, result) pairs.
        works: the cost of each, by key.
        what: as `WorkBar`.
        shown: as `WorkBar`.
    """
    found = {}
    with WorkBar(model, total_work(list(works.values())), what, shown) as bar:
        for key, result in results:
            found[key] = result
            bar.finish(works[key])
    return found
