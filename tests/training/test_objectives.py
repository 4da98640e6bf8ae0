"""Objectives: equal to the published formulas, to brute-force expectations, and blind to how a step is cut up."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lit_gpt import diffusion
from lit_gpt.config import Config
from lit_gpt.data import batching
from lit_gpt.data.batching import StepLayout
from lit_gpt.data.packed_dataset import Extent, Sample
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.randomness import Stream, hash_int, uniform_grid
from lit_gpt.training.objectives import MaskedDiffusion, MaskedResponse, NextResponseToken, NextToken

CONFIG = Config(
    name="toy", n_layer=1, n_head=2, n_embd=16, intermediate_size=32, n_query_groups=2, block_size=12, vocab_size=20,
    padding_multiple=4,
)  # fmt: skip


class HashedTokens:
    """A data set whose sample k is a hash of k; every `partial`-th one is only partly real."""

    def __init__(self, block_length: int, partial: int = 0) -> None:
        self.block_length, self.partial = block_length, partial

    def __getitem__(self, k: int) -> Sample:
        tokens = np.array([hash_int(k, column) % 20 for column in range(self.block_length)], dtype=np.int64)
        return Sample(tokens, self.extent(k).length)

    def extent(self, k: int) -> Extent:
        return Extent(5 if self.partial and k % self.partial == 2 else self.block_length)


def step_loss(model, objective, dataset, batch, group, micro, devices=1, step=3):
    """The step's loss as the trainer sums it, over all devices and micro batches."""
    total = torch.zeros(())
    for device in range(devices):
        rows = batch // devices
        layout = StepLayout(batch, group, micro, device * rows, rows)
        for part in batching.step_batches(dataset, objective.group, layout, step):
            total = total + model.weighted_nll(objective.training(part))[0]
    return total


def build(model_class):
    model = model_class(CONFIG)
    model.init_weights(5)
    return model


def masked(ssl_ratio=0.0, batch=8):
    return MaskedDiffusion(block_size=12, mask_id=CONFIG.mask_id, seed=11, global_batch_size=batch, ssl_ratio=ssl_ratio)


