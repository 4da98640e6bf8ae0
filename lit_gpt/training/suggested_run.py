"""A first pretraining run that fits a corpus and this machine: what a preparation of data prints at its end.

Decisions: a corpus is read at most 10 times; a model of the family gets 20 tokens for each parameter (Hoffmann et al. 2022),
of which up to 4 epochs count as new ones (Muennighoff et al. 2023); a run ends within an hour on the machine at hand, whose
speed is measured by a few training steps of the very model. So the largest model that all three allow is chosen, and of a
small corpus the smallest of the family, which then reads as much as 10 epochs are.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_gpt.config import Config
from lit_gpt.training import schedule
from lit_gpt.training.measured_speed import tokens_per_second
from lit_gpt.training.peak_rate import ruled_rate

# Layers and widths by size: two below the published ones, the first the quickstart's.
_SHAPES = (
    (4, 128),
    (5, 192),
    (6, 256),
    (8, 384),
    (8, 512),
    (10, 640),
    (12, 768),
    (18, 768),
    (18, 1024),
    (21, 1280),
    (20, 1792),
)
_TOKENS_PER_PARAMETER = 20
_NEW_EPOCHS, _MOST_EPOCHS = 4, 10
_MOST_SECONDS = 3600.0
# So many blocks make a corpus worth shuffling; shorter blocks where it has fewer.
_LEAST_BLOCKS = 1000
_BLOCK_SIZES = (2048, 1024, 512, 256, 128)
# Steps that a schedule with a warmup and a cosine wants, and the sequences of a step.
_STEPS = 1000
_BATCH_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class SuggestedRun:
    """A masked diffusion model's pretraining."""

    config: Config
    batch_size: int
    steps: int
    epochs: float
    minutes: float
    """Predicted for this machine, without validation and start."""

    @property
    def learning_rate(self) -> float:
        """The peak."""
        return ruled_rate(self.config.non_embedding_params)

    @property
    def command(self) -> str:
        """Without the data's folder."""
        config = self.config
        warmup = min(schedule.default_warmup(self.steps), max(1, self.steps // 10))
        return (
            f"python pretrain/train_mdm.py --n_layer {config.n_layer} --n_embd {config.n_embd} "
            f"--block_size {config.block_size} --batch_size {self.batch_size} --max_steps {self.steps} --warmup_steps {warmup} "
            f"--learning_rate {self.learning_rate:g} --min_lr {self.learning_rate / 10:g}"
        )

    @property
    def reason(self) -> str:
        """Why so, in a line."""
        minutes = "less than a minute" if self.minutes < 1 else f"about {self.minutes:.0f} min"
        size = f"{self.config.size_in_millions:.3g}M parameters beside the embeddings"
        return f"{size}, {self.epochs:.2g} epochs, {minutes} where nothing else runs on this machine (estimated from 2 steps)"


def suggest_run(tokens: int, vocab_size: int, largest_block: int) -> SuggestedRun:
    """Choose a run.

    Args:
        tokens: of the corpus; at least 2.
        vocab_size: of its tokenizer.
        largest_block: tokens of a packed file, which blocks do not cross.

    Raises:
        ValueError: a single sequence would read the corpus more than 10 times.
    """
    fitting = [size for size in _BLOCK_SIZES if size < largest_block] or [largest_block - 1]
    block_size = next((size for size in fitting if tokens >= size * _LEAST_BLOCKS), fitting[-1])
    if tokens * _MOST_EPOCHS < block_size:
        raise ValueError(f"{tokens} tokens are too few to train on: one sequence has {block_size}")
    chosen: tuple[Config, float, float] | None = None
    for n_layer, n_embd in _SHAPES:
        config = Config.from_shape(n_layer=n_layer, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size)
        wanted = _TOKENS_PER_PARAMETER * config.non_embedding_params
        if chosen is not None and wanted > _NEW_EPOCHS * tokens:
            break
        speed = tokens_per_second(config)
        if chosen is not None and wanted > speed * _MOST_SECONDS:
            break
        chosen = config, min(wanted, _MOST_EPOCHS * tokens, speed * _MOST_SECONDS), speed
    assert chosen is not None
    config, run_tokens, speed = chosen
    per_step = run_tokens / _STEPS / block_size
    batch_size = max((size for size in _BATCH_SIZES if size <= per_step), default=_BATCH_SIZES[0])
    # Of a corpus of a few sequences, not even one step of the usual batch.
    batch_size = min(batch_size, _MOST_EPOCHS * tokens // block_size)
    steps = max(1, round(run_tokens / (batch_size * block_size)))
    steps = min(steps, _MOST_EPOCHS * tokens // (batch_size * block_size))
    used = steps * batch_size * block_size
    return SuggestedRun(config, batch_size, steps, used / tokens, used / speed / 60)
