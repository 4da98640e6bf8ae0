"""`load_model`: texts to likelihoods and texts, as the evaluations and samplers compute them from tokens."""

from __future__ import annotations

import re

import pytest
import torch

from lit_gpt import load_model
from lit_gpt.checkpoints.export import WeightsRecord, export_weights
from lit_gpt.checkpoints.loaded import LoadedModel
from lit_gpt.sampling.infill import infill_row
from lit_gpt.sampling.sample import sample
from lit_gpt.sampling.settings import Sampling
from tests.support.small_models import export_arm_and_mdm


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, LoadedModel]:
    """An ARM and an MDM with random weights, opened."""
    paths = export_arm_and_mdm(tmp_path_factory.mktemp("models"), embedding_scale=8)
    return {kind: load_model(paths[kind]) for kind in ("arm", "mdm")}


def test_what_is_behind_it(models):
    for kind, model in models.items():
        assert (model.kind, model.model.kind, model.device.type, model.dtype) == (kind, kind, "cpu", "float32")
        identity = model.identity()
        assert list(identity) == ["checkpoint", "kind", "config", "tokenizer", "dtype"]
        assert identity["tokenizer"] == model.tokenizer.fingerprint and len(identity["checkpoint"]) == 64
        assert model.tokenizer is model.tokenizer
        with model.autocast():
            assert not torch.is_autocast_enabled("cpu")


def test_bfloat16_is_autocast_around_matrices_that_are_rounded_once(tmp_path):
    path = export_arm_and_mdm(tmp_path)["mdm"]
    model = load_model(path, device="cpu", dtype="bfloat16")
    with model.autocast():
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    for name, parameter in model.model.named_parameters():
        kept = name == "transformer.wte.weight" or parameter.dim() == 1
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    # Rounded before or by autocast in every pass: the same bits.
    wide, ids = load_model(path, dtype="float32").model, torch.arange(1, 33)[None]
    with model.autocast(), torch.no_grad():
        assert model.model(ids).equal(wide(ids))
        columns = torch.tensor([[0, 5, 31]])
        assert model.model.hidden_states(ids, columns=columns).equal(wide.hidden_states(ids, columns=columns))
    exact = load_model(path, dtype="float32").loglikelihood("To be", " or not").nats
    assert model.loglikelihood("To be", " or not").nats == pytest.approx(exact, rel=0.02)
    assert model.identity() | {"dtype": "float32"} == load_model(path).identity()


# --- likelihoods ------------------------------------------------------------------------------------------------------


def test_an_arms_likelihood_by_hand(models):
    model = models["arm"]
    prefix = model.prompt_ids("To be, or")
    ids = torch.tensor(model.prompt_ids("To be, or not to be"))
    with torch.no_grad():
        log_p = model.model(ids[None, :-1])[0].log_softmax(-1)
    by_hand = sum(float(log_p[at - 1, ids[at]]) for at in range(len(prefix), len(ids)))
    for before, behind in (("To be, or", " not to be"), ("To be, or ", "not to be")):
        result = model.loglikelihood(before, behind)
        assert result.nats == pytest.approx(by_hand, abs=1e-3) and result.standard_error == 0


def test_an_mdms_likelihood_by_hand(models):
    """The chain rule: token j is predicted with the tokens from j on masked."""
    model = models["mdm"]
    prefix, target = model.encode_pair("To be, or", " not to be")
    total = 0.0
    for number, token in enumerate(target):
        masks = [model.model.config.mask_id] * (len(target) - number)
        with torch.no_grad():
            logits = model.model(torch.tensor([prefix + target[:number] + masks]))[0, len(prefix) + number]
        total += float(logits.log_softmax(-1)[token])
    result = model.loglikelihood("To be, or", " not to be", estimator="chain_rule")
    assert result.nats == pytest.approx(total, abs=1e-3) and result.standard_error == 0


