"""The forward process: its laws, and its independence of everything but counters."""

from __future__ import annotations

import torch

from lit_gpt import diffusion
from lit_gpt.randomness import Stream, uniform_grid


def test_times_fill_every_stratum_once_a_step():
    for step in range(5):
        t = diffusion.diffusion_times(7, step, torch.arange(64), 64)
        assert sorted((t * 64).long().tolist()) == list(range(64))


def test_strata_are_permuted_so_that_a_row_sees_all_times():
    first_row = torch.cat([diffusion.diffusion_times(7, step, torch.tensor([0]), 64) for step in range(2000)])
    # Mean and variance of U(0, 1), five standard errors.
    assert abs(first_row.mean() - 0.5) < 5 * (1 / 12 / 2000) ** 0.5
    assert abs(first_row.var() - 1 / 12) < 0.01


def test_a_rows_time_does_not_depend_on_who_asks():
    everyone = diffusion.diffusion_times(7, 3, torch.arange(32), 32)
    some = diffusion.diffusion_times(7, 3, torch.tensor([30, 5]), 32)
    assert some.tolist() == [everyone[30].item(), everyone[5].item()]


def test_seed_and_step_change_the_noise_beyond_32_bits():
    rows = torch.arange(16)
    times = [diffusion.diffusion_times(seed, step, rows, 16) for seed, step in ((1, 0), (1 + 2**32, 0), (1, 1))]
    assert not torch.equal(times[0], times[1])
    assert not torch.equal(times[0], times[2])


def test_masking_probability_is_the_published_law():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert torch.allclose(diffusion.masking_probability(t), torch.tensor([1e-3, 0.5005, 1.0]))


def test_tokens_are_masked_at_their_rows_rate():
    rows = torch.arange(2)
    uniforms = uniform_grid(3, Stream.MASK, 0, rows, 20000)
    clean = torch.ones((2, 20000), dtype=torch.int64)
    noisy_input, mask = diffusion.forward_process(clean, torch.tensor([0.1, 0.7]), uniforms, 99)
    rates = mask.double().mean(1)
    assert abs(rates[0] - 0.1) < 5 * (0.09 / 20000) ** 0.5
    assert abs(rates[1] - 0.7) < 5 * (0.21 / 20000) ** 0.5
    assert torch.equal(noisy_input == 99, mask)


def test_what_is_not_maskable_stays():
    clean = torch.arange(8)[None]
    maskable = torch.tensor([[False] * 4 + [True] * 4])
    noisy_input, mask = diffusion.forward_process(clean, torch.ones(1), torch.zeros((1, 8)), 99, maskable)
    assert noisy_input.tolist() == [[0, 1, 2, 3, 99, 99, 99, 99]]
    assert torch.equal(mask, maskable)


def test_validation_times_are_fixed_and_even():
    samples = torch.arange(50)
    draws = torch.stack([diffusion.low_discrepancy_times(samples, draw, 4) for draw in range(4)])
    assert (draws * 4).long().tolist() == [[draw] * 50 for draw in range(4)]
    # The sequences together fill a stratum evenly: no gap of more than 2.7 times the even one.
    first = torch.cat([torch.zeros(1), (draws[0] * 4).sort().values, torch.ones(1)])
    assert (first[1:] - first[:-1]).max() < 2.7 / 50


def test_validation_times_are_as_fine_for_the_last_sequences_as_for_the_first():
    t = diffusion.low_discrepancy_times(torch.arange(1 << 15), 0, 2)
    assert t.dtype == torch.float64 and len(t.unique()) == len(t) and t.min() > 0
    # As even as n multiples of the golden ratio are: their largest gap is below 3 / n.
    assert t.sort().values.diff().max() * 2 < 3 / len(t)
