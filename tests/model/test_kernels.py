"""Every kernel against its formula written plainly in float64, values and gradients; and the loss against torch's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.model import kernels
from lit_gpt.model.visibility import Visibility
from tests.support.gpus import DEVICES

CPU = torch.device("cpu")


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(torch.get_default_device())


@pytest.fixture(params=DEVICES)
def default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """New tensors are on a CPU, or on a GPU."""
    with torch.device(request.param):
        yield


on_devices = pytest.mark.usefixtures("default_device")


def check(kernel, formula, *inputs: Tensor, tolerance: float = 2e-5) -> None:
    """The kernel in float32 gives the formula's values and gradients (inputs and formula in float64)."""
    narrow = [x.float().requires_grad_() for x in inputs]
    wide = [x.clone().requires_grad_() for x in inputs]
    got, expected = kernel(*narrow), formula(*wide)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    upstream = rand(*got.shape, seed=99)
    got.backward(upstream.float())
    expected.backward(upstream)
    for ours, exact in zip(narrow, wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


# RMSNorm, SwiGLU, rotary


@on_devices
def test_rms_norm():
    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    check(lambda x, weight: kernels.rms_norm(x, weight, 1e-5), formula, rand(2, 5, 16), rand(16))


def test_rms_norm_of_zeros_is_finite():
    x = torch.zeros(1, 8, requires_grad=True)
    kernels.rms_norm(x, torch.ones(8), 1e-5).sum().backward()
    assert x.grad.isfinite().all()


@on_devices
def test_swiglu():
    check(kernels.swiglu, lambda gate, up: gate / (1 + torch.exp(-gate)) * up, rand(3, 9), rand(3, 9, seed=1))


@on_devices
@pytest.mark.parametrize("per_row", [False, True])
def test_rotary(per_row: bool):
    angles = rand(2, 1, 5, 4) if per_row else rand(5, 4)
    cos, sin = angles.cos(), angles.sin()

    def formula(x: Tensor) -> Tensor:
        # As complex numbers: (x1 + i x2) e^(i angle).
        turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    check(lambda x: kernels.rotary(x, cos.float(), sin.float()), formula, rand(2, 3, 5, 8))


# Attention


def plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None) -> Tensor:
    """Head by head, with every row's keys listed."""
    batch, heads, length, size = q.shape
    groups, keys = k.shape[1:3]
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                seen = [
                    j
                    for j in range(keys)
                    if (not causal or j <= keys - length + i) and (key_mask is None or key_mask[b, j])
                ]
                g = h // (heads // groups)
                if not seen:
                    rows.append(torch.zeros(size, dtype=q.dtype))
                    continue
                scores = (k[b, g, seen] @ q[b, h, i]) / math.sqrt(size)
                rows.append(scores.softmax(0) @ v[b, g, seen])
    return torch.stack(rows).view(batch, heads, length, size)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("new_tokens", [6, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
@on_devices
def test_attention(causal: bool, groups: int, new_tokens: int, masked: bool):
    key_mask = None
    if masked:
        # Row 0 is padded on the right, row 1 on the left: there the first causal queries see no key at all.
        key_mask = torch.tensor([[True] * 4 + [False] * 2, [False] * 2 + [True] * 4])
    arguments = Visibility(causal, key_mask).attention_arguments(new_tokens, 6)
    check(
        lambda q, k, v: kernels.attention(q, k, v, *arguments),
        lambda q, k, v: plain_attention(q, k, v, causal, key_mask),
        rand(2, 4, new_tokens, 8),
        rand(2, groups, 6, 8, seed=1),
        rand(2, groups, 6, 8, seed=2),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [7, 256, 257])
@on_devices
def test_attention_in_bf16_is_near_float32(causal: bool, groups: int, length: int):
    """Short rows go by products of their own on CPUs: values and gradients stay within bf16's rounding."""
    inputs = [rand(2, heads, length, 8, seed=seed).float() for seed, heads in enumerate((4, groups, groups))]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        own = [value.to(dtype, copy=True).requires_grad_() for value in inputs]
        y = kernels.attention(*own, causal)
        y.float().square().sum().backward()
        results.append([y.detach().float(), *(value.grad.float() for value in own)])
    for exact, rounded in zip(*results, strict=True):
        assert (exact - rounded).abs().max() <= 0.03 * exact.abs().max()


@on_devices
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("name", ["torch_flash", "torch_cudnn"])
def test_torchs_kernels_by_name(name: str, groups: int, causal: bool, monkeypatch: pytest.MonkeyPatch):
    """Eager and in a single compiled graph. In float32 the other kernels of the name's list compute."""
    monkeypatch.setattr(kernels, "_attention_choice", name)
    for run in (kernels.attention, torch.compile(kernels.attention, backend="aot_eager", fullgraph=True)):
        check(
            lambda q, k, v, run=run: run(q, k, v, causal),
            lambda q, k, v: plain_attention(q, k, v, causal, None),
            rand(2, 4, 6, 8),
            rand(2, groups, 6, 8, seed=1),
            rand(2, groups, 6, 8, seed=2),
        )
    torch.compiler.reset()


@pytest.mark.parametrize("causal", [False, True])
def test_attention_without_any_key_is_zero(causal: bool):
    q = rand(1, 2, 3, 4).float().requires_grad_()
    arguments = Visibility(causal, torch.zeros(1, 3, dtype=torch.bool)).attention_arguments(3, 3)
    y = kernels.attention(q, q, q, *arguments)
    y.sum().backward()
    assert (y == 0).all()
    assert (q.grad == 0).all()


# Linear + cross-entropy


def loss_inputs(rows: int, width: int = 12, classes: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    targets = torch.randint(classes, (rows,), generator=generator, device="cpu").to(torch.get_default_device())
    return rand(rows, width), rand(classes, width, seed=1), targets, rand(rows, seed=2).abs()


@on_devices
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("chunk_elements", [1, 5 * 40, 2**24], ids=["row by row", "five rows", "one chunk"])
def test_linear_cross_entropy(rows: int, chunk_elements: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "chunk_elements", lambda device: chunk_elements)
    hidden, weight, targets, row_weights = loss_inputs(rows)

    def formula(hidden: Tensor, weight: Tensor) -> Tensor:
        return (F.cross_entropy(hidden @ weight.T, targets, reduction="none") * row_weights).sum()

    check(lambda h, w: kernels.linear_cross_entropy(h, w, targets, row_weights)[0], formula, hidden, weight)
    _, nll = kernels.linear_cross_entropy(hidden.float(), weight.float(), targets, row_weights)
    assert not nll.requires_grad
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-5)


@on_devices
def test_linear_cross_entropy_of_no_rows():
    hidden, weight, targets, row_weights = loss_inputs(0)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    total, nll = kernels.linear_cross_entropy(hidden, weight, targets, row_weights)
    total.backward()
    assert total.item() == 0
    assert nll.shape == (0,)
    assert hidden.grad.shape == hidden.shape
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_linear_cross_entropy_with_one_input_frozen(frozen: str):
    hidden, weight, targets, row_weights = loss_inputs(7)
    hidden, weight = hidden.float(), weight.float()
    leaf = (weight if frozen == "hidden" else hidden).requires_grad_()
    kernels.linear_cross_entropy(hidden, weight, targets, row_weights)[0].backward()
    loss = (F.cross_entropy(hidden @ weight.T, targets, reduction="none") * row_weights.float()).sum()
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(loss, leaf)[0], rtol=1e-4, atol=1e-5)


def test_linear_cross_entropy_without_gradient_equals_that_with():
    hidden, weight, targets, row_weights = (x.float() if x.is_floating_point() else x for x in loss_inputs(20))
    with torch.no_grad():
        total, nll = kernels.linear_cross_entropy(hidden, weight, targets, row_weights)
    again, again_nll = kernels.linear_cross_entropy(hidden, weight.requires_grad_(), targets, row_weights)
    torch.testing.assert_close(total, again.detach())
    torch.testing.assert_close(nll, again_nll)


def test_linear_cross_entropy_scales_with_what_comes_from_above():
    hidden, weight, targets, row_weights = loss_inputs(9)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    plain = torch.autograd.grad(kernels.linear_cross_entropy(hidden, weight, targets, row_weights)[0], (hidden, weight))
    tripled = torch.autograd.grad(
        3 * kernels.linear_cross_entropy(hidden, weight, targets, row_weights)[0], (hidden, weight)
    )
    for one, three in zip(plain, tripled, strict=True):
        torch.testing.assert_close(3 * one, three)


def test_linear_cross_entropy_survives_large_logits():
    hidden, weight, targets, row_weights = loss_inputs(9)
    hidden, weight = (hidden * 1000).float().requires_grad_(), weight.float()
    total, _ = kernels.linear_cross_entropy(hidden, weight, targets, row_weights)
    total.backward()
    expected = (F.cross_entropy(hidden @ weight.T, targets, reduction="none") * row_weights.float()).sum()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("chunk_elements", [8 * 40, 2**24])
def test_linear_cross_entropy_under_bf16_autocast(chunk_elements: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "chunk_elements", lambda device: chunk_elements)
    exact = loss_inputs(32)
    hidden, weight = exact[0].float().requires_grad_(), exact[1].float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, nll = kernels.linear_cross_entropy(hidden, weight, exact[2], exact[3])
    total.backward()
    assert total.dtype == nll.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    wide = [x.clone().requires_grad_() for x in exact[:2]]
    loss = (F.cross_entropy(wide[0] @ wide[1].T, exact[2], reduction="none") * exact[3]).sum()
    loss.backward()
    assert total.item() == pytest.approx(loss.item(), rel=1e-2)
    for ours, reference in zip((hidden, weight), wide, strict=True):
        difference = (ours.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert difference < 2e-2


def test_compiled_softmax_equals_eager():
    # GPUs run this one; the code is the same everywhere.
    hidden, weight, targets, row_weights = (x.float() if x.is_floating_point() else x for x in loss_inputs(33))
    eager = kernels._softmax_gradient(hidden @ weight.T, targets, row_weights)
    compiled = kernels._compiled_softmax_gradient()(hidden @ weight.T, targets, row_weights)
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other)


# The choice


@pytest.mark.parametrize("compiled", [False, True])
def test_choice_on_cpus_is_torch_and_is_said(compiled: bool):
    line = kernels.choose("auto", CPU, torch.float32, compiled)
    assert line.startswith("kernels: attention torch; ")
    assert ("torch.compile" in line) == compiled
    kernels.choose("torch", CPU, torch.float32)


def test_unknown_kernel_lists_the_choices():
    with pytest.raises(ValueError, match="triton.*auto, torch, flash_attn, xformers"):
        kernels.choose("triton", CPU, torch.float32)


def test_the_fastest_comes_first_and_what_cannot_run_is_left_out():
    def timer(name: str) -> float:
        if name == "xformers":
            raise NotImplementedError("no operator for this GPU")
        return {"flash_attn": 3.0, "torch_flash": 2.0, "torch_cudnn": 1.0}[name]

    times = kernels.fastest(["flash_attn", "xformers", "torch_flash", "torch_cudnn"], timer)
    assert list(times.items()) == [("torch_cudnn", 1.0), ("torch_flash", 2.0), ("flash_attn", 3.0)]
    assert kernels.fastest(["xformers"], timer) == {}


@pytest.mark.parametrize(
    ("installed", "flash", "cudnn", "timed"),
    [
        ([], True, True, ["torch_flash", "torch_cudnn"]),
        (["flash_attn"], True, False, ["flash_attn", "torch_flash"]),
        (["flash_attn"], False, False, []),
        ([], False, True, []),
        ([], False, False, []),
    ],
)
def test_only_where_several_kernels_are_there_are_they_timed(
    installed: list[str], flash: bool, cudnn: bool, timed: list[str], monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def timer(name: str, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> float:
        assert (q.shape, k.shape, v.shape, q.dtype) == ((3, 4, 8, 2), (3, 2, 8, 2), (3, 2, 8, 2), torch.bfloat16)
        asked.append(name)
        return 1.0

    monkeypatch.setattr(kernels, "_suits_fast_attention", lambda device, dtype: True)
    monkeypatch.setattr(kernels, "_installed", lambda: installed)
    monkeypatch.setattr(kernels, "_milliseconds", timer)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda params: flash)
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda params: cudnn)
    times = kernels.measured_attention((3, 4, 8, 2), 2, True, CPU, torch.bfloat16)
    assert list(times) == asked == timed


@pytest.mark.parametrize("device", DEVICES)
def test_attention_is_measured_on_gpus(device: str):
    """Whatever is chosen there computes what torch's own choice does; on a CPU nothing is timed."""
    assert kernels.measured_attention((2, 4, 256, 64), 4, True, torch.device(device), torch.float32) == {}
    times = kernels.measured_attention((2, 4, 256, 64), 4, True, torch.device(device), torch.bfloat16)
    assert list(times.values()) == sorted(times.values()) and all(0 < value < 1000 for value in times.values())
    q, k, v = (rand(2, 4, 256, 64, seed=seed).to(device, torch.bfloat16) for seed in range(3))
    exact = kernels.attention(q.float(), k.float(), v.float(), True)
    for name in times:
        kernels.choose(name, torch.device(device), torch.bfloat16)
        y = kernels.attention(q, k, v, True)
        kernels.choose("torch", CPU, torch.float32)
        assert (y.float() - exact).abs().max() <= 0.03 * exact.abs().max()
    assert device == "cuda" or times == {}


@pytest.mark.parametrize("package", ["flash_attn", "xformers", "torch_flash", "torch_cudnn"])
def test_forced_package_that_cannot_run_is_refused(package: str):
    # Not installed, or installed and of no use on a CPU: either way one line that says what to do.
    with pytest.raises(ValueError, match=rf"{package}.*torch$"):
        kernels.choose(package, CPU, torch.bfloat16)


@pytest.mark.gpu
def test_kernels_agree_between_gpu_and_cpu():
    hidden, weight, targets, row_weights = (x.float() if x.is_floating_point() else x for x in loss_inputs(33))
    on_cpu, _ = kernels.linear_cross_entropy(hidden, weight, targets, row_weights)
    on_gpu, _ = kernels.linear_cross_entropy(*(x.cuda() for x in (hidden, weight, targets, row_weights)))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-4)
