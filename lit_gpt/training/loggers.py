"""Where a run's metrics are written: a CSV that a resumed run continues, TensorBoard and W&B when they are asked for.

A log never ends a run: what cannot be written (a full disk, a service that does not answer) is said once.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import re
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lit_gpt import cli
from lit_gpt.files import open_regular, write_file

LOGGERS = ("csv", "tensorboard", "wandb")


class MetricsCsv:
    """One row per logged step in a CSV; reopening it at a step drops the rows behind that step and goes on."""

    def __init__(self, path: Path, columns: Sequence[str], resume_step: int | None) -> None:
        self.path, self.columns = path, list(columns)
        rows = [] if resume_step is None or not path.exists() else _rows_up_to(path, resume_step)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_file(path, lambda file: file.write(text.getvalue().encode()))
        self._waiting = b""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Append a row; columns without a value stay empty. Rows that could not be written are tried again with the next.

        Raises:
            OSError: they cannot be written; the file ends with its last whole row.
        """
        text = io.StringIO()
        csv.DictWriter(text, self.columns, extrasaction="ignore").writerow({"step": step, **metrics})
        self._waiting += text.getvalue().encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                written = file.write(self._waiting)
                if written < len(self._waiting):  # a disk that is nearly full takes a part
                    file.write(self._waiting[written:])
            except OSError:
                file.truncate(end)
                raise
        self._waiting = b""

    def finalize(self, status: str) -> None:
        """Nothing is left to write."""


def _rows_up_to(path: Path, step: int) -> list[dict[str, str]]:
    """The rows of a metrics file up to a step; one that a kill cut short has no step or too few columns.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with open_regular(path) as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if "step" not in (reader.fieldnames or ["step"]):
                raise ValueError("its first line has no column step")
            whole = [row for row in reader if None not in row.values() and (row["step"] or "x").isdecimal()]
            return [row for row in whole if int(row["step"]) <= step]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not the log of a run ({error}): move it away, and the log begins anew") from error


class WandbLogger:
    """A run in W&B's project `scaling`; a resumed run of the same folder goes on in it."""

    def __init__(self, folder: Path, run_name: str, settings: dict[str, Any]) -> None:
        import wandb

        run_id = re.sub(r"\W", "-", f"{run_name}-{folder.name}")
        self._run = wandb.init(project="scaling", name=run_name, id=run_id, dir=folder, config=settings, resume="allow")

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""
        self._run.log(metrics, step=step)

    def finalize(self, status: str) -> None:
        """Send what is left."""
        self._run.finish()


def next_version(folder: Path) -> Path:
    """`version_N` for the first N that no earlier run used."""
    used = [int(path.name[8:]) for path in folder.glob("version_*") if path.name[8:].isdigit()]
    return folder / f"version_{max(used, default=-1) + 1}"


def check_names(names: Sequence[str]) -> None:
    """Refuse loggers that cannot be had.

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"--logger {name} is unknown: choose from {', '.join(LOGGERS)}")
        if name != "csv" and not importlib.util.find_spec(name):
            raise ValueError(f"--logger {name}: the package is not installed; pip install 'smdm[loggers]'")


class RunLoggers:
    """A run's loggers, none of which can end it: the first failure of each is a warning."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loggers: dict[str, Any] = {}
        self._failed: set[str] = set()

    def add(self, name: str, make: Callable[[], Any]) -> None:
        """Open a logger with `log_metrics` and `finalize`; goes on without it where that fails."""
        logger = self._guard(name, make)
        if logger is not None:
            self._loggers[name] = logger

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write the metrics of a step to every logger."""
        for name, logger in self._loggers.items():
            self._guard(name, partial(logger.log_metrics, metrics, step))

    def close(self) -> None:
        """Write what is left."""
        for name, logger in self._loggers.items():
            self._guard(name, partial(logger.finalize, "success"))

    def _guard(self, name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        # Whatever a logger's package raises is no reason to lose a run.
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                cli.warn(f"the {name} log in {self.folder} cannot be written: {_reason(error)}; the run goes on")
            return None


def _reason(error: BaseException) -> str:
    """What first went wrong, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())


def tensorboard_logger(folder: Path) -> Any:
    """TensorBoard's files in a run's log folder."""
    from lightning_fabric.loggers import TensorBoardLogger

    show = threading.excepthook

    def show_others(args: threading.ExceptHookArgs) -> None:
        # Its writing thread ends with the first error, which the next call raises.
        if type(args.thread).__name__ != "_AsyncWriterThread":
            show(args)

    threading.excepthook = show_others
    return TensorBoardLogger(root_dir=folder, name="tensorboard", version="")


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
