"""What the harness's `generate_until` asks for, and how much of it is computed."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_gpt.evaluation.harness_generation import TextEnd, cut_text
from lit_gpt.evaluation.lm_adapter import Adapter
from lit_gpt.evaluation.settings import read_model_args
from lit_gpt.tokenizer import Tokenizer
from tests.support.small_models import export_arm_and_mdm

KINDS = ["arm", "mdm"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """An ARM and an MDM with random weights that read 128 tokens, their tokenizer beside them."""
    return export_arm_and_mdm(tmp_path_factory.mktemp("models"), embedding_scale=8)


def adapter(models, kind: str, **settings) -> Adapter:
    return Adapter(kind, read_model_args(kind, {"ckpt_path": str(models[kind]), **settings}), None, ["evaluate"])


def asked(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


def passes_of(model: Adapter, monkeypatch) -> list[int]:
    """A list that grows by the rows of each forward pass."""
    passes: list[int] = []
    whole = model.loaded.model.hidden_states
    monkeypatch.setattr(
        model.loaded.model,
        "hidden_states",
        lambda ids, *rest, **named: passes.append(len(ids)) or whole(ids, *rest, **named),
    )
    return passes


# --- what fits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_kept_where_too_much_is_asked(models, kind, capsys):
    """As MMLU-Pro and AIME ask: as many new tokens as the model reads, or more."""
    model = adapter(models, kind)
    prompt = "Speak, speak. " * 10
    tokens = len(model.loaded.prompt_ids(prompt))
    assert 60 < tokens < 100
    for wanted in (128, 2048):
        request = model._writer.request(prompt, {"max_gen_toks": wanted}, 0)
        assert request.prompt == model.loaded.prompt_ids(prompt) and request.length == 128
    long = prompt * 3
    request = model._writer.request(long, {"max_gen_toks": 2048}, 0)
    assert request.prompt == model.loaded.prompt_ids(long)[-112:] and request.length == 128
    # A prompt that leaves room for less than a few words gives way to what was asked for, and no more.
    request = model._writer.request(long, {"max_gen_toks": 4}, 0)
    assert request.prompt == model.loaded.prompt_ids(long)[-124:] and request.length == 128
    capsys.readouterr()
    how = {"max_gen_toks": 2048, "until": []}
    model.generate_until(asked((prompt, how), (long, how), ("ROMEO:", {"max_gen_toks": 4})))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: 2 of 3 requests do not fit into 128 tokens: their new texts are shortened, to 16 tokens at least, and "
        "the beginnings of 1 contexts are left out"
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_gen_toks": 0}, "max_gen_toks is 0: at least 1 new token"),
        ({"max_tokens": "many"}, "max_tokens is 'many': expected a number"),
        ({"max_gen_toks": float("inf")}, "max_gen_toks is inf: expected a number"),
        ({"temperature": [1]}, r"temperature is \[1\]: expected a number"),
        ({"top_p": 2}, "top_p is 2.0: it must be a number from 0 to 1"),
        ({"until": ["a", 7]}, "until holds 7: expected texts"),
    ],
)
def test_what_cannot_be_is_an_error(models, settings, words):
    with pytest.raises(ValueError, match=words):
        adapter(models, "arm").generate_until(asked(("ROMEO:", settings)))


# --- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_lengths_have_several_names(models, name):
    request = adapter(models, "mdm")._writer.request("ROMEO:", {name: 7}, 0)
    assert request.length - len(request.prompt) == request.sampling.row_steps(7) == 7


def test_the_tasks_settings_go_before_the_models(models, capsys):
    model = adapter(models, "mdm", temperature=0.5, alg="origin", cfg=0.3, seed=7, steps=9)
    plain = model._writer.request("ROMEO:", {"until": None, "do_sample": None, "top_k": None}, 0)
    assert (plain.sampling.temperature, plain.sampling.top_p, plain.sampling.top_k) == (0.5, 1.0, 0)
    assert (plain.sampling.algorithm, plain.sampling.cfg_scale) == ("origin", 0.3)
    assert (plain.sampling.seed, plain.sampling.steps, plain.stop_strings) == (7, 9, ())
    given = {"temperature": 0.7, "top_p": 0.95, "top_k": 20, "do_sample": True, "until": ["\n", ""]}
    request = model._writer.request("ROMEO:", given, 0)
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.7, 0.95, 20)
    assert request.stop_strings == ("\n",)
    assert model._writer.request("ROMEO:", {**given, "do_sample": False}, 0).sampling.temperature == 0
    assert model._writer.request("ROMEO:", {"until": "\n\n"}, 0).stop_strings == ("\n\n",)
    assert model._writer.request("ROMEO:", {"top_k": -1}, 0).sampling.top_k == 0
    # Sampling without a temperature is sampling from the model.
    assert adapter(models, "arm")._writer.request("ROMEO:", {"do_sample": True}, 0).sampling.temperature == 1
    assert not capsys.readouterr().err
    for _ in range(2):
        model._writer.request("ROMEO:", {"num_beams": 1, "repetition_penalty": 1.2}, 0)
    warning = "warning: generation_kwargs: repetition_penalty=1.2 has no effect: this setting is unknown here\n"
    assert capsys.readouterr().err == warning


@pytest.mark.parametrize("kind", KINDS)
def test_filters_change_what_is_sampled(models, kind):
    """Of all tokens only the likeliest: what temperature 0 takes."""
    model = adapter(models, kind, **({} if kind == "arm" else {"alg": "origin"}))
    how = {"max_gen_toks": 12, "temperature": 1.0, "do_sample": True}
    likeliest, free, top_k, top_p = model.generate_until(
        asked(*(("ROMEO:", {**how, **more}) for more in ({"do_sample": False}, {}, {"top_k": 1}, {"top_p": 0.0})))
    )
    assert likeliest == top_k == top_p != free


# --- where a text ends ------------------------------------------------------------------------------------------------


def test_a_text_ends_before_the_stop_string_that_is_complete_first():
    assert cut_text("one two three", []) == "one two three"
    assert cut_text("one two three", ["three", "two"]) == "one "
    assert cut_text("abcdef", ["abcdef", "cd"]) == "ab"
    assert cut_text("abcdef", ["cd", "bcd"]) == "a"


def test_the_end_is_seen_with_the_token_that_completes_it(models):
    """Whatever the tokens and the pieces in which they come, the end token and bytes of one character among them."""
    tokenizer = Tokenizer(models["tokenizer"])
    silent = frozenset((tokenizer.token_bytes() == 0).nonzero()[0].tolist())
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.choice([*range(500), 1, 1]) for _ in range(30)]
        ids = [token for token in ids if token != tokenizer.eos_id]
        whole = tokenizer.decode(ids)
        at = rng.randrange(len(whole) - 4)
        stop = whole[at : at + rng.randrange(1, 5)]
        if "\ufffd" in stop:
            continue
        first = next(n for n in range(1, 31) if stop in tokenizer.decode(ids[:n]))
        ended, seen = TextEnd(tokenizer, silent, [stop]), 0
        while seen < len(ids):
            seen = min(len(ids), seen + rng.choice([1, 1, 2, 5]))
            if ended(ids[:seen]):
                break
        assert seen >= first and not (seen - first >= 5), (ids, stop)
        assert cut_text(tokenizer.decode(ids[:seen]), [stop]) == cut_text(whole, [stop])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_computed_behind_a_stop_string(models, kind, monkeypatch):
    """The same text as when it was cut afterwards, in fewer forward passes: alone and in a batch."""
    model = adapter(models, kind, batch_size=8)
    prompts = ["ROMEO:", "KING HENRY:", "My lord"]
    how = {"max_gen_toks": 40, "until": [], "temperature": 1.0}
    passes = passes_of(model, monkeypatch)
    wholes = model.generate_until(asked(*((prompt, how) for prompt in prompts)))
    all_passes, counts = len(passes), []
    for whole, prompt in zip(wholes, prompts, strict=True):
        stop = whole[6:8]
        passes.clear()
        (text,) = model.generate_until(asked((prompt, {**how, "until": stop})))
        assert text == whole.split(stop)[0]
        counts.append(len(passes))
        assert kind == "mdm" or len(passes) <= len(model.tokenizer.encode_ids(whole[:8]))
    assert sum(counts) < 3 * all_passes
    passes.clear()
    texts = model.generate_until(
        asked(*((prompt, {**how, "until": [whole[6:8], ""]}) for prompt, whole in zip(prompts, wholes, strict=True)))
    )
    assert texts == [whole.split(whole[6:8])[0] for whole in wholes]
    # The slowest text of the batch decides.
    assert len(passes) == max(counts)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_does_not_fit_is_halved(models, kind, monkeypatch):
    """A device with room for three rows."""
    wishes = asked(*((f"KING {n}:", {"max_gen_toks": 8, "temperature": 1.0}) for n in range(7)))
    expected = adapter(models, kind).generate_until(wishes)
    model = adapter(models, kind, batch_size=7)
    whole = model.loaded.model.hidden_states
    rows: list[int] = []

    def small(ids, *rest, **named):
        rows.append(len(ids))
        if len(ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(ids, *rest, **named)

    monkeypatch.setattr(model.loaded.model, "hidden_states", small)
    assert model.generate_until(wishes) == expected
    assert max(rows) == 7 and [n for n in rows if n > 3] == [7]
    monkeypatch.setattr(
        model.loaded.model, "hidden_states", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("none"))
    )
    with pytest.raises(ValueError, match="a row of .* tokens does not fit into the memory of cpu"):
        model.generate_until(wishes[:1])