def check_cuts(objective, model_class, dataset):
    """Loss and gradient are the same in any micro batches and on any number of devices."""
    model = build(model_class)
    reference = None
    for micro, devices in ((8, 1), (1, 1), (3, 1), (2, 2), (1, 8)):
        model.zero_grad()
        loss = step_loss(model, objective, dataset, 8, 2, micro, devices)
        loss.backward()
        gradient = model.lm_head.weight.grad.clone()
        reference = reference or (loss, gradient)
        assert loss.item() == pytest.approx(reference[0].item(), rel=1e-5)
        assert torch.allclose(gradient, reference[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("partial", [0, 4])
@pytest.mark.parametrize(
    "objective,model_class",
    [
        (NextToken(12), GPT),
        (masked(), TransEncoder),
        (masked(0.7), TransEncoder),
        (dataclasses.replace(masked(), row_lengths=((3, 4),)), TransEncoder),
        (dataclasses.replace(masked(), loss_weight="cross_entropy"), TransEncoder),
    ],
)
def test_loss_and_gradient_do_not_depend_on_micro_batch_or_devices(objective, model_class, partial):
    check_cuts(objective, model_class, HashedTokens(13, partial))


def test_arm_loss_is_the_mean_cross_entropy():
    model, dataset = build(GPT), HashedTokens(13)
    tokens = torch.stack([torch.from_numpy(dataset[24 + row].tokens) for row in range(8)])
    expected = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert step_loss(model, NextToken(12), dataset, 8, 2, 4).item() == pytest.approx(expected.item(), rel=1e-5)


def test_mdm_loss_is_the_published_formula():
    model, dataset, objective = build(TransEncoder), HashedTokens(13), masked()
    layout = StepLayout(8, 8, 8, 0, 8)
    (batch,) = batching.step_batches(dataset, objective.group, layout, 3)
    terms = objective.training(batch)
    clean, mask = batch.tokens[:, :12], terms.input_ids == CONFIG.mask_id
    p_mask = diffusion.masking_probability(diffusion.diffusion_times(11, 3, torch.arange(8), 8))
    nll = F.cross_entropy(model(terms.input_ids).transpose(1, 2), clean, reduction="none")
    expected = (nll / p_mask[:, None] * mask).sum() / (8 * 12)
    assert step_loss(model, objective, dataset, 8, 8, 8).item() == pytest.approx(expected.item(), rel=1e-5)


def step_terms(objective, step, partial=0):
    """The only micro batch of a step of 8 rows, and what the objective makes of it."""
    (batch,) = batching.step_batches(HashedTokens(13, partial), objective.group, StepLayout(8, 8, 8, 0, 8), step)
    return batch, objective.training(batch)


def test_the_cross_entropy_counts_every_masked_token_alike():
    objective = dataclasses.replace(masked(), loss_weight="cross_entropy")
    batch, terms = step_terms(objective, 3)
    mask = terms.input_ids == CONFIG.mask_id
    # Of 8 x 12 tokens the expected share (1 + eps) / 2 is masked; which ones, the bound's training decides too.
    assert torch.allclose(terms.weights, mask / (8 * 12 * 0.5005))
    assert torch.equal(terms.input_ids, masked().training(batch).input_ids)


def test_short_rows_are_the_same_tokens_in_rows_of_their_own():
    objective = dataclasses.replace(masked(), row_lengths=((3, 2), (6, 5)))
    for step, length in ((0, 3), (1, 3), (2, 6), (4, 6), (5, 12), (100, 12)):
        batch, terms = step_terms(objective, step)
        assert terms.input_ids.shape == (96 // length, length) and terms.visibility is None
        assert torch.equal(terms.targets.flatten(), batch.tokens[:, :-1].flatten())
        rates = diffusion.masking_probability(
            diffusion.diffusion_times(11, step, torch.arange(96 // length), 96 // length)
        )
        mask = terms.input_ids == CONFIG.mask_id
        assert torch.allclose(terms.weights, mask / rates[:, None] / 96)
    assert torch.equal(terms.input_ids, masked().training(batch).input_ids)


def test_short_rows_leave_out_those_of_padding_and_no_token():
    objective = dataclasses.replace(masked(), row_lengths=((3, 9),))
    batch, terms = step_terms(objective, 3, partial=4)
    # Rows 2 and 6 hold 5 real tokens: two pieces with some, two without any.
    assert terms.input_ids.shape == (8 * 4 - 2 * 2, 3) and int(terms.in_denominator.sum()) == 6 * 12 + 2 * 5
    real = torch.arange(12) < batch.lengths[:, None]
    assert torch.equal(terms.targets[terms.in_denominator], batch.tokens[:, :-1][real])
    total, _, _ = build(TransEncoder).weighted_nll(terms)
    assert torch.isfinite(total)


def test_validation_is_the_bound_of_whole_rows_whatever_is_trained():
    dataset = HashedTokens(13)
    (batch,) = batching.validation_batches(dataset, 8, 8, 0, 1)
    other = dataclasses.replace(masked(), loss_weight="cross_entropy", row_lengths=((3, 10**6),))
    for one, two in zip(masked().validation(batch, 1, 2), other.validation(batch, 1, 2), strict=True):
        assert one is two is None or torch.equal(one, two)


def brute_force_expectation(model, clean, nodes=400):
    """The expected MDM loss of one sequence: every mask enumerated, the integral over t by the midpoint rule."""
    length = clean.numel()
    t = (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
    p = diffusion.masking_probability(t).double()
    total = 0.0
    for bits in itertools.product([False, True], repeat=length):
        mask = torch.tensor(bits)
        count = int(mask.sum())
        if count:
            logits = model(torch.where(mask, CONFIG.mask_id, clean)[None])[0]
            nll = F.cross_entropy(logits[mask], clean[mask], reduction="sum").double()
            total += float((p**count * (1 - p) ** (length - count) / p).mean()) * float(nll)
    return total / length


@torch.no_grad()
def test_training_noise_has_the_brute_force_expectation():
    model = build(TransEncoder)
    model.lm_head.weight.mul_(8)  # so that the cross-entropies differ by what is masked
    clean = torch.tensor([3, 17, 4, 9, 9])
    objective = MaskedDiffusion(block_size=5, mask_id=CONFIG.mask_id, seed=2, global_batch_size=256)
    batch = batching.MicroBatch(
        tokens=torch.cat([clean, torch.zeros(1, dtype=torch.int64)]).repeat(256, 1),
        lengths=torch.full((256,), 6),
        prompt_lengths=torch.zeros(256, dtype=torch.int64),
        rows=torch.arange(256),
        row_weights=torch.full((256,), 1 / 5, dtype=torch.float64),
        step=0,
    )
    losses = []
    for step in range(60):
        terms = objective.training(batching.replace(batch, step=step))
        _, nll, index = model.weighted_nll(terms)
        rows = torch.zeros(256).index_add(0, index // 5, nll * terms.weights.flatten()[index])
        losses.append(rows.mean().item())
    expected = brute_force_expectation(model, clean)
    error = np.std(losses, ddof=1) / math.sqrt(len(losses))
    assert abs(np.mean(losses) - expected) < 4 * error
    assert error < 0.02 * expected


def test_random_lengths_follow_their_law():
    objective = masked(ssl_ratio=0.3)
    lengths = [
        objective.group(step, group, [Extent(12), Extent(12)]).length for step in range(400) for group in range(4)
    ]
    cut = [length for length in lengths if length < 12]
    # A twelfth of the random lengths is the whole block.
    assert len(cut) / len(lengths) == pytest.approx(0.3 * 11 / 12, abs=0.05)
    assert set(cut) == set(range(1, 12))
    assert all(masked().group(step, 0, [Extent(12)]).length == 12 for step in range(50))


def test_every_device_knows_the_tokens_of_all():
    dataset, objective = HashedTokens(13), masked(ssl_ratio=0.7)
    for step in range(20):
        shares = [
            batching.step_batches(dataset, objective.group, StepLayout(12, 4, 2, first, 6), step) for first in (0, 6)
        ]
        counts = [sum(batch.tokens[:, 1:].numel() for batch in share) for share in shares]
        assert {batch.step_tokens for share in shares for batch in share} == {sum(counts)}


def test_padding_is_neither_scored_nor_counted_nor_read():
    dataset, objective = HashedTokens(13, partial=4), masked()
    (batch,) = batching.step_batches(dataset, objective.group, StepLayout(8, 8, 8, 0, 8), 3)
    terms = objective.training(batch)
    padded = [row for row in range(8) if (24 + row) % 4 == 2]
    assert padded
    assert terms.weights[padded, 5:].abs().sum() == 0
    assert terms.visibility is not None and not terms.visibility.key_mask[padded, 5:].any()
    assert int(terms.in_denominator.sum()) == 12 * (8 - len(padded)) + 5 * len(padded)
    arm = NextToken(12)
    (batch,) = batching.step_batches(dataset, arm.group, StepLayout(8, 8, 8, 0, 8), 3)
    assert int((arm.training(batch).weights > 0).sum()) == 12 * (8 - len(padded)) + 4 * len(padded)


def test_validation_noise_is_the_same_for_every_seed_and_lies_in_its_stratum():
    one, other = masked(), MaskedDiffusion(block_size=12, mask_id=CONFIG.mask_id, seed=99, global_batch_size=4)
    (batch,) = batching.validation_batches(HashedTokens(13), 6, 6, 0, 1)
    for draw in range(3):
        first, second = one.validation(batch, draw, 3), other.validation(batch, draw, 3)
        assert torch.equal(first.input_ids, second.input_ids)
        p = 1 / first.weights[first.weights > 0]
        assert ((p > draw / 3) & (p < (draw + 1) / 3 + 2e-3)).all()


def test_validation_rows_are_dealt_once_over_devices():
    dataset = HashedTokens(13)
    seen = []
    for rank in range(3):
        parts = list(batching.validation_batches(dataset, 10, 2, rank, 3))
        assert len(parts) == 2
        seen += [int(row) for part in parts for row, weight in zip(part.rows, part.row_weights, strict=True) if weight]
    assert sorted(seen) == list(range(10))


def test_groups_are_the_largest_divisor_below_the_published_size():
    assert [batching.largest_group(batch, 32) for batch in (256, 16, 24, 100, 7, 1)] == [32, 16, 24, 25, 7, 1]


class HashedDialogues(HashedTokens):
    """Rows of many lengths with a prompt, padded with 1."""

    def __getitem__(self, k: int) -> Sample:
        tokens = super().__getitem__(k).tokens
        length, prompt_length = self.extent(k)
        tokens[length:] = 1
        return Sample(tokens, length, prompt_length)

    def extent(self, k: int) -> Extent:
        length = 3 + hash_int(k, 1) % 10
        return Extent(length, 1 + hash_int(k, 2) % (length - 2))


def response(row_length=None, prompt_drop=0.0, batch=8):
    return MaskedResponse(CONFIG.mask_id, 11, batch, row_length=row_length, prompt_drop=prompt_drop)


@pytest.mark.parametrize(
    "objective,model_class",
    [
        (NextResponseToken(), GPT),
        (response(), TransEncoder),
        (response(12), TransEncoder),
        (response(None, 0.5), TransEncoder),
    ],
)
def test_fine_tuning_does_not_depend_on_micro_batch_or_devices(objective, model_class):
    check_cuts(objective, model_class, HashedDialogues(13))


@pytest.mark.parametrize("objective", [response(batch=24), masked(0.6, 24)])
def test_a_micro_batch_holds_rows_of_one_length_and_needs_no_mask(objective):
    """Every row once, full micro batches where there are enough rows, and as many of them on every device."""
    dataset = HashedDialogues(13) if isinstance(objective, MaskedResponse) else HashedTokens(13)
    own_counts = set()
    for step, devices in itertools.product(range(12), (1, 2, 4)):
        rows, counts = 24 // devices, []
        seen = []
        for device in range(devices):
            batches = batching.step_batches(dataset, objective.group, StepLayout(24, 4, 5, device * rows, rows), step)
            counts.append(len(batches))
            alone = 0
            for batch in batches:
                assert objective.training(batch).visibility is None
                lengths = {group_length(objective, dataset, step, int(row) // 4) for row in batch.rows}
                assert lengths == {batch.tokens.size(1) - 1} and len(batch.rows) <= 5
                alone += len(batch.rows) < 5
                seen += batch.rows.tolist()
            if devices == 1:
                # The last micro batch of a length alone is smaller.
                assert alone <= len({batch.tokens.size(1) for batch in batches})
                assert [b.tokens.size(1) for b in batches] == sorted((b.tokens.size(1) for b in batches), reverse=True)
        assert sorted(seen) == list(range(24)) and len(set(counts)) == 1
        own_counts |= set(counts)
    assert len(own_counts) > 2


def group_length(objective, dataset, step, group):
    return objective.group(step, group, [dataset.extent(step * 24 + group * 4 + row) for row in range(4)]).length


def published_masked_loss(model, batch, rows, length, p_mask, uniforms):
    """One group by the published formula: pad, mask all behind the prompt, sum CE / p, divide by rows * length - prompts."""
    total, prompts = torch.zeros(()), 0
    for row in rows:
        clean, prompt = batch.tokens[row, :length], int(batch.prompt_lengths[row])
        noisy = clean.clone()
        scored = [column for column in range(prompt, length) if uniforms[row, column] < p_mask[row]]
        noisy[scored] = CONFIG.mask_id
        logits = model(noisy[None])[0]
        total = total + F.cross_entropy(logits[scored], clean[scored], reduction="sum") / p_mask[row]
        prompts += prompt
    return total / (len(rows) * length - prompts)


def whole_step(batches):
    """A step's rows in their order, each with all tokens that its micro batch has."""
    columns = max(batch.tokens.size(1) for batch in batches)
    tokens = torch.cat([F.pad(batch.tokens, (0, columns - batch.tokens.size(1))) for batch in batches])
    order = torch.cat([batch.rows for batch in batches]).argsort()
    lengths, prompts = (
        torch.cat([getattr(batch, name) for batch in batches])[order] for name in ("lengths", "prompt_lengths")
    )
    return batching.replace(batches[0], tokens=tokens[order], lengths=lengths, prompt_lengths=prompts)


@pytest.mark.parametrize("row_length", [None, 12])
def test_masked_fine_tuning_is_the_published_formula_padding_included(row_length):
    model, dataset, objective = build(TransEncoder), HashedDialogues(13), response(row_length)
    batches = batching.step_batches(dataset, objective.group, StepLayout(8, 4, 8, 0, 8), 3)
    batch = whole_step(batches)
    assert len(set(batch.lengths.tolist())) > 3
    t = diffusion.diffusion_times(11, 3, torch.arange(8), 8)
    uniforms = uniform_grid(11, Stream.MASK, 3, torch.arange(8), 12)
    expected = torch.zeros(())
    for rows in (range(4), range(4, 8)):
        length = row_length or max(int(batch.lengths[row]) for row in rows)
        expected += published_masked_loss(model, batch, rows, length, diffusion.masking_probability(t), uniforms) / 2
    assert step_loss(model, objective, dataset, 8, 4, 8).item() == pytest.approx(expected.item(), rel=1e-5)
    # Padding is among what is scored; without it the loss is another.
    for part in batches:
        terms = objective.training(part)
        padding = torch.arange(terms.weights.size(1))[None] >= part.lengths[:, None]
        assert (terms.weights[padding] > 0).any()


def test_arm_fine_tuning_is_the_mean_over_answer_tokens():
    model, dataset = build(GPT), HashedDialogues(13)
    groups = []
    for rows in (range(24, 28), range(28, 32)):
        nll = []
        for row in rows:
            sample = dataset[row]
            tokens = torch.from_numpy(sample.tokens[: sample.length])
            losses = F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none")
            nll.append(losses[sample.prompt_length - 1 :])
        groups.append(torch.cat(nll).mean())
    expected = (groups[0] + groups[1]) / 2
    found = step_loss(model, NextResponseToken(), dataset, 8, 4, 8)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_prompts_are_dropped_whole_and_as_often_as_asked_for():
    dataset, objective = HashedDialogues(13), response(None, 0.3)
    rows, dropped = 0, 0
    for step in range(60):
        for batch in batching.step_batches(dataset, objective.group, StepLayout(8, 4, 3, 0, 8), step):
            terms = objective.training(batch)
            for row in range(len(batch.tokens)):
                prompt = terms.input_ids[row, : batch.prompt_lengths[row]]
                masked_prompt = prompt == CONFIG.mask_id
                assert masked_prompt.all() or not masked_prompt.any()
                assert (terms.weights[row, : batch.prompt_lengths[row]] == 0).all()
                rows, dropped = rows + 1, dropped + bool(masked_prompt.all())
    assert rows == 480
    assert dropped / rows == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / rows))
