"""The one training loop: whatever is trained, from the first step or a checkpoint to the exported model.

An `Experiment` says what is trained, a `TrainConfig` how; the loop knows neither models' kinds nor tasks. Every random
number comes from counters (see `randomness`), the data position is the step, so a checkpoint holds weights, optimizer and one
number, and a resumed run computes bit for bit what an unbroken one does.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_gpt import cli, devices, processes
from lit_gpt.data import batching
from lit_gpt.data.batching import MicroBatch, StepLayout
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.training import loggers, schedule, skipped_steps, speed_monitor
from lit_gpt.training.attempts import Outcome
from lit_gpt.training.experiment import Experiment
from lit_gpt.training.group_sizes import published_micro_steps
from lit_gpt.training.prepared_model import PreparedModel
from lit_gpt.training.run_folder import RunFolder
from lit_gpt.training.settings import PRECISIONS, TrainConfig
from lit_gpt.training.speed_monitor import MicroBatchWork
from lit_gpt.training.step_guard import StepGuard, StepNumbers
from lit_gpt.training.validation import Validation, ValidationSize, validate

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Steps of a process in which memory may run out without ending the run: from the second on the optimizer's state is there.
_TRIAL_STEPS = 2


def fit(fabric: Fabric, experiment: Experiment, config: TrainConfig, run_dir: Path) -> dict[str, Any]:
    """Train an experiment to its last step, validate, export.

    Args:
        fabric: launched.
        experiment: what is trained.
        config: how.
        run_dir: folder of the run's checkpoints; a lock keeps other writers out.

    Returns:
        The run's result: last validation and where the exported model lies.

    Raises:
        ValueError: no training in this precision, the batch does not split over the devices, the run's settings differ
            from its checkpoint's, the export name is taken, the loss is not finite.
        cli.Interrupted: a signal came; everything is saved.
    """
    if (precision := devices.precision_name(fabric)) not in PRECISIONS:
        # A launcher's --precision did not go through the settings.
        raise ValueError(f"--precision {precision}: expected {', '.join(PRECISIONS)}")
    layout = _layout(fabric, experiment, config)
    with RunFolder.open(fabric, run_dir, experiment, config) as folder:
        if folder.finished is not None:
            return folder.finished
        trainer = _Trainer(fabric, experiment, config, layout, folder)
        return trainer.run()


def _layout(fabric: Fabric, experiment: Experiment, config: TrainConfig) -> StepLayout:
    """Split the global batch over the devices."""
    batch, world = config.batch_size, fabric.world_size
    if batch % world:
        below, above = batch // world * world, -(-batch // world) * world
        nearest = " or ".join(str(size) for size in (below, above) if size)
        raise ValueError(f"--batch_size {batch} does not split over {world} devices: the nearest that do are {nearest}")
    rows = batch // world
    group = batching.largest_group(batch, experiment.group_size)
    micro = min(config.micro_batch_size or rows, rows)
    return StepLayout(batch, group, micro, fabric.global_rank * rows, rows, experiment.objective.lengths_vary)


class _HostBatch(NamedTuple):
    """A micro batch as the reader thread leaves it: everything that is known without asking a device."""

    terms: LossTerms
    """On the host."""
    work: MicroBatchWork
    """What a device does in it."""
    step_tokens: int
    """Input tokens of its whole step, over all devices."""


class _Trainer:
    """The state of one `fit`."""

    def __init__(
        self, fabric: Fabric, experiment: Experiment, config: TrainConfig, layout: StepLayout, folder: RunFolder
    ) -> None:
        self.fabric, self.experiment, self.config, self.layout, self.folder = fabric, experiment, config, layout, folder
        self.prepared = PreparedModel(fabric, experiment, config, folder, layout.device_rows)
        self._take_micro_batch()
        self.guard = StepGuard(fabric.device)
        self.prepared.optimizer.optimizer.found_inf = self.guard.skip
        self.step = folder.restore(fabric, self.prepared.model, self.prepared.optimizer)
        self._trials_left = _TRIAL_STEPS
        self.tokens = folder.total_tokens
        # Whether the weights are a whole step's (false while they are updated).
        self._whole = True
        self.speed = speed_monitor.SpeedMonitor(
            fabric.world_size, speed_monitor.peak_flops(fabric.device, folder.precision)
        )
        self.validated: Validation | None = None

    def _take_micro_batch(self) -> None:
        """Lay the steps out in the micro batches that fit."""
        self.layout = batching.with_micro_batch(self.layout, self.prepared.micro_batch_size)

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Steps, logs, checkpoints; then the end."""
        self._announce()
        signals = devices.StopSignals()
        try:
            self._steps(signals)
            if stop := self._validate(signals):
                self.folder.interrupted(self.fabric, stop, self.step)
            return self._finish()
        except Exception as error:
            self._save_what_is_whole(isinstance(error, RuntimeError) and processes.lost_a_process(error))
            raise
        finally:
            signals.restore()
            torch.compiler.set_stance("default")

    def _steps(self, signals: devices.StopSignals) -> None:
        """From the first step, or the checkpoint's, to the last one, which is saved."""
        config = self.config
        for step, batches in self.speed.waited(self._step_batches()):
            self._pass_over(step)
            self._train_step(step, batches)
            stop = signals.agreed(self.fabric)
            last = self.step == self.experiment.max_steps
            logs = last or self.step == 1 or self.step % config.log_interval == 0
            validates = not last and not stop and config.val_interval and self.step % config.val_interval == 0
            saves = last or stop or self.step % config.save_interval == 0
            if logs or validates or saves:
                numbers = self._checked_numbers()
                with self.speed.saving():
                    self.folder.saves.look(self.fabric)
            if logs:
                self._log(numbers)
            if validates:
                stop = self._validate(signals)
            if saves or stop:
                self._save()
            if stop:
                self.folder.interrupted(self.fabric, stop, self.step)
        if self.step < self.experiment.max_steps:
            self._pass_over(self.experiment.max_steps)
            self._save()

    def _step_batches(self) -> Iterator[tuple[int, list[_HostBatch]]]:
        """The steps that are left, with their micro batches; read anew where these became smaller."""
        data, rule, layout = self.experiment.train_data, self.experiment.objective.group, None
        while layout is not self.layout:
            layout = self.layout
            steps = skipped_steps.others(self.folder.skipped_steps, range(self.step, self.experiment.max_steps))
            for step, batches in batching.prefetched_steps(data, rule, layout, steps, self._prepare):
                yield step, batches
                if layout is not self.layout:
                    break

    def _pass_over(self, step: int) -> None:
        """Count the steps before this one as done; they are the skipped ones."""
        if self.step < step:
            devices.say(self.fabric, f"passed over the data of step {self.step + 1} to {step}, without an update")
            self.step = step

    def _prepare(self, batch: MicroBatch) -> _HostBatch:
        """Noise, masks and counts of a micro batch, on the host: a device that is asked for them is waited for."""
        module = self.experiment.model
        terms = self.experiment.objective.training(batch).prepared_for(self.fabric.device)
        scored = 0 if terms.scored is None else len(terms.scored)
        flops = speed_monitor.training_flops(module.config, terms, terms.visibility or module.visibility, scored)
        # An objective may put more columns into a row than it has tokens.
        return _HostBatch(terms, MicroBatchWork(len(batch.rows), batch.tokens[:, 1:].numel(), flops), batch.step_tokens)

    def _train_step(self, step: int, batches: list[_HostBatch]) -> None:
        """One optimizer step; nothing in it waits for the device, and `self.guard` has its numbers."""
        fabric, config, optimizer = self.fabric, self.config, self.prepared.optimizer
        self._trials_left -= 1
        if self._trials_left >= 0:
            loss, batches = self._accumulate_or_halve(step, batches)
        else:
            loss = self._accumulate(batches)
        if fabric.world_size > 1:
            # Not Fabric's: it has all processes wait for each other first.
            torch.distributed.all_reduce(loss)
        limit = config.grad_clip or math.inf
        norm: Any = fabric.clip_gradients(self.prepared.model, optimizer, max_norm=limit, error_if_nonfinite=False)
        self._whole = False
        self.guard.judge(step + 1, loss, norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(
                step + 1, self.experiment.max_steps, self.experiment.warmup_steps,
                config.learning_rate, config.min_lr, self.folder.extended_from,
            )  # fmt: skip
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            self.speed.add_micro_batch(batch.work)
        self.tokens += batches[0].step_tokens
        self.step, self._whole = step + 1, True

    def _accumulate_or_halve(self, step: int, batches: list[_HostBatch]) -> tuple[Tensor, list[_HostBatch]]:
        """`_accumulate`; where memory runs out on any device, again in smaller micro batches on all of them.

        Returns:
            The loss, and the micro batches that it was made of.
        """
        done: list[Tensor] = []

        def accumulate() -> None:
            done[:] = [self._accumulate(batches)]

        while self.prepared.attempt(accumulate) != Outcome.DONE:
            self.prepared.halve()
            self._take_micro_batch()
            data, rule = self.experiment.train_data, self.experiment.objective.group
            batches = [self._prepare(batch) for batch in batching.step_batches(data, rule, self.layout, step)]
        return done[0], batches

    def _accumulate(self, batches: list[_HostBatch]) -> Tensor:
        """Gradients of a step's micro batches; the loss of this device's rows, float64."""
        loss = torch.zeros((), dtype=torch.float64, device=self.fabric.device)
        for index, batch in enumerate(batches):
            loss += self.prepared.train_pass(batch.terms, last=index + 1 == len(batches))
        return loss

    def _checked_numbers(self) -> StepNumbers:
        """The newest step's numbers; a bad step since the last look ends the run here."""
        newest, bad = self.guard.read()
        if bad is not None:
            raise ValueError(self.folder.bad_gradient(*bad))
        return newest

    # --- console, log, checkpoints ------------------------------------------------------------------------------------

    def _announce(self) -> None:
        """Say once what is about to happen."""
        experiment, layout, steps = self.experiment, self.layout, self.experiment.max_steps
        epochs = experiment.train_data.epochs(steps * layout.global_batch_size)
        lines = [
            f"run {experiment.name}: {experiment.model.config.size_in_millions:.4g}M non-embedding parameters, "
            f"{steps} steps of {layout.global_batch_size} x {self.prepared.block_size} tokens",
            f"model: {experiment.model.config.describe()}",
            f"data: {experiment.train_data.describe()}; {epochs:.3g} epochs"
            + (" (the corpus is repeated)" if epochs > 1 else ""),
            f"device: {self.fabric.world_size} x {self.fabric.device.type}, {self.folder.precision}, micro batch "
            f"{layout.micro_batch_size}, groups of {layout.group_size}",
            f"checkpoints: {self.folder.path}; log: {self.folder.log_path}",
        ]
        if self.step:
            lines.append(f"resumed at step {self.step} of {steps}")
        lines += self.folder.extension_lines()
        for line in lines:
            devices.say(self.fabric, line)

    def _log(self, numbers: StepNumbers) -> None:
        """A line on the console and a row in the loggers."""
        (step, loss, grad_norm), batch_size = numbers, self.layout.global_batch_size
        skipped, steps = self.folder.skipped_steps, self.experiment.max_steps
        passed_over = skipped_steps.count(skipped, step)
        rates = self.speed.rates()
        # All processes wait for the slowest reader, and one of them without memory ends the run.
        rates["data/wait_ms"], rates["data/wait_share"], memory = devices.largest_of_processes(
            self.fabric,
            [rates["data/wait_ms"], rates["data/wait_share"], speed_monitor.peak_memory(self.fabric.device)],
        )
        steps_left = steps - step - (skipped_steps.count(skipped, steps) - passed_over)
        left_s = steps_left * batch_size / max(rates["throughput/samples_per_sec"], 1e-9)
        self.folder.log(
            {
                "metric/train_loss": loss,
                "metric/train_ppl": loggers.perplexity(loss),
                "metric/grad_norm": grad_norm,
                "learning_rate": self.prepared.optimizer.param_groups[0]["lr"],
                "samples": self._iter_num() * self.layout.group_size,
                "total_tokens": self.tokens,
                "skipped_steps": passed_over,
                "time/left": left_s,
                "memory/peak_gb": memory / 1e9,
                **rates,
            },
            step,
        )
        hours = left_s / 3600
        micro_ms = 1000 / max(rates["throughput/device/batches_per_sec"], 1e-9)
        iterations = "" if self._iter_num() == step else f"iter {self._iter_num()} "
        devices.say(
            self.fabric,
            f"{iterations}step {step}: loss {loss:.4f}, iter time: {micro_ms:.2f}ms "
            f"remaining time: {hours:.2f} hours. or {hours / 24:.2f} days. "
            f"{rates['throughput/tokens_per_sec']:.0f} tokens/s, {speed_monitor.format_seconds(left_s)} left",
        )

    def _iter_num(self) -> int:
        """Published count of micro steps; behind a checkpoint in the proportion that it has, so that its names go on."""
        start = self.folder.start
        if start is None or not start.step:
            return self.step * published_micro_steps(self.layout.global_batch_size, self.layout.group_size)
        return start.iter_num + (self.step - start.step) * max(1, start.iter_num // start.step)

    def _validate(self, signals: devices.StopSignals) -> int:
        """Validate, log and print; without validation data nothing happens.

        Returns:
            The signal that came meanwhile and cut it short, or 0.
        """
        data, config = self.experiment.val_data, self.config
        count = min(config.val_samples, len(data)) if data is not None else 0
        if not count:
            return 0
        started = time.perf_counter()
        size = ValidationSize(count, config.val_draws, self.layout.micro_batch_size)
        result = validate(self.fabric, self.prepared.model, self.experiment, size, signals)
        self.speed.add_validation(time.perf_counter() - started)
        if result is None:
            return signals.received or signal.SIGTERM
        self.validated = result
        self.folder.log(result.metrics(), self.step)
        devices.say(self.fabric, f"step {self.step}: {result.line()}")
        return 0

    def _save(self, alone: bool = False) -> None:
        state = {
            "model": self.prepared.model,
            "optimizer": self.prepared.optimizer,
            "hparams": self.folder.settings,
            "iter_num": self._iter_num(),
            "step_count": self.step,
            "total_tokens": self.tokens,
        }
        with self.speed.saving():
            self.folder.save(self.fabric, state, self.layout.micro_batch_size, alone)

    def _save_what_is_whole(self, lost_a_process: bool) -> None:
        """Before an error ends the run: save the last whole step, unless it is on the disk or its numbers are no good.

        A save of this very step that has just failed is the error itself, and is not tried again.
        The other processes may be gone or wait elsewhere, so the first one does it alone, where it has the whole model.
        Where it has not, and the error is that one is gone, this error says enough: the run goes on from what is saved.
        """
        saves = self.folder.saves
        saves.settle(lost_a_process)
        if not self._whole or self.step in (saves.saved_step, saves.failed_step) or not self.fabric.is_global_zero:
            return
        try:
            # From a bad step on the weights are older than the step's number.
            if self.guard.read()[1] is None:
                self._save(alone=True)
        # The error that ends the run is the one to tell.
        except Exception as error:
            if not (lost_a_process and isinstance(error, ValueError)):
                cli.warn(f"step {self.step} could not be saved: {error}")

    def _finish(self) -> dict[str, Any]:
        """Export the final weights, and write down the result."""
        with self.speed.saving():
            self.folder.saves.wait(self.fabric)
        devices.say(self.fabric, self.speed.saving_line())
        result: dict[str, Any] = {"step": self.step, "total_tokens": self.tokens}
        if self.validated is not None:
            result.update(self.validated.record())
        return self.folder.finish(self.fabric, result)
