"""Samplers: golden tokens, laws on toy distributions that are enumerated, and equivalences (batch, padding, cache)."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_gpt.config import Config
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.model.logits import LogitsBatch, LogitsFn, guided, model_logits
from lit_gpt.sampling.autoregressive import NextLogitsFn, extend, recomputed
from lit_gpt.sampling.categorical import sample_tokens
from lit_gpt.sampling.denoising import denoise
from lit_gpt.sampling.entropy import entropies
from lit_gpt.sampling.sample import sample, sample_states
from lit_gpt.sampling.sequence import masked_sequences, prompt_sequences
from lit_gpt.sampling.settings import ALGORITHMS, Sampling, algorithm_name
from tests.golden.weights import golden_cases, golden_model, golden_tokens
from tests.support.far_device import FarDevice, FarTensor
from tests.support.gpus import DEVICES
from tests.support.small_models import scaled_model

TINY = Config("tiny", 2, 2, 32, 64, 2, block_size=32, vocab_size=50)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
WORDS, LENGTH = 3, 3  # of the toy distribution
TOY_MASK = 4  # above a head of four rows, the last of which is no word


def tiny(kind: type, seed: int = 5):
    return scaled_model(kind, TINY, seed)


def toy_joint() -> np.ndarray:
    """A correlated joint distribution of three words, (3, 3, 3)."""
    weights = np.random.default_rng(7).gamma(0.6, size=(WORDS,) * LENGTH) + 0.02
    return weights / weights.sum()


def conditionals(joint: np.ndarray, known: tuple[int | None, ...]) -> np.ndarray:
    """(LENGTH, WORDS): each position's distribution given the known words."""
    fixed = np.zeros_like(joint)
    slot = tuple(slice(None) if word is None else word for word in known)
    fixed[slot] = joint[slot]
    fixed /= fixed.sum()
    axes = range(LENGTH)
    return np.stack([fixed.sum(axis=tuple(axis for axis in axes if axis != position)) for position in axes])


def toy_mdm(joint: np.ndarray) -> LogitsFn:
    """The ideal MDM of the joint, by a table over all partly masked rows; the fourth logit tempts samplers."""
    table = torch.full((TOY_MASK + 1,) * LENGTH + (LENGTH, TOY_MASK), 50.0, dtype=torch.float64)
    for known in itertools.product((*range(WORDS), None), repeat=LENGTH):
        index = tuple(TOY_MASK if word is None else word for word in known)
        table[index][:, :WORDS] = torch.from_numpy(np.log(conditionals(joint, known) + 1e-300))
    return lambda batch: iter([table[tuple(batch.input_ids.T)].flatten(0, 1)[batch.indices]])


def toy_arm(joint: np.ndarray) -> NextLogitsFn:
    """The ideal ARM of the joint behind one start token: logits of the next word at every column."""
    tables = [torch.from_numpy(np.log(joint.sum(axis=tuple(range(n, LENGTH))))) for n in range(1, LENGTH + 1)]

    def logits_fn(ids: Tensor, positions: Tensor, key_mask: Tensor | None) -> Tensor:
        result = torch.full((*ids.shape, TOY_MASK), 50.0, dtype=torch.float64)
        for column in range(min(ids.size(1), LENGTH)):
            result[:, column, :WORDS] = tables[column][tuple(ids[:, 1 : column + 1].T)]
        return result

    return logits_fn


def origin_law(joint: np.ndarray, steps: int) -> np.ndarray:
    """The exact law of `origin` with few steps: every subset of positions that a step may reveal, enumerated."""
    times = torch.linspace(1, 1e-5, steps + 1).double().numpy()
    states = {(None,) * LENGTH: 1.0}
    for step in range(steps):
        reveal = 1.0 if step == steps - 1 else 1 - times[step + 1] / times[step]
        following: dict[tuple[int | None, ...], float] = {}
        for known, mass in states.items():
            table = conditionals(joint, known)
            choices = [
                [(word, 1.0)]
                if word is not None
                else [(None, 1 - reveal), *((w, reveal * table[i, w]) for w in range(WORDS))]
                for i, word in enumerate(known)
            ]
            for combination in itertools.product(*choices):
                key = tuple(word for word, _ in combination)
                following[key] = following.get(key, 0.0) + mass * math.prod(p for _, p in combination)
        states = {key: mass for key, mass in following.items() if mass > 0}
    law = np.zeros_like(joint)
    for words, mass in states.items():
        law[words] = mass
    return law


