"""One task under every sampler: how many texts are right, forward passes, tokens computed, tokens per second.

    python benchmarks/sampler_table.py > table.md                                        about 10 minutes on two CPU cores
    python benchmarks/sampler_table.py --train_steps 30 --texts 8                                      a look at everything

The task has right and wrong answers, and tokens that depend on each other: a word of random letters, a bar, and the same
word again. A few letters are given; the model invents the others, and must repeat all of them. Letters that are written in
one step are drawn independently of each other, so that a sampler which writes a letter and its copy together is wrong 23
times of 24. Trains an MDM and an ARM of 0.1M parameters on such words first, and keeps them in --out.

A pass is one call of the network for all texts; with a cache it may read a part of each text, which the tokens computed
for each new token tell. Prints Markdown.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import print_table
from lit_gpt.cli import parse, run

if TYPE_CHECKING:
    from torch import Tensor

    from lit_gpt.model.layers import Transformer

LETTERS = 24
BOS, EOS, BAR, FIRST = 1, 2, 3, 4
"""Ids of the special tokens, the bar and the first letter."""
_BATCH, _LEARNING_RATE = 64, 4e-3
_WARMUP = 0.1


@dataclass
class Flags:
    """What is compared."""

    out: str = "sampler_table"
    """Folder of the trained models."""
    train_steps: int = 1500
    """Optimizer steps of each model."""
    letters: int = 8
    """Letters of a word."""
    given: int = 2
    """How many of them are given."""
    texts: int = 256
    """Texts of each sampler, written at once."""
    seed: int = 1234
    """Decides weights, words, noise and samples."""


def main() -> None:
    """Train or load, then sample by each sampler."""
    flags = parse(Flags, None, __doc__)
    if not 0 <= flags.given < flags.letters or min(flags.train_steps, flags.texts) < 1:
        raise ValueError(
            f"--given {flags.given} of --letters {flags.letters}: expected fewer; --texts, --train_steps: 1"
        )
    models = {kind: trained(kind, flags) for kind in ("arm", "mdm")}
    print(f"{flags.texts} words of {flags.letters} letters, {flags.given} given; {flags.train_steps} training steps.\n")
    lines = []
    for name, kind, settings in samplers():
        lines.append([name, *measured(models[kind], settings, flags)])
        print(name, file=sys.stderr, flush=True)
    print_table(["sampler", "right", "passes", "tokens computed for each new one", "tokens/s"], lines)


def samplers() -> list[tuple[str, str, dict[str, Any]]]:
    """(name, kind of model, settings) of all that is compared, at temperature 1."""
    found: list[tuple[str, str, dict[str, Any]]] = [
        ("ARM, keys and values kept", "arm", {}),
        ("ARM, everything read again", "arm", {"use_cache": False}),
    ]
    for share in (2.0, 1.0, 0.5, 0.25):
        for algorithm in ("origin", "greedy"):
            words = f"{algorithm}, {share:g} steps for each token"
            found.append((words, "mdm", {"algorithm": algorithm, "steps_per_token": share}))
    remasked = {"remask": 0.1, "steps_per_token": 4.0}
    found.append(("origin, 4 steps for each token", "mdm", {"steps_per_token": 4.0}))
    found.append(("origin, 4 steps for each token, remask 0.1", "mdm", remasked))
    for least in (0.95, 0.7, 0.4):
        settings: dict[str, Any] = {"algorithm": "threshold", "threshold": least, "steps_per_token": 1.0}
        found.append((f"threshold {least:g}", "mdm", settings))
    for bound in (0.1, 1.0, 4.0):
        settings = {"algorithm": "entropy", "entropy_bound": bound, "steps_per_token": 1.0}
        found.append((f"entropy, bound {bound:g}", "mdm", settings))
    for cache, refresh, words in (
        ("none", 0, ""),
        ("prefix", 0, ", prefix cache"),
        ("dual", 0, ", dual cache"),
        ("dual", 2, ", dual cache read again after 2 steps"),
    ):
        settings = {"algorithm": "threshold", "threshold": 0.7, "steps_per_token": 1.0, "block_length": 4}
        found.append((f"threshold 0.7, blocks of 4{words}", "mdm", {**settings, "cache": cache, "refresh": refresh}))
    found.append(("threshold 0.7, top_p 0.9", "mdm", {**settings, "block_length": 0, "top_p": 0.9}))
    return found


def words(rows: int, letters: int, seed: int) -> Tensor:
    """(rows, 2 letters + 3) int64: bos, a word, the bar, the word again, eos."""
    import torch

    from lit_gpt.randomness import uniform

    places = torch.arange(letters)
    drawn = (uniform(seed, torch.arange(rows)[:, None], places) * LETTERS).long() + FIRST
    special = [torch.full((rows, 1), token) for token in (BOS, BAR, EOS)]
    return torch.cat((special[0], drawn, special[1], drawn, special[2]), 1)


def trained(kind: str, flags: Flags) -> Transformer:
    """A model that has learnt the task, from --out or trained now."""
    from lit_gpt.checkpoints.export import WeightsRecord, export_weights
    from lit_gpt.checkpoints.weights import MODEL_CLASSES, read_model
    from lit_gpt.config import Config

    name = f"{kind}-{flags.letters}-letters-{flags.train_steps}-steps-seed-{flags.seed}"
    path = Path(flags.out, f"{name}.safetensors")
    if not path.exists():
        config = Config("tiny", 2, 4, 64, 192, 4, block_size=2 * flags.letters + 3, vocab_size=FIRST + LETTERS)
        model = MODEL_CLASSES[kind](config)
        model.init_weights(flags.seed)
        train(model.train(), flags)
        export_weights(Path(flags.out), name, model.state_dict(), WeightsRecord(kind, config))
    return read_model(path)[0]


def train(model: Transformer, flags: Flags) -> None:
    """Next-token prediction for an ARM, the masked diffusion loss for an MDM; all words are new."""
    import torch

    from lit_gpt.diffusion import diffusion_times, forward_process, masking_probability
    from lit_gpt.randomness import Stream, uniform_grid

    steps, vocabulary = flags.train_steps, model.config.vocab_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=_WARMUP)
    for step in range(steps):
        ids = words(_BATCH, flags.letters, flags.seed + 1 + step)
        if model.kind == "arm":
            logits, targets = model(ids[:, :-1])[..., :vocabulary], ids[:, 1:]
            weights = torch.full(targets.shape, 1 / targets.numel())
        else:
            rows = torch.arange(_BATCH)
            p_mask = masking_probability(diffusion_times(flags.seed, step, rows, _BATCH))
            noise = uniform_grid(flags.seed, Stream.MASK, step, rows, ids.size(1))
            noisy, mask = forward_process(ids, p_mask, noise, model.config.mask_id)
            logits, targets = model(noisy)[..., :vocabulary], ids
            weights = mask / p_mask[:, None] / ids.numel()
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (nll * weights.flatten()).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"{model.kind} step {step + 1} of {steps}: loss {loss.item():.4f}", file=sys.stderr, flush=True)


def measured(model: Transformer, settings: dict[str, Any], flags: Flags) -> list[str]:
    """Share of right texts, passes, tokens computed for each new one, tokens per second."""
    from lit_gpt.sampling.many import sample_many
    from lit_gpt.sampling.sequence import SampleRequest
    from lit_gpt.sampling.settings import Sampling

    # Words of training have other seeds.
    real = words(flags.texts, flags.letters, flags.seed).tolist()
    length, begun = len(real[0]), 1 + flags.given
    requests = [SampleRequest(row[:begun], length, number) for number, row in enumerate(real)]
    computed: list[int] = []
    hidden_states = type(model).hidden_states

    def counted(ids: Tensor, *rest: Any, **named: Any) -> Tensor:
        computed.append(ids.numel())
        return hidden_states(model, ids, *rest, **named)

    object.__setattr__(model, "hidden_states", counted)
    how = Sampling(seed=flags.seed, **settings)
    started = time.perf_counter()
    found = dict(sample_many(model, requests, how, EOS, flags.texts * length))
    elapsed_s = time.perf_counter() - started
    object.__delattr__(model, "hidden_states")
    new_tokens = sum(map(len, found.values()))
    right = sum(is_right([*real[number][:begun], *new], flags.letters) for number, new in found.items())
    return [
        f"{right / flags.texts:.1%}",
        str(len(computed)),
        f"{sum(computed) / new_tokens:.1f}",
        f"{new_tokens / elapsed_s:,.0f}",
    ]


def is_right(row: list[int], letters: int) -> bool:
    """Whether a row is a word of letters, the bar, and the word again."""
    word = row[1 : 1 + letters]
    return row == [BOS, *word, BAR, *word, EOS] and min(word) >= FIRST


if __name__ == "__main__":
    run(main)
