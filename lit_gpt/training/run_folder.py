"""One run on disk, as the training loop sees it: lock, resume, log, checkpoints, the exported model, the record.

A run folder holds the checkpoints, `run.json` (what the run is, and its result once finished) and `run.lock`. What goes
into the files is decided in `checkpoints`, when they are written is decided here. Whatever fails on the first process
fails on all of them, so that none waits for the others.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lit_gpt import cli, devices, files, processes
from lit_gpt.checkpoints import export, run_files, run_record, saving, weights
from lit_gpt.training import loggers, skipped_steps, speed_monitor
from lit_gpt.training.checkpoint_saves import CheckpointSaves
from lit_gpt.training.settings import TrainConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from lit_gpt.training.experiment import Experiment

METRICS = (
    *("step", "metric/train_loss", "metric/train_ppl", "metric/val_loss", "metric/val_ppl", "metric/val_bpb"),
    *("metric/val_loss_se", "metric/val_loss_draws_se"),
    *("metric/grad_norm", "learning_rate", "samples", "total_tokens", "skipped_steps"),
    *("time/left", "memory/peak_gb", *speed_monitor.RATE_COLUMNS),
)
# In `run.json`, from a run's being taken back (--resume PATH) or replaced (--resume never) to its first save: the micro
# step whose checkpoint it starts from, -1 for none. Later checkpoints stay until then, but do not count.
VALID_UNTIL = "checkpoints_valid_until"
# In `run.json` while the run goes on: what started it, so that a restart by the launcher is told from a new start.
LAUNCH = "launch"
# In the record of the run, its checkpoints and its export: the ranges of steps whose data is passed over.
SKIPPED = "skip_steps"


# Among the settings of a run that was finished and then given more steps: where it had ended, for the schedule.
EXTENDED_FROM = "extended_from"
_EXTENDED_SETTINGS = ("max_steps", "warmup_steps", EXTENDED_FROM)


def extension_start(start: run_files.CheckpointInfo | None, max_steps: int) -> int | None:
    """The step at which a run was extended: a finished one is if it is to have more steps; None where none was.

    Args:
        start: the checkpoint from which the run goes on; its settings say whether it is a run's last one.
        max_steps: the run's last step from now on.
    """
    planned = start.settings.get("max_steps") if start else None
    if start is None or planned is None:
        return None
    if start.step == planned < max_steps:
        return start.step
    return start.settings.get(EXTENDED_FROM) if planned == max_steps else None


class RunFolder:
    """An opened run; use `RunFolder.open` as a context manager."""

    def __init__(self, path: Path, experiment: Experiment, config: TrainConfig, precision: str) -> None:
        self.path, self.experiment, self.config, self.precision = path, experiment, config, precision
        self.record: dict[str, Any] = {}
        self.start: run_files.CheckpointInfo | None = None
        self.total_tokens = 0
        self.finished: dict[str, Any] | None = None
        # A finished run beside this one that would be this one with fewer steps.
        self._shorter: Path | None = None
        self.extended_from: int | None = None
        """The step at which the run had been finished before it was extended, or None."""
        # The shorter run's exported model, which the extension's replaces.
        self._replaced_export: Path | None = None
        # Checkpoints of later micro steps than this one are not this run's any more; the first save deletes them.
        self._valid_until: int | None = None
        self._loggers: loggers.RunLoggers | None = None
        self.saves = CheckpointSaves(path, config.shard_checkpoints_gb, self._discard_later)
        """Writes the checkpoints."""

    @classmethod
    @contextlib.contextmanager
    def open(cls, fabric: Fabric, path: Path, experiment: Experiment, config: TrainConfig) -> Iterator[RunFolder]:
        """Lock the folder, decide where to start, and refuse what would not end well before the first step.

        Raises:
            ValueError: another process writes here; the settings differ from the checkpoint's (they are listed); the
                export's name is taken; `--resume never` would replace a run.
        """
        folder = cls(path, experiment, config, devices.precision_name(fabric))
        with contextlib.ExitStack() as stack:
            prepared = devices.on_rank_zero(fabric, lambda: folder._prepare(stack))
            folder.record, folder.start, folder.finished = prepared
            folder.extended_from = extension_start(folder.start, experiment.max_steps)
            if folder.finished is not None:
                line = "nothing to do; --resume never --overwrite true starts it anew"
                devices.say(fabric, f"run {experiment.name} is finished ({path}): {line}")
            elif fabric.is_global_zero:
                folder._open_logs()
            if folder._shorter is not None:
                line = f"--resume {folder._shorter} extends it, with this run's own folder and name"
                devices.say(fabric, f"{folder._shorter} is a finished run of these settings with fewer steps: {line}")
            yield folder

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting that changes numbers, an extension's start among them."""
        extended = {} if self.extended_from is None else {EXTENDED_FROM: self.extended_from}
        return {**self.experiment.settings, **extended}

    def extension_lines(self) -> list[str]:
        """What an extension does to the schedule and to the finished model; none where nothing is extended now."""
        start, config, experiment = self.extended_from, self.config, self.experiment
        if start is None or self.start is None or self.start.step != start:
            return []
        lines = [
            f"extended: the run had ended at step {start}; from {config.min_lr:g} the learning rate rises again within "
            f"{experiment.warmup_steps} steps to the cosine of {experiment.max_steps} steps, so the loss may rise at first"
        ]
        if (path := self._replaced_export) is not None:
            lines.append(f"{path} will be replaced at the end; the model of step {start} stays in {self.start.path}")
        return lines

    @property
    def log_path(self) -> Path:
        """The CSV with the run's metrics."""
        return Path(self.record["log_path"])

    @property
    def skipped_steps(self) -> skipped_steps.Ranges:
        """The steps whose data is passed over."""
        return self.record.get(SKIPPED, [])

    def _prepare(self, stack: contextlib.ExitStack) -> tuple[dict[str, Any], Any, dict[str, Any] | None]:
        """The first process's part of `open`: (record, checkpoint to start from, result if finished)."""
        path, config, experiment = self.path, self.config, self.experiment
        loggers.check_names(config.logger)
        files.make_folder(path)
        stack.enter_context(files.folder_lock(path))
        run_files.remove_temporary(path)
        start = self._choose_start()
        record = run_record.read_run_record(path, ("run_id", "log_path")) if start else {}
        record = {key: value for key, value in record.items() if key not in (VALID_UNTIL, LAUNCH)}
        passed_over = start.record.get(SKIPPED, []) if start else []
        skipped = skipped_steps.union(
            record.get(SKIPPED, []), passed_over, skipped_steps.parse_ranges(config.skip_steps)
        )
        self.extended_from = extension_start(start, experiment.max_steps)
        if start is None and config.resume == "auto":
            self._shorter = run_record.find_shorter_run(path.parent, experiment.settings, _EXTENDED_SETTINGS)
        if start is not None:
            self._check_settings(start)
            if (step := skipped_steps.first_outside(skipped, passed_over, start.step)) is not None:
                raise ValueError(
                    f"--skip_steps: {start.path} (step {start.step}) has learnt from step {step} already; "
                    "--resume PATH goes back to an earlier checkpoint"
                )
            if record.get("finished") and config.resume == "auto" and start.step == experiment.max_steps:
                return record, start, record.get("result", {})
        if not record:
            log_folder = loggers.next_version(Path(config.log_dir) / (config.name or experiment.model.config.name))
            record = {
                "name": experiment.name,
                "run_id": uuid.uuid4().hex,
                "kind": experiment.model.kind,
                "config": experiment.model.config.to_dict(),
                "settings": experiment.settings,
                "log_path": str(log_folder / "metrics.csv"),
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "command": shlex.join(sys.argv),
                **experiment.record,
            }
        # An extension may begin, or one be given up that wrote its settings and no checkpoint.
        record |= {"finished": False, "settings": self.settings}
        if start is not None and start.step == self.extended_from:
            record.pop("result", None)  # the shorter run's
        if skipped:
            record[SKIPPED] = skipped
        target = export.claim_export(
            Path(config.models_dir), experiment.export_name, record["run_id"], config.overwrite
        )
        if target.stem != experiment.export_name:
            cli.warn(
                f"{experiment.export_name}{target.suffix} is there and no run's: this one will be exported as {target}"
            )
        if start is not None and start.step == self.extended_from and target.exists():
            self._replace_export(target, start)
        self._write_record(record)
        return record, start, None

    def _replace_export(self, path: Path, start: run_files.CheckpointInfo) -> None:
        """An extension is to replace the finished run's export: asked for, unless the run was named by its user."""
        if self.config.name is None and not self.config.overwrite:
            raise ValueError(
                f"{path} is the model of step {start.step} of this run, which {self.experiment.max_steps} steps would "
                f"replace: --overwrite true extends the run (that model's weights stay in {start.path}), another --name "
                "starts one beside it"
            )
        self._replaced_export = path

    def _choose_start(self) -> run_files.CheckpointInfo | None:
        """The checkpoint to start from; also decides which ones the first save deletes (`_valid_until`)."""
        resume = self.config.resume
        if processes.is_restart() and run_record.read_run_record(self.path).get(LAUNCH) == processes.launch_name():
            resume = "auto"  # what was asked for was done when the launcher first started this run
        if resume not in ("auto", "never"):
            return self._start_from(run_files.open_checkpoint(Path(resume)))
        if resume == "auto":
            if run_files.list_checkpoints(self.path):
                # A run that was taken back, or replaced, and ended before its first save.
                self._valid_until = run_record.read_run_record(self.path).get(VALID_UNTIL)
            return run_files.newest_complete(self.path, cli.warn, self._valid_until)
        found = run_files.newest_complete(self.path, cli.warn)
        if found is None:
            return None
        if not self.config.overwrite:
            raise ValueError(
                f"--resume never: {self.path} holds a run at step {found.step}; --overwrite true replaces it, "
                "--out_dir starts another"
            )
        self._valid_until = -1
        return None

    def _start_from(self, chosen: run_files.CheckpointInfo) -> run_files.CheckpointInfo:
        """Go on from a checkpoint that the user named; later ones of this run would win the next time, so they are to go."""
        if chosen.path.resolve().parent == self.path.resolve():
            self._valid_until = chosen.iter_num
        elif run_files.list_checkpoints(self.path):
            raise ValueError(
                f"--resume {chosen.path} is of another folder, but {self.path} holds a run of its own: "
                "--resume auto goes on with it, another --out_dir starts anew"
            )
        return chosen

    def _check_settings(self, start: run_files.CheckpointInfo) -> None:
        if not start.settings:
            cli.warn(f"{start.path} does not say with which settings it was made: nothing is compared")
        saved = start.settings
        if start.step == self.extended_from:
            # More steps, the warmup that follows from them, and an earlier extension's start.
            saved |= {name: value for name, value in self.settings.items() if name in _EXTENDED_SETTINGS}
        different = run_record.differences(saved, self.settings)
        if different:
            raise ValueError(
                f"cannot resume {start.path} with other settings: {'; '.join(different)}. Give the checkpoint's values, "
                "or start another run (--name, --out_dir, or --resume never --overwrite true)"
            )

    def _open_logs(self) -> None:
        """Open the loggers; only the first process has them."""
        step = self.start.step if self.start else None
        folder, experiment = self.log_path.parent, self.experiment
        self._loggers = loggers.RunLoggers(folder)
        self._loggers.add("csv", lambda: loggers.MetricsCsv(self.log_path, METRICS, step))
        if "tensorboard" in self.config.logger:
            self._loggers.add("tensorboard", lambda: loggers.tensorboard_logger(folder))
        if "wandb" in self.config.logger:
            self._loggers.add("wandb", lambda: loggers.WandbLogger(folder, experiment.name, experiment.settings))

    def restore(self, fabric: Fabric, model: Any, optimizer: Any) -> int:
        """Load the checkpoint to start from into model and optimizer; returns its step, or 0 without one."""
        if self.start is None:
            return 0
        state = {"model": model, "optimizer": optimizer}
        rest = saving.load_checkpoint(fabric, self.start, state)
        self.total_tokens = int(rest.get("total_tokens", 0))
        self.saves.saved_step = self.start.step
        return self.start.step

    def micro_batch_size(self, world_size: int) -> int | None:
        """The micro batch of the checkpoint, if the same number of devices wrote it: sums then have the same order."""
        run = self.start.record.get("run", {}) if self.start else {}
        return run.get("micro_batch_size") if run.get("world_size") == world_size else None

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Write metrics to every logger."""
        if self._loggers is not None:
            self._loggers.log(metrics, step)

    def save(self, fabric: Fabric, state: dict[str, Any], micro_batch_size: int, alone: bool = False) -> None:
        """Write a checkpoint, as `CheckpointSaves.save` does. The final one does not count as kept."""
        run = {"micro_batch_size": micro_batch_size, "world_size": fabric.world_size}
        record = {**self.record, "settings": self.settings, "run": run}
        keep = self.config.keep_checkpoints
        if keep and state["step_count"] == self.experiment.max_steps:
            keep += 1
        self.saves.save(fabric, state, record, keep or None, alone)

    def _discard_later(self, saved: Path) -> None:
        """After the first save of a run that was taken back: delete what it was taken back from."""
        if self._valid_until is not None:
            run_files.remove_checkpoints(self.path, self._valid_until, but=saved)
            self._valid_until = None
            self._write_record(self.record)

    def _write_record(self, record: dict[str, Any]) -> None:
        """Write `run.json`, with what the first save will delete and what launched this."""
        pending = {} if self._valid_until is None else {VALID_UNTIL: self._valid_until}
        launch = {LAUNCH: name} if (name := processes.launch_name()) else {}
        run_record.write_run_record(self.path, {**record, **pending, **launch})

    def finish(self, fabric: Fabric, result: dict[str, Any]) -> dict[str, Any]:
        """Export the final checkpoint's weights and mark the run finished; returns the result with the export's path."""
        record = devices.on_rank_zero(fabric, lambda: self._finish(result))
        devices.say(fabric, f"exported {record['result']['export']}")
        if self._loggers is not None:
            self._loggers.close()
        return dict(record["result"])

    def _finish(self, result: dict[str, Any]) -> dict[str, Any]:
        state, _ = weights.load_weights(self.path, cli.warn)
        described = {key: value for key, value in self.record.items() if key not in ("finished", "log_path")}
        target = export.export_weights(
            Path(self.config.models_dir),
            self.experiment.export_name,
            state,
            {**described, "result": result},
            self.config.overwrite,
            self.experiment.tokenizer,
        )
        if target.stem != self.experiment.export_name:
            cli.warn(f"{self.experiment.export_name} is taken: exported as {target}")
        record = {**self.record, "finished": True, "result": {**result, "export": str(target)}}
        run_record.write_run_record(self.path, record)
        return record

    def interrupted(self, fabric: Fabric, signal_number: int, step: int) -> NoReturn:
        """Leave after a signal; everything is saved."""
        self.saves.wait(fabric)
        fabric.barrier()
        name = signal.Signals(signal_number).name
        raise cli.Interrupted(
            f"{name}: stopped at step {step} of {self.experiment.max_steps} and saved; the same command goes on from there",
            signal_number,
        )

    def bad_gradient(self, step: int, loss: float, grad_norm: float) -> str:
        """What to tell when a step's loss or gradient is not a number, or a loss has no gradient."""
        found = run_files.newest_complete(self.path, lambda line: None)
        last = f"the last good checkpoint is {found.path}" if found else "there is no checkpoint yet"
        if grad_norm == 0:
            what = "no weight would learn"
            remedy = "Weights that are all 0 do that; otherwise it is a fault of this code"
        else:
            what = "not finite"
            remedy = (
                f"The same command with --skip_steps {step} passes over that step's data; a new run may take a lower "
                "--learning_rate or --precision 32-true"
            )
        return (
            f"step {step}: loss {loss}, gradient norm {grad_norm}: {what}, stopped before the update; {last}. {remedy}"
        )