def chi_squared(samples: Tensor, law: np.ndarray) -> float:
    """Sum of (observed - expected)^2 / expected over the cells of the toy joint (26 degrees of freedom)."""
    codes = samples @ torch.tensor([WORDS**2, WORDS, 1])
    observed = torch.bincount(codes, minlength=law.size).numpy()
    expected = law.flatten() * len(samples)
    return float(((observed - expected) ** 2 / expected).sum())


LIMIT = 54.1  # 0.999 quantile of chi-squared with 26 degrees of freedom; seeds are fixed, so this is no matter of luck


# Golden


@pytest.fixture(scope="module", params=DEVICES)
def golden_mdm(request: pytest.FixtureRequest) -> TransEncoder:
    return golden_model(TransEncoder, golden_cases()["mdm_sample"]["weights_seed"]).to(request.param)


@pytest.fixture(scope="module", params=DEVICES)
def golden_arm(request: pytest.FixtureRequest) -> GPT:
    return golden_model(GPT, golden_cases()["arm_sample"]["weights_seed"]).to(request.param)


@pytest.mark.parametrize("case", golden_cases()["mdm_sample"]["cases"], ids=lambda case: f"steps{case['steps']}")
def test_golden_mdm_tokens(golden_mdm: TransEncoder, case: dict) -> None:
    prompt = golden_tokens(case["prompt_len"], case["tokens_seed"])
    settings = Sampling("greddy", case["steps"], 0.0, case["cfg_scale"])
    assert sample(golden_mdm, [prompt], settings, case["context_length"])[0].tolist() == case["tokens"]


@pytest.mark.parametrize("use_cache", [True, False])
def test_golden_arm_tokens(golden_arm: GPT, use_cache: bool) -> None:
    cases = golden_cases()["arm_sample"]["cases"]
    prompts = [golden_tokens(case["prompt_len"], case["tokens_seed"]) for case in cases]
    # All cases in one batch: different prompts, different lengths.
    lengths = tuple(case["context_length"] for case in cases)
    result = sample(golden_arm, prompts, Sampling(temperature=0.0, use_cache=use_cache), lengths)
    assert [row.tolist() for row in result] == [case["tokens"] for case in cases]


# Laws


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_origin_has_its_exact_law_at_few_steps(steps: int) -> None:
    joint = toy_joint()
    sequences = masked_sequences([[]] * 10_000, [LENGTH] * 10_000, TOY_MASK)
    *_, state = denoise(toy_mdm(joint), sequences, Sampling("origin", steps), WORDS)
    law = origin_law(joint, steps)
    assert chi_squared(state.input_ids, law) < LIMIT
    # The test has power: the joint itself, which one step cannot reach, is rejected.
    assert steps > 2 or chi_squared(state.input_ids, joint) > 10 * LIMIT


def test_origin_reaches_the_joint_at_many_steps() -> None:
    joint = toy_joint()
    sequences = masked_sequences([[]] * 10_000, [LENGTH] * 10_000, TOY_MASK)
    *_, state = denoise(toy_mdm(joint), sequences, Sampling("origin", 300, seed=2), WORDS)
    assert chi_squared(state.input_ids, joint) < LIMIT


def test_origin_given_a_prompt_has_the_conditional_law() -> None:
    joint = toy_joint()
    given = joint[1] / joint[1].sum()
    sequences = masked_sequences([[1]] * 10_000, [LENGTH] * 10_000, TOY_MASK)
    *_, state = denoise(toy_mdm(joint), sequences, Sampling("origin", 300), WORDS)
    assert (state.input_ids[:, 0] == 1).all()
    observed = torch.bincount(state.input_ids[:, 1:] @ torch.tensor([WORDS, 1]), minlength=9).numpy()
    expected = given.flatten() * 10_000
    assert ((observed - expected) ** 2 / expected).sum() < 26.1  # 0.999 quantile, 8 degrees of freedom


