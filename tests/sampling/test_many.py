"""Many prompts at once: the tokens of each alone, whatever the batch, in fewer forward passes than batches need."""

from __future__ import annotations

import random

import pytest
import torch

from lit_gpt.config import Config
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.sampling.many import sample_many
from lit_gpt.sampling.sample import sample
from lit_gpt.sampling.sequence import SampleRequest
from lit_gpt.sampling.settings import Sampling
from lit_gpt.sampling.slots import SlotCache
from tests.support.gpus import DEVICES
from tests.support.small_models import scaled_model

CONFIG = Config("tiny", 2, 4, 32, 64, 2, block_size=64, vocab_size=50)
STOP = 2


def requests_of(count: int, seed: int = 1) -> list[SampleRequest]:
    """Prompts and texts of very different lengths."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, 50) for _ in range(rng.choice([1, 2, 5, 20]))] for _ in range(count)]
    return [SampleRequest(prompt, len(prompt) + rng.choice([1, 3, 12, 40]), 7 * n) for n, prompt in enumerate(prompts)]


def alone(model, request: SampleRequest, sampling: Sampling) -> list[int]:
    (ids,) = sample(model, [request.prompt], sampling, request.length, STOP, [request.row])
    return ids.tolist()[len(request.prompt) :]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [GPT, TransEncoder])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_those_of_each_alone(kind, temperature, device):
    model = scaled_model(kind, CONFIG).to(device)
    requests = [*requests_of(17), SampleRequest([5, 6], 2, 3)]
    how = Sampling(steps=8, temperature=temperature, min_new_tokens=2)
    expected = {number: alone(model, request, how) for number, request in enumerate(requests)}
    assert len({len(new) for new in expected.values()}) > 4, "rows end at different steps"
    for batch_tokens in (1, 150, 300, 5000):
        assert dict(sample_many(model, requests, how, STOP, batch_tokens)) == expected, batch_tokens
    assert not list(sample_many(model, [], how, STOP, 100))


MDM_SETTINGS = {
    "threshold": {"algorithm": "threshold", "threshold": 0.3},
    "blocks": {"block_length": 4, "steps": 12, "algorithm": "entropy", "entropy_bound": 2.0},
    "remask": {"remask": 0.2},
    "steps per token": {"steps_per_token": 0.5, "algorithm": "greedy"},
    "guidance, early stop": {"cfg_scale": 0.5, "early_stop": True},
    "cache": {"block_length": 4, "cache": "dual", "refresh": 1},
}


@pytest.mark.parametrize("name", MDM_SETTINGS)
def test_rows_of_an_mdm_take_each_others_places(name, monkeypatch):
    """Rows of different lengths and steps, joined in the middle of the others: the tokens of each alone."""
    model = scaled_model(TransEncoder, CONFIG)
    how = Sampling(**{"steps": 6, **MDM_SETTINGS[name]})
    requests = requests_of(13, seed=2)
    expected = {number: alone(model, request, how) for number, request in enumerate(requests)}
    passes = counted(model, monkeypatch)
    longest = max(request.length for request in requests)
    assert dict(sample_many(model, requests, how, STOP, 4 * longest)) == expected
    assert 1 < max(rows for rows, _ in passes) <= (4 if how.cache == "none" else 13)


def test_an_mdms_batch_is_filled_again(monkeypatch):
    """Rows of 4 and of 30 steps, four at a time: the short ones do not wait for the long one."""
    model = scaled_model(TransEncoder, CONFIG)
    requests = [SampleRequest([5] * (1 if n == 3 else 15) + [n], 32 if n == 3 else 20, n) for n in range(3, 31)]
    how = Sampling("greedy", steps_per_token=1.0)
    expected = {number: alone(model, request, how) for number, request in enumerate(requests)}
    passes = counted(model, monkeypatch)
    assert dict(sample_many(model, requests, how, STOP, 4 * 32)) == expected
    # Three slots write the 27 short ones, nine times four steps, while the fourth writes the long one.
    assert len(passes) <= 37 < 30 + 6 * 4


def counted(model, monkeypatch, most_rows: int | None = None) -> list[tuple[int, int]]:
    """A list that grows by (rows, columns) of each forward pass; the device has room for so many rows."""
    passes: list[tuple[int, int]] = []
    whole = model.hidden_states

    def hidden_states(ids, *rest, **named):
        passes.append(tuple(ids.shape))
        if most_rows is not None and len(ids) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(ids, *rest, **named)

    monkeypatch.setattr(model, "hidden_states", hidden_states)
    return passes


def test_a_finished_rows_place_is_taken_by_the_next(monkeypatch):
    """Four slots, one text of 40 tokens among many short ones: while it is written, all the others are."""
    model = scaled_model(GPT, CONFIG)
    requests = [SampleRequest([5] * (1 if n == 3 else 19) + [n], 42 if n == 3 else 24, n) for n in range(3, 31)]
    how = Sampling(temperature=1.0)
    expected = {number: alone(model, request, how) for number, request in enumerate(requests)}
    passes = counted(model, monkeypatch)
    found = list(sample_many(model, requests, how, STOP, 4 * 42))
    assert dict(found) == expected and max(rows for rows, _ in passes) == 4
    # The long one finishes last or nearly so, though it began first.
    steps = [rows for rows, columns in passes if columns == 1]
    assert len(steps) <= 45 < sum(max(len(expected[n]) for n in range(at, at + 4)) for at in range(0, 28, 4))
    # Empty slots are given up where nobody waits.
    assert len(expected[0]) >= 20
    assert steps[-1] == 1


def test_a_pass_of_an_arms_slots_waits_for_the_device_once(monkeypatch):
    model, waits = scaled_model(GPT, CONFIG), []
    # `int()` is asked of numbers that were made on the host.
    for name in ("tolist", "item", "cpu", "__bool__"):
        whole = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *rest, whole=whole: waits.append(1) or whole(self, *rest))
    passes = counted(model, monkeypatch)
    requests = [SampleRequest([5, 6], 34, row) for row in range(4)]
    list(sample_many(model, requests, Sampling(min_new_tokens=100), STOP, 4 * 34))
    assert len(passes) == 32 and len(waits) <= len(passes)


@pytest.mark.parametrize("kind", [GPT, TransEncoder])
def test_short_rows_do_not_take_the_places_of_a_long_one(kind, monkeypatch):
    """One row of 60 tokens and 24 of 6, in batches of 120: no short row is read in columns of the long one."""
    model = scaled_model(kind, CONFIG)
    requests = [SampleRequest([5] * 50, 60, 0), *(SampleRequest([5, n], 6, n) for n in range(3, 27))]
    how = Sampling("greedy", steps_per_token=1.0, temperature=0.0, min_new_tokens=50)
    expected = {number: alone(model, request, how) for number, request in enumerate(requests)}
    passes = counted(model, monkeypatch)
    assert dict(sample_many(model, requests, how, STOP, 120)) == expected
    # An MDM reads each row whole in each of its steps; an ARM each token once, in as few passes.
    most = 10 * 60 + 24 * 4 * 6 if kind is TransEncoder else 60 + 24 * 6
    assert sum(rows * columns for rows, columns in passes) <= most
    assert max(rows * columns for rows, columns in passes) <= 120 and len(passes) <= 10 + 2 * 4


def test_rows_end_where_their_text_is_decided(monkeypatch):
    model = scaled_model(GPT, CONFIG)
    how = Sampling(temperature=1.0)
    plain = [SampleRequest([5, n], 42, n) for n in range(3, 11)]
    expected = [alone(model, request, how)[:5] for request in plain]
    decided = [SampleRequest(one.prompt, one.length, one.row, lambda new: len(new) >= 5) for one in plain]
    passes = counted(model, monkeypatch)
    found = dict(sample_many(model, decided, how, STOP, 5000))
    assert [found[number] for number in range(8)] == expected and len(passes) <= 5


@pytest.mark.parametrize("kind", [GPT, TransEncoder])
def test_memory_that_runs_out_halves_the_batch(kind, monkeypatch):
    model = scaled_model(kind, CONFIG)
    requests = requests_of(11)
    how = Sampling(steps=4, temperature=1.0)
    expected = {number: alone(model, request, how) for number, request in enumerate(requests)}
    with monkeypatch.context() as patched:
        passes = counted(model, patched, most_rows=3)
        assert dict(sample_many(model, requests, how, STOP, 11 * 64)) == expected
        assert 1 <= sum(rows > 3 for rows, _ in passes) <= 4
    counted(model, monkeypatch, most_rows=0)
    with pytest.raises(ValueError, match="a row of .* tokens does not fit into the memory of cpu"):
        list(sample_many(model, requests, how, STOP, 11 * 64))


def test_memory_that_runs_out_before_the_first_pass_halves_the_batch(monkeypatch):
    """An ARM's slots take their memory when they begin."""
    model = scaled_model(GPT, CONFIG)
    requests = [SampleRequest([5, n], 10, n) for n in range(3, 13)]
    how = Sampling(temperature=1.0)
    expected = {number: alone(model, request, how) for number, request in enumerate(requests)}
    begun, room = [], [3]
    whole = SlotCache.__init__

    def init(self, model, slots, capacity):
        begun.append(slots)
        if slots > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        whole(self, model, slots, capacity)

    monkeypatch.setattr(SlotCache, "__init__", init)
    assert dict(sample_many(model, requests, how, STOP, 100)) == expected and begun == [10, 5, 2]
    room[0] = 0
    with pytest.raises(ValueError, match="a row of 10 tokens does not fit into the memory of cpu"):
        list(sample_many(model, requests, how, STOP, 100))


def test_a_broken_model_writes_nothing():
    model = scaled_model(GPT, CONFIG)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="no finite numbers"):
        list(sample_many(model, requests_of(3), Sampling(), STOP, 100))
