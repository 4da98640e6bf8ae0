"""The model on its devices: placed, compiled, with an optimizer, and with a micro batch that fits into memory."""

from __future__ import annotations

import functools
import gc
import shutil
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_gpt import devices
from lit_gpt.data.batching import MicroBatch
from lit_gpt.model import kernels
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.training import micro_batch, objectives, strategies
from lit_gpt.training.attempts import Attempts, Outcome, reset_passes
from lit_gpt.training.experiment import Experiment
from lit_gpt.training.micro_batch import MemoryReading
from lit_gpt.training.run_folder import RunFolder
from lit_gpt.training.settings import TrainConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Shorter runs do not earn back the 10 to 20 s of compilation.
_COMPILE_FROM_STEPS = 200


class PreparedModel:
    """A model that is ready for its first step.

    Args:
        fabric: launched.
        experiment: for the model, the objective and the rows' length.
        config: how it is trained.
        folder: for the precision, and for the micro batch of the checkpoint.
        device_rows: the device's rows of a step.

    Raises:
        ValueError: the attention kernel cannot run here, or not even one row fits into memory.
    """

    def __init__(
        self, fabric: Fabric, experiment: Experiment, config: TrainConfig, folder: RunFolder, device_rows: int
    ) -> None:
        self.fabric, self.experiment, self.config = fabric, experiment, config
        self.device_rows, self.precision = device_rows, folder.precision
        self.block_size = experiment.train_data.block_length - 1
        self.micro_batch_size = 1
        """Rows of a micro batch."""
        self.compiled = False
        """Whether torch.compile made the kernels."""
        self.model: Any = None
        """As Fabric trains it; another object after a failed pass."""
        self.optimizer: Any = None
        self._attention = config.attention_kernel
        self._attempts = Attempts(fabric)
        # Whether the step's next micro batch adds to gradients that are there.
        self._accumulates = False
        self._setup(folder.start is not None, config.micro_batch_size or folder.micro_batch_size(fabric.world_size))

    def train_pass(self, terms: LossTerms, last: bool) -> Tensor:
        """Forward and backward of one micro batch, the step's last or not; its weighted sum, detached.

        Nothing in it waits for the device, if the terms were prepared for it.
        """
        fabric = self.fabric
        strategies.keep_gathered(self.model, self._accumulates or not last, not last)
        self._accumulates = not last
        with fabric.no_backward_sync(self.model, enabled=not last):
            total, _, _ = objectives.weighted_nll(fabric, self.model, terms.to(fabric.device))
            # Data-parallel gradients are averaged over devices, while the loss is a sum over them.
            fabric.backward(total * fabric.world_size if fabric.world_size > 1 else total)
        return total.detach()

    def attempt(self, work: Callable[[], object], compiler_may_fail: bool = False) -> Outcome:
        """Do forward and backward passes; if they fail on any device, be ready for others on all of them."""
        outcome = self._attempts.outcome(work, compiler_may_fail)
        if outcome != Outcome.DONE:
            self._accumulates = False
            self.optimizer.zero_grad(set_to_none=True)
            if not reset_passes(self.fabric, self.model):
                self.model = None
                gc.collect()
                self.model = strategies.set_up_model(self.fabric, self.experiment.model)
            torch.cuda.empty_cache()
        return outcome

    def halve(self) -> None:
        """Take at most half the rows, after an attempt that ran out of memory.

        Raises:
            ValueError: it was a single row.
        """
        self._warm_up(self._smaller(self.micro_batch_size), self.compiled)

    def _setup(self, resumes: bool, known: int | None) -> None:
        """Place and fill the model, find the micro batch unless it is known, choose kernels, compile."""
        fabric, config, module = self.fabric, self.config, self.experiment.model
        module.checkpoint_blocks = config.activation_checkpointing
        self._use_kernels(compiled=False)
        self.model = strategies.set_up_model(fabric, module)
        self._fill(resumes)
        adamw = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=1e-8,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.optimizer = fabric.setup_optimizers(adamw)
        size = min(known, self.device_rows) if known else self._choose_size()
        times = devices.on_rank_zero(fabric, lambda: self._time_attention(size))
        self._attention = next(iter(times), self._attention)
        line = self._warm_up(size, self._wants_compile())
        measured = ", ".join(f"{name} {milliseconds:.3g} ms" for name, milliseconds in times.items())
        devices.say(fabric, f"{line}; measured: {measured}" if measured else line)

    def _time_attention(self, rows: int) -> dict[str, float]:
        """Milliseconds by attention kernel at the run's shape, the fastest first; empty if a flag names one."""
        if self.config.attention_kernel != "auto":
            return {}
        config, length = self.experiment.model.config, self.block_size
        is_causal, _ = self.experiment.model.visibility.attention_arguments(length, length)
        shape = (rows, config.n_head, length, config.head_size)
        return kernels.measured_attention(shape, config.n_query_groups, is_causal, self.fabric.device, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """What matrix products run in."""
        return torch.float32 if self.precision == "32-true" else torch.bfloat16

    def _fill(self, resumes: bool) -> None:
        """Set the weights that the run starts from; zeros where a checkpoint's come later."""
        module, given = self.experiment.model, self.experiment.start_weights
        if resumes:
            strategies.fill_weights(module, None)
        else:
            drawn = functools.partial(module.initial_weight, self.config.seed)
            strategies.fill_weights(module, drawn if given is None else given.pop)
        if given is not None:
            given.clear()

    def _use_kernels(self, compiled: bool) -> str:
        """Compile blocks and loss, or not; returns the console's line."""
        self.experiment.model.compile_blocks(compiled)
        return kernels.choose(self._attention, self.fabric.device, self._dtype, compiled)

    def _wants_compile(self) -> bool:
        choice = self.config.compile
        if choice == "auto":
            tools = shutil.which("g++") or shutil.which("clang++") if self.fabric.device.type == "cpu" else True
            long_enough = self.experiment.max_steps >= _COMPILE_FROM_STEPS
            # A group of another length would run uncompiled anyway.
            return bool(tools) and long_enough and not self.experiment.varying_length
        return choice == "on"

    def _choose_size(self) -> int:
        """The largest micro batch that should fit, the same on every device."""
        rows, device = self.device_rows, self.fabric.device
        if micro_batch.read_memory(device) is None:
            return micro_batch.size_by_estimate(self.experiment.model, self._largest_terms(1), rows)

        def measure(size: int) -> MemoryReading | None:
            micro_batch.read_memory(device)
            tried = self.attempt(lambda: self._rehearse(size, min(rows, 2)))
            return micro_batch.read_memory(device) if tried == Outcome.DONE else None

        # Not compiled: that would take a compilation per size, of which torch allows eight.
        reserved = micro_batch.optimizer_bytes(self.model.parameters())
        return self._attempts.least(micro_batch.size_by_measurement(measure, rows, reserved))

    def _warm_up(self, size: int, compiled: bool) -> str:
        """Compile for a micro batch and try it on made-up tokens, then smaller ones until one fits.

        Returns:
            The console's line about the kernels.

        Raises:
            ValueError: not even one row fits.
        """
        torch.compiler.set_stance("default")
        self.compiled = compiled
        line = self._use_kernels(compiled)
        started = time.perf_counter()
        may_fail = compiled and self.config.compile != "on"
        outcome = self.attempt(lambda: self._rehearse(size), may_fail)
        if compiled and (seconds := time.perf_counter() - started) > 2:
            devices.say(self.fabric, f"torch.compile: {seconds:.0f} s")
        if outcome == Outcome.NO_COMPILER:
            devices.say(
                self.fabric, f"torch.compile does not work here ({self._attempts.compiler_error}): going on without it"
            )
            return self._warm_up(size, False)
        if outcome == Outcome.OUT_OF_MEMORY:
            return self._warm_up(self._smaller(size), compiled)
        self.micro_batch_size = size
        # Odd shapes (a cut group, validation) run eagerly from here on: what is compiled must not depend on history.
        torch.compiler.set_stance("eager_on_recompile")
        return line

    def _smaller(self, size: int) -> int:
        """At most half of a micro batch that ran out of memory; nothing stays compiled for the larger one."""
        if size == 1:
            raise ValueError(micro_batch.TOO_LARGE)
        smaller = micro_batch.largest_divisor(self.device_rows, size // 2)
        devices.say(self.fabric, f"a micro batch of {size} does not fit into memory: going on with {smaller}")
        torch.compiler.reset()
        return smaller

    def _rehearse(self, size: int, passes: int = 1) -> None:
        """Micro batches of made-up full rows, as a step makes them."""
        for number in range(passes):
            self.train_pass(self._largest_terms(size), last=number + 1 == passes)
        self.optimizer.zero_grad(set_to_none=True)

    def _largest_terms(self, rows: int) -> LossTerms:
        """What the objective makes of `rows` made-up full rows, with every position scored that may be."""
        batch = MicroBatch(
            tokens=torch.zeros((rows, self.block_size + 1), dtype=torch.int64),
            lengths=torch.full((rows,), self.block_size + 1),
            prompt_lengths=torch.zeros(rows, dtype=torch.int64),
            rows=torch.arange(rows),
            row_weights=torch.ones(rows, dtype=torch.float64),
            # An objective may begin with less; what is compiled and measured is what most of a run needs.
            step=self.experiment.max_steps,
        )
        terms = self.experiment.objective.training(batch)
        return terms._replace(weights=terms.in_denominator.float()).prepared_for(self.fabric.device)