def test_arm_samples_the_joint() -> None:
    joint = toy_joint()
    sequences = prompt_sequences([[0]] * 10_000)
    *_, state = extend(recomputed(toy_arm(joint)), sequences, [LENGTH] * 10_000, Sampling(), WORDS)
    assert chi_squared(state.input_ids[:, 1:], joint) < LIMIT


UNIFORMS = (torch.arange(40_000).double() * 0.6180339887498949) % 1.0


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("width", [4, 300])
def test_tokens_have_the_tempered_softmax(temperature: float, width: int) -> None:
    logits = torch.randn(width, generator=torch.Generator().manual_seed(width)) * 2
    count = len(UNIFORMS)
    chunks = iter(logits.expand(count, -1).split(1000))
    sampled = sample_tokens(chunks, UNIFORMS, Sampling(temperature=temperature), width)
    expected = (logits / temperature).softmax(0).double()
    # The numbers are evenly spread, so frequencies are closer than chance would have them.
    observed = torch.bincount(sampled.token_ids, minlength=width) / count
    assert (observed - expected).abs().max() < 1e-3
    torch.testing.assert_close(sampled.confidence, logits.double().softmax(0)[sampled.token_ids], rtol=1e-5, atol=1e-8)


def test_filters_keep_the_likeliest() -> None:
    logits = torch.tensor([0.5, 0.2, 0.2, 0.06, 0.04]).log().expand(len(UNIFORMS), -1)
    cases = {
        (2, 1.0): {0, 1, 2},
        (1, 1.0): {0},
        (0, 0.4): {0},
        (0, 0.6): {0, 1, 2},
        (0, 0.95): {0, 1, 2, 3},
        (3, 0.5): {0},
    }
    for (top_k, top_p), kept in cases.items():
        sampled = sample_tokens(iter([logits]), UNIFORMS, Sampling(top_k=top_k, top_p=top_p), 5)
        assert set(sampled.token_ids.tolist()) == kept, (top_k, top_p)
    # What is kept keeps its proportions.
    observed = torch.bincount(
        sample_tokens(iter([logits]), UNIFORMS, Sampling(top_p=0.6), 5).token_ids, minlength=5
    ) / len(UNIFORMS)
    torch.testing.assert_close(observed, torch.tensor([5, 2, 2, 0, 0]) / 9, atol=1e-3, rtol=0)


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_a_nucleus_is_the_same_from_few_and_from_all(scale: float) -> None:
    """Flat distributions, whose nucleus is most of 2000 tokens, and peaked ones, whose nucleus is small."""
    logits = torch.randn(8, 2000, generator=torch.Generator().manual_seed(3)) * scale
    p = logits.softmax(1).double()
    order = p.argsort(dim=1, descending=True)
    inside = (p.gather(1, order).cumsum(1) - p.gather(1, order)) < 0.8
    kept = torch.zeros_like(inside).scatter_(1, order, inside)
    for number in range(0, 2000, 37):
        sampled = sample_tokens(iter([logits]), UNIFORMS[number : number + 8], Sampling(top_p=0.8), 2000)
        assert kept[torch.arange(8), sampled.token_ids].all()