def test_estimators_agree_within_their_errors(models):
    words = ("To be, or not to be,", " that is the question: whether it is nobler in the mind")
    exact = models["mdm"].loglikelihood(*words, budget=512)
    drawn = models["mdm"].loglikelihood(*words, estimator="mc", mc_num=2048)
    assert 0 < exact.standard_error < drawn.standard_error
    assert abs(exact.nats - drawn.nats) < 4 * (exact.standard_error + drawn.standard_error)
    assert models["mdm"].loglikelihood(*words, estimator="mc", mc_num=64, seed=1) != models["mdm"].loglikelihood(
        *words, estimator="mc", mc_num=64, seed=2
    )
    assert models["mdm"].loglikelihood("To be", "").nats == 0


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["arm", "mdm"])
@pytest.mark.parametrize("prompt", ["My lord,", "", "two  spaces \n"])
def test_generated_text_goes_on_from_the_prompt(models, kind, prompt):
    """It is what the sampler writes behind the prompt's tokens, leading space included."""
    model = models[kind]
    settings = {"steps": 12, "temperature": 0.7, "seed": 3}
    text = model.generate(prompt, max_new_tokens=12, **settings)
    assert text == model.generate(prompt, max_new_tokens=12, **settings) and "[MASK]" not in text
    assert text != model.generate(prompt, max_new_tokens=12, **settings | {"seed": 4})
    row = model.tokenizer.encode_ids(prompt) or [model.tokenizer.bos_id] * (kind == "arm")
    (ids,) = sample(model.model, [row], Sampling(**settings), len(row) + 12, model.tokenizer.eos_id)
    assert prompt + text == model.tokenizer.decode(row + model.until_end(ids.tolist()[len(row) :]))


def test_generation_fills_what_the_model_reads(models):
    text = models["mdm"].generate("My lord,", steps=4)
    assert len(text) > 100


def test_gaps_are_filled_and_the_rest_stays(models):
    model = models["mdm"]
    text = model.fill("The ___2 is my ___3.", steps=5, seed=2)
    assert re.fullmatch(r"The.* is my.*\.", text, re.DOTALL) and "_" not in text
    config = model.model.config
    row = infill_row("The ___2 is my ___3.", model.tokenizer, config.mask_id, config.block_size)
    assert row.count(config.mask_id) == 5
    longer = model.fill("A ___ B", gap=20, steps=2)
    assert len(longer) > len(model.fill("A ___ B", gap=1, steps=2))


@pytest.mark.parametrize("kind", ["arm", "mdm"])
def test_states_are_computed_in_autocast_and_looked_at_without(tmp_path, monkeypatch, kind):
    model = load_model(export_arm_and_mdm(tmp_path)[kind], device="cpu", dtype="bfloat16")
    real, passes = type(model.model).hidden_states, []

    def watched(*args, **kwargs):
        passes.append(torch.is_autocast_enabled("cpu"))
        return real(*args, **kwargs)

    monkeypatch.setattr(type(model.model), "hidden_states", watched)
    row = model.tokenizer.encode_ids("To be")
    states = []
    for state in model.states(row, len(row) + 6, Sampling(steps=6, temperature=0.7)):
        states.append(state)
        assert not torch.is_autocast_enabled("cpu")
    assert passes and all(passes)
    text = model.tokenizer.decode(row + model.until_end(states[-1].tokens()[0].tolist()[len(row) :]))
    assert text == "To be" + model.generate("To be", 6, steps=6, temperature=0.7)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_say_what_helps(models, tmp_path):
    with pytest.raises(ValueError, match="prefix and target have 402 tokens, this model reads at most 128"):
        models["mdm"].loglikelihood("word " * 100, "word " * 100)
    with pytest.raises(ValueError, match="mc_num: the estimator exact has only budget"):
        models["mdm"].loglikelihood("a", "b", mc_num=5)
    with pytest.raises(ValueError, match="budget: the estimator chain_rule has no parameters$"):
        models["mdm"].loglikelihood("a", "b", estimator="chain_rule", budget=5)
    with pytest.raises(ValueError, match="estimator 'guess' is unknown: choose from mc, chain_rule, exact"):
        models["mdm"].loglikelihood("a", "b", estimator="guess")
    with pytest.raises(ValueError, match="cannot fill gaps"):
        models["arm"].fill("a ___ b")
    with pytest.raises(ValueError, match="this model reads from 1 to 128"):
        models["mdm"].generate("a", max_new_tokens=500)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_model(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="dtype half: choose from auto, float32, bfloat16"):
        load_model(tmp_path / "nothing.safetensors", dtype="half")


def test_a_missing_tokenizer_is_said_when_it_is_needed(tmp_path, models):
    model = models["arm"].model
    record = WeightsRecord("arm", model.config, {"source": "nowhere/tokenizer"})
    path = export_weights(tmp_path, "older", model.state_dict(), record)
    loaded = load_model(path)
    assert loaded.kind == "arm"
    with pytest.raises(FileNotFoundError, match="which the checkpoint was trained with; --tokenizer FOLDER, or token"):
        loaded.generate("a")
    given = models["arm"].tokenizer.source
    assert load_model(path, tokenizer=given).generate("a", 8, seed=1) == models["arm"].generate("a", 8, seed=1)
