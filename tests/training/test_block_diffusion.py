"""Block diffusion as an experiment of one's own: one objective and one visibility, in this file, trained by the real loop.

BD3-LM (Arriola et al. 2025, arXiv 2503.09573) reads a noisy and a clean copy of a row at once: a noisy block attends to
itself and to the clean blocks before it, so one forward pass gives every block's loss given the text before it.

B rows, T tokens, L tokens of a block.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_gpt import diffusion
from lit_gpt.config import Config
from lit_gpt.data.batching import MicroBatch
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.loss_terms import LossTerms
from lit_gpt.model.visibility import Visibility
from lit_gpt.training.objectives import MaskedDiffusion
from lit_gpt.training.pretraining import PretrainingRecipe, pretrain
from lit_gpt.training.settings import PretrainConfig
from tests.support.small_models import scaled_model
from tests.support.training_runs import ROOT, SHAPE, make_packed_data, one_thread_environment, read_losses, read_metrics

# The experiment


@functools.cache
def noisy_then_clean(length: int, block_length: int) -> Visibility:
    """Columns 0 .. T-1 are the noisy copy, T .. 2T-1 the clean one."""

    def rule(query: Tensor, key: Tensor) -> Tensor:
        query_block, key_block = (column % length // block_length for column in (query, key))
        query_clean, key_clean = query >= length, key >= length
        before = (key_block < query_block) | (query_clean & (key_block == query_block))
        return torch.where(key_clean, before, ~query_clean & (key_block == query_block))

    return Visibility(rule=rule)


@dataclass(frozen=True)
class BlockDiffusion(MaskedDiffusion):
    """Sum of CE / p over masked tokens, each block with a time of its own, given the clean blocks before it."""

    block_length: int = 4

    def _masked(self, batch: MicroBatch, t: Tensor, uniforms: Tensor) -> LossTerms:
        clean = batch.tokens[:, :-1].contiguous()
        rows, length = clean.shape
        blocks = length // self.block_length
        real = torch.arange(length, device=clean.device)[None] < batch.lengths[:, None]
        # The blocks of a row have times spread evenly over [0, 1); each alone is uniform.
        t = (t[:, None] + torch.arange(blocks, device=t.device) / blocks) % 1.0
        p_mask = diffusion.masking_probability(t).flatten()
        by_block = [values.reshape(-1, self.block_length) for values in (clean, uniforms, real)]
        noisy, mask = diffusion.forward_process(by_block[0], p_mask, by_block[1], self.mask_id, by_block[2])
        weights = diffusion.loss_weights(mask, p_mask, batch.row_weights.repeat_interleave(blocks))
        nothing = torch.zeros_like(real)
        return LossTerms(
            torch.cat((noisy.view(rows, length), clean), 1),
            torch.cat((clean, clean), 1),
            torch.cat((weights.view(rows, length), nothing.float()), 1),
            torch.cat((real, nothing), 1),
            torch.arange(length, device=clean.device).repeat(rows, 2),
            noisy_then_clean(length, self.block_length).padded(
                None if bool(real.all()) else torch.cat((real, real), 1)
            ),
        )


# Its laws

CONFIG = Config("toy", 2, 2, 32, 64, 2, block_size=12, vocab_size=20, padding_multiple=4)


def objective(block_length: int) -> BlockDiffusion:
    return BlockDiffusion(12, CONFIG.mask_id, seed=11, global_batch_size=8, block_length=block_length)


def batch(partial: bool = False) -> MicroBatch:
    lengths = torch.full((8,), 13)
    if partial:
        lengths[2], lengths[5] = 5, 9
    return MicroBatch(
        tokens=torch.randint(0, 20, (8, 13), generator=torch.Generator().manual_seed(0)),
        lengths=lengths,
        prompt_lengths=torch.zeros(8, dtype=torch.int64),
        rows=torch.arange(8),
        row_weights=torch.full((8,), 1 / 96, dtype=torch.float64),
        step=3,
    )


@pytest.mark.parametrize("partial", [False, True])
def test_one_block_is_masked_diffusion(partial: bool):
    model = scaled_model(TransEncoder, CONFIG)
    plain = MaskedDiffusion(12, CONFIG.mask_id, seed=11, global_batch_size=8)
    gradients = []
    for kind in (plain, objective(12)):
        model.zero_grad()
        total, nll, _ = model.weighted_nll(kind.training(batch(partial)))
        total.backward()
        gradients.append([total.detach(), nll, *(parameter.grad.clone() for parameter in model.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("block_length", [1, 2, 4, 6])
def test_a_noisy_block_is_predicted_from_itself_and_the_clean_blocks_before_it(block_length: int):
    """The packed row gives what reading the clean prefix and then the noisy block gives, block by block."""
    model = scaled_model(TransEncoder, CONFIG)
    terms = objective(block_length).training(batch())
    packed = model(terms.input_ids, terms.positions, terms.visibility)
    noisy, clean = terms.input_ids.split(12, dim=1)
    for start in range(0, 12, block_length):
        end = start + block_length
        row = torch.cat((clean[:, :start], noisy[:, start:end]), 1)
        in_order = Visibility(rule=lambda query, key: key // block_length <= query // block_length)
        alone = model(row, visibility=in_order)
        torch.testing.assert_close(packed[:, start:end], alone[:, start:end], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_nothing_leaks():
    """A change of one clean token reaches the noisy blocks behind its own alone; of a noisy one, its own block alone."""
    model = scaled_model(TransEncoder, CONFIG)
    terms = objective(4).training(batch())
    before = model(terms.input_ids, terms.positions, terms.visibility)[:, :12]
    for column, reached in ((12 + 5, range(8, 12)), (5, range(4, 8))):
        changed = terms.input_ids.clone()
        changed[:, column] = (changed[:, column] + 1) % 20
        after = model(changed, terms.positions, terms.visibility)[:, :12]
        moved = ((before - after).abs().amax(-1) > 0).all(0), ((before - after).abs().amax(-1) == 0).all(0)
        assert moved[0].nonzero().flatten().tolist() == list(reached)
        assert moved[1].nonzero().flatten().tolist() == [place for place in range(12) if place not in reached]


# The loop


def run(folder: str, devices: int, strategy: str) -> None:
    """Train, validate and export, as `pretrain/train_mdm.py` does."""
    flags: dict[str, Any] = {**SHAPE, "data_dir": f"{folder}/data", "out_dir": f"{folder}/workdir"}
    flags |= {"log_dir": f"{folder}/out", "models_dir": f"{folder}/models", "max_steps": 40, "log_interval": 1}
    config = PretrainConfig(**flags, accelerator="cpu", devices=str(devices), strategy=strategy)
    recipe = PretrainingRecipe(
        "train_mdm",
        TransEncoder,
        lambda shape: BlockDiffusion(shape.block_size, shape.mask_id, config.seed, config.batch_size, block_length=8),
    )
    pretrain(recipe, config)


def test_it_is_trained_by_the_loop_on_one_device_or_two(tmp_path: Path):
    curves = []
    for devices, strategy in ((1, "auto"), (2, "ddp"), (2, "fsdp")):
        folder = tmp_path / f"{devices}-{strategy}"
        make_packed_data(folder / "data")
        # A file, because the second process is started by the first one's command line.
        script = folder / "train.py"
        script.write_text(
            f"from tests.training.test_block_diffusion import run\nrun({str(folder)!r}, {devices}, {strategy!r})\n"
        )
        subprocess.run(
            [sys.executable, script], env={**one_thread_environment(), "PYTHONPATH": str(ROOT)}, check=True, timeout=300
        )
        curves.append([*read_losses(folder).values(), *read_losses(folder, "metric/val_loss").values()])
        rows = [row for row in read_metrics(folder) if row["metric/train_loss"]]
        # A row has 32 tokens, though the model reads 64 columns of it.
        assert int(rows[-1]["total_tokens"]) == 40 * 8 * 32
        assert len(list((folder / "models").glob("*.safetensors"))) == 1
    assert sum(curves[0][30:40]) < sum(curves[0][:10]) - 5
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], rel=1e-4)
