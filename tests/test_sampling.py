"""Samplers: golden tokens, laws on toy distributions that are enumerated, and equivalences (batch, padding, cache)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_gpt.canvas import masked_canvas, prompt_canvas
from lit_gpt.config import Config
from lit_gpt.diffmodel import TransEncoder
from lit_gpt.model import GPT
from lit_gpt.sampling import (
    LogitsFn,
    Sampling,
    algorithm_name,
    denoise,
    extend,
    guided,
    gumbel_argmax,
    recomputed,
    sample,
    sample_states,
)
from tests.golden.weights import golden_cases, golden_model, golden_tokens

TINY = Config("tiny", 2, 2, 32, 64, 2, block_size=32, vocab_size=50)
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
WORDS, LENGTH = 3, 3  # of the toy distribution
TOY_MASK = 4  # above a head of four rows, the last of which is no word


def tiny(kind: type, seed: int = 5):
    """A small model with weights large enough that its distributions differ from position to position."""
    model = kind(TINY)
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


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
    return lambda ids, positions, key_mask: table[tuple(ids.T)]


def toy_arm(joint: np.ndarray) -> LogitsFn:
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


@pytest.fixture(scope="module")
def golden_mdm() -> TransEncoder:
    return golden_model(TransEncoder, golden_cases()["mdm_sample"]["weights_seed"])


@pytest.fixture(scope="module")
def golden_arm() -> GPT:
    return golden_model(GPT, golden_cases()["arm_sample"]["weights_seed"])


@pytest.mark.parametrize("case", golden_cases()["mdm_sample"]["cases"], ids=lambda case: f"steps{case['steps']}")
def test_golden_mdm_tokens(golden_mdm: TransEncoder, case: dict) -> None:
    prompt = golden_tokens(case["prompt_len"], case["tokens_seed"])
    settings = Sampling(case["context_length"], "greddy", case["steps"], 0.0, case["cfg_scale"])
    assert sample(golden_mdm, [prompt], settings)[0].tolist() == case["tokens"]


@pytest.mark.parametrize("use_cache", [True, False])
def test_golden_arm_tokens(golden_arm: GPT, use_cache: bool) -> None:
    cases = golden_cases()["arm_sample"]["cases"]
    prompts = [golden_tokens(case["prompt_len"], case["tokens_seed"]) for case in cases]
    # All cases in one batch: different prompts, different lengths.
    lengths = tuple(case["context_length"] for case in cases)
    result = sample(golden_arm, prompts, Sampling(lengths, temperature=0.0, use_cache=use_cache))
    assert [row.tolist() for row in result] == [case["tokens"] for case in cases]


# Laws


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_origin_has_its_exact_law_at_few_steps(steps: int) -> None:
    joint = toy_joint()
    canvas = masked_canvas([[]] * 10_000, [LENGTH] * 10_000, TOY_MASK)
    *_, state = denoise(toy_mdm(joint), canvas, Sampling(LENGTH, "origin", steps), WORDS)
    law = origin_law(joint, steps)
    assert chi_squared(state.input_ids, law) < LIMIT
    # The test has power: the joint itself, which one step cannot reach, is rejected.
    assert steps > 2 or chi_squared(state.input_ids, joint) > 10 * LIMIT


def test_origin_reaches_the_joint_at_many_steps() -> None:
    joint = toy_joint()
    canvas = masked_canvas([[]] * 10_000, [LENGTH] * 10_000, TOY_MASK)
    *_, state = denoise(toy_mdm(joint), canvas, Sampling(LENGTH, "origin", 300, seed=2), WORDS)
    assert chi_squared(state.input_ids, joint) < LIMIT


def test_origin_given_a_prompt_has_the_conditional_law() -> None:
    joint = toy_joint()
    given = joint[1] / joint[1].sum()
    canvas = masked_canvas([[1]] * 10_000, [LENGTH] * 10_000, TOY_MASK)
    *_, state = denoise(toy_mdm(joint), canvas, Sampling(LENGTH, "origin", 300), WORDS)
    assert (state.input_ids[:, 0] == 1).all()
    observed = torch.bincount(state.input_ids[:, 1:] @ torch.tensor([WORDS, 1]), minlength=9).numpy()
    expected = given.flatten() * 10_000
    assert ((observed - expected) ** 2 / expected).sum() < 26.1  # 0.999 quantile, 8 degrees of freedom


def test_arm_samples_the_joint() -> None:
    joint = toy_joint()
    canvas = prompt_canvas([[0]] * 10_000)
    *_, state = extend(recomputed(toy_arm(joint)), canvas, [LENGTH] * 10_000, Sampling(LENGTH + 1), WORDS)
    assert chi_squared(state.input_ids[:, 1:], joint) < LIMIT


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_gumbel_argmax_samples_the_tempered_softmax(temperature: float) -> None:
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0])
    count = 40_000
    tokens, probability = gumbel_argmax(logits.expand(count, -1), temperature, (1, 7, 0, torch.arange(count)))
    expected = (logits / temperature).softmax(0).double().numpy() * count
    observed = torch.bincount(tokens, minlength=4).numpy()
    assert ((observed - expected) ** 2 / expected).sum() < 16.3  # 0.999 quantile, 3 degrees of freedom
    torch.testing.assert_close(probability, logits.double().softmax(0)[tokens])


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
        canvas = masked_canvas([prompt], [LENGTH], TOY_MASK)
        *_, state = denoise(toy_mdm(joint), canvas, Sampling(LENGTH, "greedy", steps, 0.0), WORDS)
        assert state.input_ids[0].tolist() == known


def test_guidance_is_the_formula() -> None:
    model = tiny(TransEncoder)
    canvas = masked_canvas(PROMPTS, [8, 8, 12], TINY.mask_id)
    args = (canvas.positions, canvas.attention_mask())
    with torch.no_grad():
        result = guided(model, 0.7, canvas.prompt_mask, TINY.mask_id)(canvas.input_ids, *args)
        cond_logits = model(canvas.input_ids, *args)
        uncond_logits = model(torch.where(canvas.prompt_mask, TINY.mask_id, canvas.input_ids), *args)
    torch.testing.assert_close(result, uncond_logits + 1.7 * (cond_logits - uncond_logits), rtol=1e-5, atol=1e-5)
    assert guided(model, 0.0, canvas.prompt_mask, TINY.mask_id) is model


# Equivalences


@pytest.mark.parametrize("kind", [TransEncoder, GPT])
@pytest.mark.parametrize("algorithm", ["origin", "greedy"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_batch(kind: type, algorithm: str, temperature: float) -> None:
    model = tiny(kind)
    cfg_scale = 0.5 if kind is TransEncoder else 0.0
    settings = Sampling((20, 17, 32), algorithm, 6, temperature, cfg_scale)
    together = sample(model, PROMPTS, settings)
    for row, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], replace(settings, context_length=settings.context_length[row]), rows=[row])
        assert alone[0].tolist() == together[row].tolist()
        assert together[row][: len(prompt)].tolist() == prompt
    swapped = sample(model, PROMPTS[::-1], replace(settings, context_length=(32, 17, 20)), rows=[2, 1, 0])
    assert [row.tolist() for row in swapped[::-1]] == [row.tolist() for row in together]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stop_id", [None, 7])
def test_cache_and_no_cache_agree(temperature: float, stop_id: int | None) -> None:
    model = tiny(GPT)
    prompts = [*PROMPTS, *PROMPTS, [1] * 31, [2] * 32]
    settings = Sampling(32, temperature=temperature, stop_id=stop_id)
    with_cache = sample(model, prompts, settings)
    without = sample(model, prompts, replace(settings, use_cache=False))
    assert [row.tolist() for row in with_cache] == [row.tolist() for row in without]
    assert len(with_cache[-1]) == 32 and len(with_cache[-2]) == 32 or stop_id is not None


def test_arm_rows_stop_at_the_stop_token() -> None:
    model = tiny(GPT)
    free = sample(model, PROMPTS, Sampling(30))
    stop_id = int(free[1][9])
    stopped = sample(model, PROMPTS, Sampling(30, stop_id=stop_id))
    for prompt, whole, cut in zip(PROMPTS, free, stopped, strict=True):
        generated = whole[len(prompt) :].tolist()
        end = generated.index(stop_id) + 1 if stop_id in generated else len(generated)
        assert cut.tolist() == prompt + generated[:end]


def test_rows_and_seeds_have_their_own_streams() -> None:
    model = tiny(TransEncoder)
    settings = Sampling(24, "origin", 8)
    first, second = sample(model, [[1], [1]], settings)
    assert first.tolist() != second.tolist()
    assert first.tolist() != sample(model, [[1]], replace(settings, seed=settings.seed + 2**32))[0].tolist()


@pytest.mark.parametrize("kind", [TransEncoder, GPT])
def test_padding_of_the_vocabulary_is_never_sampled(kind: type) -> None:
    model = tiny(kind)
    with torch.no_grad():
        model.lm_head.weight[TINY.vocab_size :] *= 100
    result = torch.cat(sample(model, [[1]] * 64, Sampling(16, "origin", 4, temperature=3.0)))
    assert int(result.min()) >= 0 and int(result.max()) < TINY.vocab_size


# States


@pytest.mark.parametrize("algorithm", ["origin", "greedy"])
def test_mdm_states_only_reveal(algorithm: str) -> None:
    states = list(sample_states(tiny(TransEncoder), PROMPTS, Sampling((20, 9, 12), algorithm, 40)))
    assert [state.step for state in states] == list(range(41))
    canvas = states[0]
    assert [row.tolist().count(TINY.mask_id) for row in canvas.tokens()] == [15, 8, 9]
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
    seen: list[list[int]] = []
    result = sample(
        tiny(GPT), PROMPTS, Sampling(12), on_state=lambda state: seen.append([len(row) for row in state.tokens()])
    )
    assert seen[0] == [5, 1, 3] and seen[1] == [6, 2, 4] and seen[-1] == [12, 12, 12]
    assert [len(row) for row in result] == [12, 12, 12]


def test_a_full_prompt_needs_no_sampling() -> None:
    for kind in (TransEncoder, GPT):
        assert sample(tiny(kind), [[1, 2, 3]], Sampling(3))[0].tolist() == [1, 2, 3]


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
        Sampling(16, **settings)


@pytest.mark.parametrize(
    ("kind", "prompts", "settings", "words"),
    [
        (TransEncoder, [[1], [1] * 9], Sampling(8), "prompt 1 has 9 tokens, more than the context length 8"),
        (TransEncoder, [[1]], Sampling(33), "context length 33: this model reads from 1 to 32"),
        (
            TransEncoder,
            [[TINY.mask_id]],
            Sampling(8),
            "prompt 0 holds ids from 64 to 64: this model's tokens are 0 to 49",
        ),
        (TransEncoder, [], Sampling(8), "no prompt was given"),
        (TransEncoder, [[1]], Sampling((8, 9)), "2 context lengths for 1 prompts"),
        (GPT, [[]], Sampling(8), "prompt 0 is empty"),
        (GPT, [[1]], Sampling(8, cfg_scale=1.0), "needs an MDM"),
    ],
)
def test_wrong_arguments(kind: type, prompts: list, settings: Sampling, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sample_states(tiny(kind), prompts, settings)  # before any state is asked for


def test_historic_spelling() -> None:
    assert algorithm_name("greddy") == "greedy" and Sampling(8, "greddy").algorithm == "greedy"