def test_entropy_and_forbidden_tokens() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 9.0], [1.0, 2.0, 3.0, 9.0]])
    forbidden = torch.tensor([False, True]), 2
    sampled = sample_tokens(
        iter([logits]), torch.tensor([0.9, 0.9]), Sampling(temperature=0.0), 3, forbidden, entropies
    )
    assert sampled.token_ids.tolist() == [0, 1]
    torch.testing.assert_close(sampled.measure[0], torch.tensor(math.log(3)))
    p = torch.tensor([1.0, 2.0]).softmax(0)
    torch.testing.assert_close(sampled.measure[1], -(p * p.log()).sum())
    assert bool(sampled.finite) and not bool(
        sample_tokens(iter([logits * torch.nan]), torch.zeros(2), Sampling(temperature=0.0), 3).finite
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_greedy_is_the_brute_force_choice(steps: int) -> None:
    joint = toy_joint()
    times = torch.linspace(1, 1e-5, steps + 1)
    for prompt in ([], [2], [0, 1]):
        known: list[int | None] = [*prompt, *([None] * (LENGTH - len(prompt)))]
        for step in range(steps):
            table = conditionals(joint, tuple(known))
            hidden = [i for i, word in enumerate(known) if word is None]
            keep = 1.0 if step == steps - 1 else float(1 - times[step + 1] / times[step])
            best = sorted(hidden, key=lambda i: -table[i].max())[: int(len(hidden) * keep)]
            for i in best:
                known[i] = int(table[i].argmax())
        sequences = masked_sequences([prompt], [LENGTH], TOY_MASK)
        *_, state = denoise(toy_mdm(joint), sequences, Sampling("greedy", steps, 0.0), WORDS)
        assert state.input_ids[0].tolist() == known


def test_guidance_is_the_formula() -> None:
    model = tiny(TransEncoder)
    sequences = masked_sequences(PROMPTS, [8, 8, 12], TINY.mask_id)
    where = (sequences.key_mask & ~sequences.prompt_mask).flatten().nonzero().squeeze(1)
    batch = LogitsBatch(
        sequences.input_ids, sequences.attention_mask(), sequences.prompt_mask, where, sequences.positions
    )
    args = (sequences.positions, model.visibility.padded(sequences.attention_mask()))
    with torch.no_grad():
        result = torch.cat(list(guided(model_logits(model), 0.7, TINY.mask_id)(batch)))
        cond = model(sequences.input_ids, *args).flatten(0, 1)[where]
        uncond = model(torch.where(sequences.prompt_mask, TINY.mask_id, sequences.input_ids), *args).flatten(0, 1)[
            where
        ]
    torch.testing.assert_close(result, uncond + 1.7 * (cond - uncond), rtol=1e-5, atol=1e-5)
    inner = model_logits(model)
    assert guided(inner, 0.0, TINY.mask_id) is inner


# Equivalences


@pytest.mark.parametrize("kind", [TransEncoder, GPT])
@pytest.mark.parametrize("algorithm", ["origin", "greedy"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_batch(kind: type, algorithm: str, temperature: float) -> None:
    model = tiny(kind)
    cfg_scale = 0.5 if kind is TransEncoder else 0.0
    settings, lengths = Sampling(algorithm, 6, temperature, cfg_scale), (20, 17, 32)
    together = sample(model, PROMPTS, settings, lengths)
    for row, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], settings, lengths[row], rows=[row])
        assert alone[0].tolist() == together[row].tolist()
        assert together[row][: len(prompt)].tolist() == prompt
    swapped = sample(model, PROMPTS[::-1], settings, lengths[::-1], rows=[2, 1, 0])
    assert [row.tolist() for row in swapped[::-1]] == [row.tolist() for row in together]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stop_id", [None, 7])
def test_cache_and_no_cache_agree(temperature: float, stop_id: int | None) -> None:
    model = tiny(GPT)
    prompts = [*PROMPTS, *PROMPTS, [1] * 31, [2] * 32]
    settings = Sampling(temperature=temperature)
    with_cache = sample(model, prompts, settings, 32, stop_id)
    without = sample(model, prompts, replace(settings, use_cache=False), 32, stop_id)
    assert [row.tolist() for row in with_cache] == [row.tolist() for row in without]
    assert len(with_cache[-1]) == 32 and len(with_cache[-2]) == 32 or stop_id is not None


def test_arm_rows_stop_at_the_stop_token() -> None:
    model = tiny(GPT)
    free = sample(model, PROMPTS, Sampling(), 30)
    stop_id = int(free[1][9])
    stopped = sample(model, PROMPTS, Sampling(), 30, stop_id)
    for prompt, whole, cut in zip(PROMPTS, free, stopped, strict=True):
        generated = whole[len(prompt) :].tolist()
        end = generated.index(stop_id) + 1 if stop_id in generated else len(generated)
        assert cut.tolist() == prompt + generated[:end]


def test_rows_and_seeds_have_their_own_streams() -> None:
    model = tiny(TransEncoder)
    settings = Sampling("origin", 8)
    first, second = sample(model, [[1], [1]], settings, 24)
    assert first.tolist() != second.tolist()
    assert first.tolist() != sample(model, [[1]], replace(settings, seed=settings.seed + 2**32), 24)[0].tolist()


@pytest.mark.parametrize("kind", [TransEncoder, GPT])
def test_padding_of_the_vocabulary_is_never_sampled(kind: type) -> None:
    model = tiny(kind)
    with torch.no_grad():
        model.lm_head.weight[TINY.vocab_size :] *= 100
    result = torch.cat(sample(model, [[1]] * 64, Sampling("origin", 4, temperature=3.0), 16))
    assert int(result.min()) >= 0 and int(result.max()) < TINY.vocab_size


# States


@pytest.mark.parametrize("algorithm", ["origin", "greedy"])
def test_mdm_states_only_reveal(algorithm: str) -> None:
    states = list(sample_states(tiny(TransEncoder), PROMPTS, Sampling(algorithm, 40), (20, 9, 12)))
    assert [state.step for state in states] == list(range(41))
    sequences = states[0]
    assert [row.tolist().count(TINY.mask_id) for row in sequences.tokens()] == [15, 8, 9]
    for before, after in itertools.pairwise(states):
        settled = before.input_ids != TINY.mask_id
        assert (after.input_ids[settled] == before.input_ids[settled]).all()
        assert (after.confidence[settled] == before.confidence[settled]).all()
    final = states[-1]
    assert (final.input_ids != TINY.mask_id).all()
    for prompt, confidence in zip(PROMPTS, final.confidences(), strict=True):
        assert (confidence[: len(prompt)] == 1).all()
        assert ((confidence > 0) & (confidence <= 1)).all()


def test_arm_states_grow_by_a_token() -> None:
    seen = [[len(row) for row in state.tokens()] for state in sample_states(tiny(GPT), PROMPTS, Sampling(), 12)]
    assert seen[0] == [5, 1, 3] and seen[1] == [6, 2, 4] and seen[-1] == [12, 12, 12]
    assert [len(row) for row in sample(tiny(GPT), PROMPTS, Sampling(), 12)] == [12, 12, 12]


def test_a_full_prompt_needs_no_sampling() -> None:
    for kind in (TransEncoder, GPT):
        assert sample(tiny(kind), [[1, 2, 3]], Sampling(), 3)[0].tolist() == [1, 2, 3]


# Errors


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps is 0: at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"cfg_scale": float("nan")}, "cfg_scale is nan"),
        ({"algorithm": "best"}, "unknown sampling algorithm 'best': choose from origin, greedy"),
    ],
)
def test_wrong_settings(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("kind", "prompts", "settings", "length", "words"),
    [
        (TransEncoder, [[1], [1] * 9], Sampling(), 8, "prompt 1 has 9 tokens, more than the context length 8"),
        (TransEncoder, [[1]], Sampling(), 33, "context length 33: this model reads from 1 to 32"),
        (
            TransEncoder,
            [[TINY.mask_id]],
            Sampling(),
            8,
            "prompt 0 holds ids from 64 to 64: this model's tokens are 0 to 49",
        ),
        (TransEncoder, [], Sampling(), 8, "no prompt was given"),
        (TransEncoder, [[1]], Sampling(), (8, 9), "2 context lengths for 1 prompts"),
        (TransEncoder, [[1]], Sampling(early_stop=True), 8, "early_stop needs a stop_id"),
        (GPT, [[]], Sampling(), 8, "prompt 0 is empty"),
        (GPT, [[1]], Sampling(cfg_scale=1.0), 8, "needs an MDM"),
    ],
)
def test_wrong_arguments(
    kind: type, prompts: list, settings: Sampling, length: int | tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        sample_states(tiny(kind), prompts, settings, length)  # before any state is asked for


def test_historic_spelling() -> None:
    assert algorithm_name("greddy") == "greedy" and Sampling("greddy").algorithm == "greedy"


# What the field has learnt since


@pytest.mark.parametrize("bound", [0.0, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("algorithm", ["threshold", "entropy"])
def test_algorithms_with_a_bound_are_the_brute_force_choice(algorithm: str, bound: float) -> None:
    joint = toy_joint()
    for prompt in ([], [2], [0, 1]):
        known: list[int | None] = [*prompt, *([None] * (LENGTH - len(prompt)))]
        steps = 0
        while None in known:
            table = conditionals(joint, tuple(known))
            hidden = [i for i, word in enumerate(known) if word is None]
            if algorithm == "threshold":
                best = [i for i in hidden if table[i].max() >= bound] or [max(hidden, key=lambda i: table[i].max())]
            else:
                entropies = {i: -float((table[i] * np.log(table[i] + 1e-300)).sum()) for i in hidden}
                ranked = sorted(hidden, key=entropies.__getitem__)
                best = [i for n, i in enumerate(ranked) if not n or sum(entropies[j] for j in ranked[:n]) <= bound]
            for i in best:
                known[i] = int(table[i].argmax())
            steps += 1
        settings = Sampling(algorithm, 50, 0.0, threshold=bound, entropy_bound=bound)
        *_, state = denoise(toy_mdm(joint), masked_sequences([prompt], [LENGTH], TOY_MASK), settings, WORDS)
        assert state.input_ids[0].tolist() == known and state.step == steps


def test_algorithms_with_a_bound_end_at_their_last_step() -> None:
    joint = toy_joint()
    settings = Sampling("threshold", 2, 0.0, threshold=1.0)
    *_, state = denoise(toy_mdm(joint), masked_sequences([[]], [LENGTH], TOY_MASK), settings, WORDS)
    assert state.step == 2 and (state.input_ids < TOY_MASK).all()


def test_one_token_at_a_time_has_the_joint_law() -> None:
    """A threshold of 1 writes the most certain position alone: whatever the order, the law is the model's own."""
    joint = toy_joint()
    sequences = masked_sequences([[]] * 10_000, [LENGTH] * 10_000, TOY_MASK)
    *_, state = denoise(toy_mdm(joint), sequences, Sampling("threshold", 50, block_length=1), WORDS)
    assert chi_squared(state.input_ids, joint) < LIMIT


@pytest.mark.parametrize("remask", [0.05, 1.0])
def test_remasking_keeps_the_law(remask: float) -> None:
    joint = toy_joint()
    sequences = masked_sequences([[]] * 10_000, [LENGTH] * 10_000, TOY_MASK)
    changed = 0
    before = None
    for state in denoise(toy_mdm(joint), sequences, Sampling("origin", 300, remask=remask), WORDS):
        if before is not None:
            changed += int(((before != TOY_MASK) & (state.input_ids == TOY_MASK)).sum())
        before = state.input_ids
    assert changed > 1000
    assert chi_squared(before, joint) < LIMIT


def test_blocks_are_written_from_left_to_right() -> None:
    model = tiny(TransEncoder)
    written = []
    for state in sample_states(model, [[3, 1]], Sampling("origin", 24, block_length=5), 20):
        free = (state.input_ids[0, 2:] != TINY.mask_id).tolist()
        written.append(free)
        blocks = [free[start : start + 5] for start in range(0, 18, 5)]
        begun = [any(block) for block in blocks]
        assert all(all(block) for block, later in zip(blocks, begun[1:], strict=False) if later)
    assert all(written[-1]) and len(written) <= 25


STOP_ID = 7  # ends an MDM's row in the settings with early_stop only
SETTINGS = {
    "threshold": {"algorithm": "threshold", "threshold": 0.3, "top_k": 5},
    "entropy": {"algorithm": "entropy", "entropy_bound": 2.0, "top_p": 0.9},
    "blocks": {"algorithm": "greedy", "block_length": 4},
    "remask": {"algorithm": "origin", "remask": 0.3},
    "prefix": {"algorithm": "greedy", "block_length": 4, "cache": "prefix"},
    "dual": {"algorithm": "origin", "block_length": 5, "cache": "dual", "refresh": 3},
    "stop": {"algorithm": "origin", "early_stop": True, "min_new_tokens": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_new_settings_do_not_depend_on_the_batch(name: str) -> None:
    model = tiny(TransEncoder)
    settings, lengths = Sampling(steps=8, cfg_scale=0.5, **SETTINGS[name]), (20, 17, 32)
    together = sample(model, PROMPTS, settings, lengths, STOP_ID)
    for row, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], settings, lengths[row], STOP_ID, [row])
        assert alone[0].tolist() == together[row].tolist()
        assert together[row][: len(prompt)].tolist() == prompt and int(together[row].max()) < TINY.vocab_size


@pytest.mark.parametrize("cfg_scale", [0.0, 0.8])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_read_anew_at_every_step_is_exact(cache: str, cfg_scale: float) -> None:
    model = tiny(TransEncoder)
    settings, lengths = Sampling("greedy", 12, 1.0, cfg_scale, block_length=6), (24, 20, 32)
    exact = sample(model, PROMPTS, settings, lengths)
    cached = sample(model, PROMPTS, replace(settings, cache=cache, refresh=1), lengths)
    assert [row.tolist() for row in cached] == [row.tolist() for row in exact]
    # Without it, it is an approximation: these random weights show that it was used.
    approximate = sample(model, PROMPTS, replace(settings, cache=cache), lengths)
    assert [row.tolist() for row in approximate] != [row.tolist() for row in exact]


def test_a_partial_reading_is_the_full_one_while_nothing_changes() -> None:
    """Keys and values kept from the same rows: a window's logits are those of the whole."""
    from lit_gpt.sampling.block_cache import block_cached

    model = tiny(TransEncoder)
    sequences = masked_sequences(PROMPTS, [12, 9, 14], TINY.mask_id)
    window = torch.zeros_like(sequences.key_mask)
    window[0, 8:11], window[1, 10:] = True, True
    where = window.flatten().nonzero().squeeze(1)
    batch = LogitsBatch(
        sequences.input_ids, sequences.attention_mask(), sequences.prompt_mask, where, sequences.positions
    )
    logits_fn = block_cached(model)
    with torch.no_grad():
        whole = torch.cat(list(logits_fn(batch)))
        part = torch.cat(list(logits_fn(replace(batch, recompute=window))))
    torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-4)


def commonest(kind: type) -> int:
    """The token that a model writes most often."""
    rows = sample(tiny(kind), [[3]] * 40, Sampling(), 20)
    return int(torch.bincount(torch.cat([row[1:] for row in rows])).argmax())


@pytest.mark.parametrize("kind", [TransEncoder, GPT])
def test_no_end_token_comes_too_early(kind: type) -> None:
    stop = commonest(kind)
    rows = sample(tiny(kind), [[3]] * 40, Sampling(min_new_tokens=6), 20, stop)
    assert all(stop not in row[1:7].tolist() for row in rows)
    assert any(stop in row[7:].tolist() for row in rows)


def test_a_row_ends_with_its_end_token() -> None:
    """Once it stands with nothing masked before it, end tokens fill what is still masked, and the row takes no more steps."""
    stop = commonest(TransEncoder)
    early = 0
    for row in range(20):
        settings = Sampling("origin", 60, early_stop=True, block_length=4)
        states = list(sample_states(tiny(TransEncoder), [[3]], settings, 20, stop, [row]))
        tokens = states[-1].input_ids[0].tolist()
        plain = sample(tiny(TransEncoder), [[3]], replace(settings, early_stop=False), 20, stop, [row])[0].tolist()
        first = tokens.index(stop) if stop in tokens else len(tokens)
        assert tokens[:first] == plain[:first] and tokens[first // 4 * 4 + 5 :] == [stop] * len(
            tokens[first // 4 * 4 + 5 :]
        )
        early += stop in tokens and states[-1].step < 50
    assert early


def test_wrong_new_settings_are_refused_together() -> None:
    with pytest.raises(ValueError) as caught:
        Sampling("greedy", threshold=1.5, top_p=-1, top_k=-2, cache="dual", remask=0.5)
    for words in (
        "threshold is 1.5: it must be a number from 0 to 1",
        "top_p is -1",
        "top_k is -2",
        "cache dual needs a block_length",
        "remask goes with the algorithm origin",
    ):
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="cache is 'all': choose from none, prefix, dual"):
        Sampling(cache="all")


def test_the_likeliest_token_is_the_first_of_its_equals() -> None:
    logits = torch.randint(0, 5, (64, 1280), generator=torch.Generator().manual_seed(1)).float()
    sampled = sample_tokens(iter(logits.split(20)), None, Sampling(temperature=0.0), 1280)
    assert sampled.token_ids.tolist() == [row.index(max(row)) for row in logits.tolist()]
    torch.testing.assert_close(sampled.confidence, logits.double().softmax(1).amax(1), rtol=1e-5, atol=0)


def test_a_row_that_stops_early_needs_no_more_blocks() -> None:
    """Whole blocks behind an end token are filled at once; with remasking a block ends with its steps all the same."""
    stop, settings = commonest(TransEncoder), {"block_length": 4, "remask": 0.3, "early_stop": True}
    for row in range(10):
        *_, state = sample_states(tiny(TransEncoder), [[3]], Sampling(steps=5, **settings), 20, stop, [row])
        assert state.step <= 5 and int(state.input_ids.max()) < TINY.vocab_size


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "arm"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_model_writes_nothing(algorithm: str, temperature: float) -> None:
    model = tiny(GPT if algorithm == "arm" else TransEncoder)
    with torch.no_grad():
        model.lm_head.weight[7, 3] = torch.nan
    settings = Sampling("origin" if algorithm == "arm" else algorithm, 4, temperature)
    with pytest.raises(ValueError, match="no finite numbers: its weights are damaged or it diverged"):
        sample(model, PROMPTS, settings, 20)
    # Whoever looks at the tokens of a step is told at once.
    states = sample_states(model, PROMPTS, settings, 20)
    assert len(next(states).tokens()) == 3
    with pytest.raises(ValueError, match="no finite numbers"):
        next(states).tokens()


# Waiting for the device: once a step

WAITING = {
    **SETTINGS,
    "plain": {},
    "greedy": {"algorithm": "greedy", "temperature": 0.0},
    "greedy, filters": {"algorithm": "greedy", "top_k": 7, "top_p": 0.5},
    "origin, filters": {"top_k": 7, "top_p": 0.5, "min_new_tokens": 4},
    "greedy, min_new_tokens": {"algorithm": "greedy", "min_new_tokens": 4},
    "greedy, early stop": {"algorithm": "greedy", "early_stop": True},
    "remask in blocks": {"remask": 0.3, "block_length": 5, "cache": "prefix", "refresh": 2},
    "greedy, dual": {"algorithm": "greedy", "block_length": 4, "cache": "dual", "refresh": 3},
}  # fmt: skip


@pytest.mark.parametrize("lengths", [(20, 17, 32), (20, 16, 18)], ids=["ragged", "even"])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.5])
@pytest.mark.parametrize("name", WAITING)
def test_a_step_waits_for_the_device_once(name: str, cfg_scale: float, lengths: tuple[int, ...]) -> None:
    settings = Sampling(steps=8, cfg_scale=cfg_scale, **WAITING[name])
    expected = list(sample_states(tiny(TransEncoder), PROMPTS, settings, lengths, STOP_ID))
    far = FarDevice()
    found, waits = [], []
    with far:
        for state in sample_states(tiny(TransEncoder).to(far.device), PROMPTS, settings, lengths, STOP_ID):
            waits.append(len(far.waits))
            found.append(state)
        waits.append(len(far.waits))
    per_step = [after - before for before, after in itertools.pairwise(waits)]
    assert set(per_step) == {1}, far.waits
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one.input_ids, FarTensor) and torch.equal(one.input_ids.near, other.input_ids)
        # Attention there is another kernel.
        assert isinstance(one.confidence, FarTensor)
        torch.testing.assert_close(one.confidence.near, other.confidence, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wait", [bool, int, lambda x: x.tolist(), Tensor.cpu, Tensor.nonzero, lambda x: x[x > 0]])
def test_the_played_device_sees_who_waits(wait) -> None:
    with FarDevice() as far:
        one = torch.ones(1).to(far.device, non_blocking=True)
        one = (one + 1).cumsum(0).index_select(0, torch.zeros_like(one, dtype=torch.int64))
        assert not far.waits
        wait(one)
        assert far.waits
        with pytest.raises(AssertionError, match="different devices"):
            one + torch.ones(1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WAITING)
def test_a_step_waits_for_a_gpu_once(name: str) -> None:
    settings, lengths = Sampling(steps=8, **WAITING[name]), (20, 17, 32)
    model = tiny(TransEncoder).cuda()
    count = len(list(sample_states(model, PROMPTS, settings, lengths, STOP_ID)))
    states = sample_states(model, PROMPTS, settings, lengths, STOP_ID)
    next(states)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for _ in range(count):
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                next(states, None)
            assert len(waits) == 1, [str(wait.message) for wait in waits]
    finally:
        torch.cuda.set_sync_debug_mode("default")
