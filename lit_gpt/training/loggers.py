"""Where a run's metrics are written: a CSV that a resumed run continues, TensorBoard and W&B when they are asked for."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_gpt.files import write_file

LOGGERS = ("csv", "tensorboard", "wandb")


class MetricsCsv:
    """One row per logged step in a CSV; reopening it at a step drops the rows behind that step and goes on."""

    def __init__(self, path: Path, columns: Sequence[str], resume_step: int | None) -> None:
        self.path, self.columns = path, list(columns)
        rows: list[dict[str, str]] = []
        if resume_step is not None and path.exists():
            with path.open(newline="") as file:
                # A row that a kill cut short has no step or too few columns.
                rows = [
                    row
                    for row in csv.DictReader(file)
                    if None not in row.values() and (row["step"] or "x").isdigit() and int(row["step"]) <= resume_step
                ]
        path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_file(path, lambda file: file.write(text.getvalue().encode()))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Append a row; columns without a value stay empty."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, extrasaction="ignore").writerow({"step": step, **metrics})


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


def extra_loggers(names: Sequence[str], folder: Path, run_name: str, settings: dict[str, Any]) -> list[Any]:
    """TensorBoard and W&B loggers, if asked for.

    Args:
        names: of LOGGERS; `csv` is always on.
        folder: the run's log folder.
        run_name: the name in W&B's project `scaling`.
        settings: shown beside the run.

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    loggers: list[Any] = []
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"--logger {name} is unknown: choose from {', '.join(LOGGERS)}")
        if name != "csv" and not importlib.util.find_spec(name):
            raise ValueError(f"--logger {name}: the package is not installed; pip install 'smdm[loggers]'")
        if name == "tensorboard":
            from lightning_fabric.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(root_dir=folder, name="tensorboard", version=""))
        elif name == "wandb":
            loggers.append(WandbLogger(folder, run_name, settings))
    return loggers


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
