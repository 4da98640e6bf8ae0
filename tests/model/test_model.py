"""The two models: the original's numbers, transformers' numbers, and equivalences (padding, compile, recompute)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lit_gpt.config import Config
from lit_gpt.model.bidirectional import TransEncoder
from lit_gpt.model.causal import GPT
from lit_gpt.model.layers import Transformer
from lit_gpt.model.loss_terms import LossTerms
from tests.golden.weights import golden_cases, golden_model, golden_tokens

TINY = Config("tiny", 3, 4, 32, 64, 4, block_size=64, vocab_size=100)
GROUPED = Config("grouped", 2, 4, 32, 48, 2, block_size=64, vocab_size=100)
BOTH = pytest.mark.parametrize("kind", [GPT, TransEncoder], ids=["arm", "mdm"])


def tiny(kind: type[Transformer], config: Config = TINY, scale: float = 4.0, seed: int = 5) -> Transformer:
    """A small model whose weights are large enough that attention and MLPs matter."""
    model = kind(config)
    model.init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.eval()


def assert_same(ones: Sequence[Tensor], others: Sequence[Tensor], tolerance: float = 1e-4) -> None:
    """Equal up to float32 rounding: each difference is below the tolerance times the tensor's largest element."""
    for one, other in zip(ones, others, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def tokens(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 100, (rows, columns), generator=torch.Generator().manual_seed(seed))


def weighted_nll(
    model: Transformer, input_ids: Tensor, targets: Tensor, weights: Tensor, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The model's loss on terms that are scored wherever they have a weight."""
    return model.weighted_nll(
        LossTerms(input_ids, targets, weights, weights != 0, visibility=model.visibility.padded(key_mask))
    )


# Golden numbers of the original


def golden_ids(case: dict) -> Tensor:
    rows, columns = case["shape"]
    return torch.tensor(golden_tokens(rows * columns, case["tokens_seed"])).view(rows, columns)


@pytest.mark.parametrize(
    ("name", "kind"), [("mdm_logits", TransEncoder), ("mdm_logits_long", TransEncoder), ("arm_logits", GPT)]
)
@torch.no_grad()
def test_golden_logits(name: str, kind: type[Transformer]):
    case = golden_cases()[name]
    ids = golden_ids(case)
    if case["masked_every_third"]:
        ids[:, 1::3] = 32000
    logits = golden_model(kind, case["weights_seed"], case["model"])(ids)
    picked = logits[:, case["positions"]][:, :, case["columns"]]
    torch.testing.assert_close(picked, torch.tensor(case["logits"]), rtol=0, atol=1e-3)
    torch.testing.assert_close(logits.logsumexp(-1), torch.tensor(case["logsumexp"]), rtol=0, atol=1e-3)


def test_golden_mdm_loss_and_gradients():
    case = golden_cases()["mdm_loss"]
    targets, (rows, columns) = golden_ids(case), case["shape"]
    p_mask = torch.tensor(case["p_mask"])[:, None]
    # The file's rule: (flat_index * 7919 % 10) < [3, 8][row % 2].
    flat = torch.arange(rows * columns).view(rows, columns)
    mask = (flat * 7919 % 10) < torch.tensor([3, 8])[torch.arange(rows) % 2][:, None]
    model = golden_model(TransEncoder, case["weights_seed"], case["model"])
    noisy_input = torch.where(mask, model.config.mask_id, targets)
    total, nll, scored = weighted_nll(model, noisy_input, targets, mask / p_mask / (rows * columns))
    total.backward()
    assert total.item() == pytest.approx(case["loss"], rel=1e-4)
    assert scored.tolist() == mask.flatten().nonzero().squeeze(1).tolist()
    assert nll.shape == scored.shape
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(case["grad_norms"], rel=1e-4)
    assert math.hypot(*norms.values()) == pytest.approx(case["total_norm"], rel=1e-4)


def test_golden_arm_loss():
    case = golden_cases()["arm_loss"]
    ids = golden_ids(case)
    model = golden_model(GPT, case["weights_seed"], case["model"])
    inputs, targets = ids[:, :-1], ids[:, 1:]
    total, _, _ = weighted_nll(model, inputs, targets, torch.full(targets.shape, 1 / targets.numel()))
    assert total.item() == pytest.approx(case["loss"], rel=1e-4)


# The checkpoint's names and shapes


@BOTH
def test_state_dict_keys_and_shapes(kind: type[Transformer]):
    expected = {
        "lm_head.weight": (32000, 256),
        "transformer.wte.weight": (32001 if kind is TransEncoder else 32000, 256),
        "transformer.ln_f.weight": (256,),
    }
    for n in range(6):
        expected |= {
            f"transformer.h.{n}.norm_1.weight": (256,),
            f"transformer.h.{n}.attn.attn.weight": (768, 256),
            f"transformer.h.{n}.attn.proj.weight": (256, 256),
            f"transformer.h.{n}.norm_2.weight": (256,),
            f"transformer.h.{n}.mlp.swiglu.w1.weight": (1024, 256),
            f"transformer.h.{n}.mlp.swiglu.w2.weight": (1024, 256),
            f"transformer.h.{n}.mlp.swiglu.w3.weight": (256, 1024),
        }
    assert {key: tuple(value.shape) for key, value in kind.from_name(6).state_dict().items()} == expected


@BOTH
@pytest.mark.parametrize("config", [TINY, GROUPED, Config.from_name(19), Config.from_name(75)], ids=lambda c: c.name)
def test_parameters_are_as_many_as_the_config_says(kind: type[Transformer], config: Config):
    with torch.device("meta"):
        model = kind(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    ends = (model.embedding_rows(config) + config.padded_vocab_size) * config.n_embd
    assert count == config.non_embedding_params + ends


# transformers' LLaMA as a witness


def llama_with_weights_of(model: Transformer):
    """A transformers LlamaForCausalLM with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.transformer.wte.num_embeddings,
            hidden_size=config.n_embd,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_query_groups,
            max_position_embeddings=config.block_size,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=False,
            attn_implementation="eager",
            pad_token_id=None,
        )
    )
    ours, size = model.state_dict(), config.head_size
    state = {
        "model.embed_tokens.weight": ours["transformer.wte.weight"],
        "model.norm.weight": ours["transformer.ln_f.weight"],
        "lm_head.weight": torch.zeros(model.transformer.wte.num_embeddings, config.n_embd),
    }
    state["lm_head.weight"][: config.padded_vocab_size] = ours["lm_head.weight"]
    per_group = config.n_head // config.n_query_groups
    for n in range(config.n_layer):
        mine, theirs = f"transformer.h.{n}.", f"model.layers.{n}."
        groups = ours[mine + "attn.attn.weight"].view(config.n_query_groups, per_group + 2, size, -1)
        state |= {
            theirs + "self_attn.q_proj.weight": groups[:, :-2].reshape(config.n_head * size, -1),
            theirs + "self_attn.k_proj.weight": groups[:, -2].reshape(config.n_query_groups * size, -1),
            theirs + "self_attn.v_proj.weight": groups[:, -1].reshape(config.n_query_groups * size, -1),
            theirs + "self_attn.o_proj.weight": ours[mine + "attn.proj.weight"],
            theirs + "mlp.gate_proj.weight": ours[mine + "mlp.swiglu.w1.weight"],
            theirs + "mlp.up_proj.weight": ours[mine + "mlp.swiglu.w2.weight"],
            theirs + "mlp.down_proj.weight": ours[mine + "mlp.swiglu.w3.weight"],
            theirs + "input_layernorm.weight": ours[mine + "norm_1.weight"],
            theirs + "post_attention_layernorm.weight": ours[mine + "norm_2.weight"],
        }
    llama.load_state_dict(state)
    return llama.eval()


FLOAT_TINY = Config("tiny", 3, 4, 32, 64, 4, block_size=64, vocab_size=100, rope_table_dtype="float32")
FLOAT_GROUPED = Config("grouped", 2, 4, 32, 48, 2, block_size=64, vocab_size=100, rope_table_dtype="float32")


@BOTH
@pytest.mark.parametrize("config", [FLOAT_TINY, FLOAT_GROUPED], ids=lambda config: config.name)
@torch.no_grad()
def test_parity_with_transformers(kind: type[Transformer], config: Config):
    model = tiny(kind, config)
    ids = tokens(2, 48)
    ids[:, ::3] = model.embedding_rows(config) - 1
    # A mask of zeros (B, 1, T, T) to be added to the scores takes transformers' causal mask away.
    everything = None if kind is GPT else torch.zeros(2, 1, 48, 48)
    theirs = llama_with_weights_of(model)(ids, attention_mask=everything).logits[..., : config.padded_vocab_size]
    ours = model(ids)
    assert ours.std() > 0.5  # the weights are no trifle
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@torch.no_grad()
def test_parity_with_transformers_with_golden_weights_at_size_6():
    case = golden_cases()["arm_logits"]
    rounded = golden_model(GPT, case["weights_seed"], 6)
    model = GPT.from_name(6, rope_table_dtype="float32").eval()
    model.load_state_dict(rounded.state_dict())
    ids = torch.tensor(golden_tokens(64, 3)).view(1, 64)
    theirs = llama_with_weights_of(model)(ids).logits
    torch.testing.assert_close(model(ids), theirs, rtol=0, atol=1e-4)
    # The rounding of the tables is what makes the published models differ from transformers'.
    assert 1e-3 < (rounded(ids) - theirs).abs().max() < 0.5


# Causality


@torch.no_grad()
def test_only_the_arm_is_causal():
    ids = tokens(1, 12)
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % 100
    arm, mdm = tiny(GPT), tiny(TransEncoder)
    same = (arm(ids) - arm(changed)).abs().amax(-1)[0] == 0
    assert same.tolist() == [True] * 7 + [False] * 5
    assert ((mdm(ids) - mdm(changed)).abs().amax(-1) > 0).all()


# Batch-mates and padding


@BOTH
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch_mates(kind: type[Transformer], side: str):
    model = tiny(kind)
    rows = [tokens(1, length, seed=length)[0] for length in (9, 4, 1)]
    alone = [model(row[None])[0] for row in rows]
    starts = [9 - len(row) if side == "left" else 0 for row in rows]
    ids, positions = torch.full((3, 9), 77), torch.zeros(3, 9, dtype=torch.int64)
    key_mask = torch.zeros(3, 9, dtype=torch.bool)
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        part = slice(start, start + len(row))
        ids[index, part], positions[index, part], key_mask[index, part] = row, torch.arange(len(row)), True
    together = model(ids, positions, model.visibility.padded(key_mask))
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        assert_same([together[index, start : start + len(row)]], [alone[index]])


@BOTH
def test_loss_ignores_what_lies_in_padding(kind: type[Transformer]):
    model = tiny(kind)
    ids, targets = tokens(2, 10), tokens(2, 10, seed=1)
    key_mask = torch.arange(10)[None, :] < torch.tensor([[10], [6]])
    weights = key_mask * torch.tensor([[0.5], [0.25]])
    other = torch.where(key_mask, ids, (ids + 1) % 100)
    one, nll, scored = weighted_nll(model, ids, targets, weights, key_mask)
    two, _, _ = weighted_nll(model, other, targets, weights, key_mask)
    assert_same([two], [one])
    assert len(nll) == len(scored) == 16


@BOTH
def test_weighted_nll_equals_the_loss_over_all_logits(kind: type[Transformer]):
    model = tiny(kind)
    ids, targets = tokens(2, 10), tokens(2, 10, seed=1)
    weights = torch.rand(2, 10, generator=torch.Generator().manual_seed(0))
    weights[weights < 0.5] = 0
    total, nll, scored = weighted_nll(model, ids, targets, weights)
    total.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    everywhere = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="none")
    expected = torch.autograd.grad((everywhere * weights.flatten()).sum(), list(model.parameters()))
    assert_same([total, nll, *gradients], [(everywhere * weights.flatten()).sum(), everywhere[scored], *expected])


@BOTH
def test_loss_over_nothing_is_zero_and_trains(kind: type[Transformer]):
    model = tiny(kind)
    total, nll, scored = weighted_nll(model, tokens(2, 4), tokens(2, 4), torch.zeros(2, 4))
    total.backward()
    assert total.item() == 0
    assert nll.numel() == scored.numel() == 0
    # Every parameter has its gradient, else a data-parallel step would wait for it.
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


# Ways of computing the same


@BOTH
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_activations_changes_nothing(kind: type[Transformer], compiled: bool):
    model = tiny(kind)
    model.compile_blocks(compiled)
    ids, weights = tokens(2, 10), torch.ones(2, 10)
    results = []
    for model.checkpoint_blocks in (False, True, "selective"):
        model.zero_grad()
        total, _, _ = weighted_nll(model, ids, ids, weights, weights.bool())
        total.backward()
        results.append([total.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@BOTH
def test_compiled_blocks_change_nothing(kind: type[Transformer]):
    model = tiny(kind)
    ids, weights = tokens(2, 10), torch.ones(2, 10)
    results = []
    for compiled in (False, True):
        model.compile_blocks(compiled)
        model.zero_grad()
        total, _, _ = weighted_nll(model, ids, ids, weights)
        total.backward()
        results.append([total.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    model.compile_blocks(False)
    assert_same(results[1], results[0])


@BOTH
def test_bf16_autocast_is_close_and_keeps_float32_gradients(kind: type[Transformer]):
    model = tiny(kind, scale=1.0)
    ids, weights = tokens(2, 10), torch.full((2, 10), 1 / 20)
    exact, _, _ = weighted_nll(model, ids, ids, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, nll, _ = weighted_nll(model, ids, ids, weights)
    total.backward()
    assert total.dtype == nll.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=2e-2)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


# Limits


@BOTH
def test_input_longer_than_the_block_is_refused(kind: type[Transformer]):
    with pytest.raises(ValueError, match="65 tokens.*at most 64"):
        tiny(kind)(tokens(1, 65))


# Initialisation


@BOTH
def test_initial_weights_have_the_published_law(kind: type[Transformer]):
    model = kind.from_name(6)
    model.init_weights(3407)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all()
            continue
        residual = name.endswith(("attn.proj.weight", "w3.weight"))
        std = 1 / (math.sqrt(256) * 6) if residual else math.sqrt(2 / (5 * 256))
        z = parameter.detach() / std
        # Five standard errors of a normal sample's mean, variance and kurtosis.
        error = 5 / math.sqrt(z.numel())
        assert abs(z.mean()) < error, name
        assert abs(z.var() - 1) < error * math.sqrt(2), name
        assert abs(z.pow(4).mean() - 3) < error * math.sqrt(96), name


def test_initial_weights_follow_the_seed_and_the_name():
    models = []
    for seed in (1, 1, 2, 1 + 2**32):
        model = GPT(TINY)
        model.init_weights(seed)
        models.append(model.state_dict())
    first, again, other, far = models
    for name in first:
        assert torch.equal(first[name], again[name])
        if first[name].dim() > 1:
            # Seeds that agree in their lower 32 bits are different seeds too.
            assert not torch.equal(first[name], other[name])
            assert not torch.equal(first[name], far[name])
    w1, w2 = (first[f"transformer.h.0.mlp.swiglu.{name}.weight"] for name in ("w1", "w2"))
    assert not torch.equal(w1, w2)
    # Both models start from the same numbers where they have the same parameters.
    mdm = TransEncoder(TINY)
    mdm.init_weights(1)
    assert torch.equal(mdm.lm_head.weight, first["lm_head.weight"])


def test_initial_weights_ignore_the_global_generator():
    torch.manual_seed(0)
    one = GPT(TINY)
    one.init_weights(1)
    state = torch.get_rng_state()
    two = GPT(TINY)
    torch.manual_seed(7)
    two.init_weights(1)
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    torch.manual_seed(7)
    expected = torch.get_rng_state()
    two.init_weights(1)
    assert torch.equal(torch.get_rng_state(), expected)
    assert not torch.equal(state, expected)


@BOTH
@pytest.mark.parametrize("config", [TINY, GROUPED], ids=lambda config: config.name)
@pytest.mark.parametrize("masked", [False, True])
def test_some_columns_are_those_of_the_whole(kind: type[Transformer], config: Config, masked: bool):
    """The last block computed for a few positions alone gives what it gives for all."""
    model = tiny(kind, config)
    ids = torch.randint(100, (3, 12), generator=torch.Generator().manual_seed(1))
    columns = torch.tensor([[0, 5, 11], [3, 3, 4], [7, 8, 9]])
    key_mask = torch.arange(12) < torch.tensor([[12], [9], [10]]) if masked else None
    positions = torch.arange(12).expand(3, -1) + torch.tensor([[0], [2], [5]]) if masked else None
    with torch.no_grad():
        visibility = model.visibility.padded(key_mask)
        whole = model.hidden_states(ids, positions, visibility)
        some = model.hidden_states(ids, positions, visibility, columns=columns)
    torch.testing.assert_close(
        some, whole.gather(1, columns[..., None].expand(-1, -1, whole.size(2))), rtol=1e-5, atol=1e-5
    )
