"""MXExperts and MXLinear: the operations with weights of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mxperts as mx
from mxperts.formats import all_schemes

pytestmark = pytest.mark.usefixtures("either_layout")

E, H, INNER, T, K = 4, 40, 72, 3, 2
SCHEMES = [*(s.name for s in all_schemes()), "none", "a_fp8", "a_mxfp4"]


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
    return torch.randn(T, H, generator=g).to(dtype), ids, torch.rand(T, K, generator=g)


def weights(rows: int = 2 * INNER) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(E, rows, H, generator=g) * 0.2, torch.randn(E, H, INNER, generator=g) * 0.2


def static(scheme: str, *scales: float) -> tuple[float, ...] | None:
    return scales if mx.Scheme(scheme).activation == "fp8_static" else None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_equal_the_operation(scheme: str) -> None:
    dense, s = weights(), mx.Scheme(scheme)
    scales: Any = static(scheme, 0.011, 0.004)
    gate_up, down = dense if s.weight is None else (mx.quantize(w, s.weight) for w in dense)
    bias = {"gate_up_bias": torch.randn(E, 2 * INNER), "down_bias": torch.randn(E, H)}
    module = mx.MXExperts.quantize(
        *dense, scheme, input_scales=scales, activation="swigluoai", interleaved=True, **bias
    )
    expected = mx.fused_experts(
        inputs()[0],
        gate_up,
        down,
        *inputs()[1:],
        activation="swigluoai",
        interleaved=True,
        activation_format=s.activation,
        input_scales=scales,
        **bias,
    )
    assert torch.equal(module(*inputs()), expected)
    assert not any(p.requires_grad for p in module.parameters())
    assert f"scheme={s}" in repr(module)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_equals_the_operation(scheme: str) -> None:
    linear, s = nn.Linear(H, 24), mx.Scheme(scheme)
    scale = 0.02 if s.activation == "fp8_static" else None
    module = mx.MXLinear.quantize(linear, scheme, input_scale=scale)
    weight = linear.weight.detach() if s.weight is None else mx.quantize(linear.weight.detach(), s.weight)
    x = inputs()[0].reshape(1, T, H)
    expected = mx.mx_linear(x, weight, linear.bias.detach(), activation=s.activation, input_scale=scale)
    assert torch.equal(module(x), expected)
    assert not any(p.requires_grad for p in module.parameters())
    assert f"scheme={s}" in repr(module)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("gated", [True, False])
def test_experts_from_shapes_take_a_state_dict(scheme: str, gated: bool) -> None:
    """What a checkpoint loader does: build on meta, allocate, load."""
    activation, rows = ("situ", 2 * INNER) if gated else ("gelu_tanh_no_mul", INNER)
    settings: Any = {"activation": activation, **({"swiglu_beta": 0.5} if gated else {})}
    source = mx.MXExperts.quantize(*weights(rows), scheme, input_scales=static(scheme, 0.011, 0.004), **settings)
    module = mx.MXExperts(E, H, INNER, scheme=scheme, device="meta", **settings)
    state = {name: t.reshape(()) if name.endswith("input_scale") else t for name, t in source.state_dict().items()}
    assert {n: (p.shape, p.dtype) for n, p in module.state_dict().items()} == {
        n: (p.shape, p.dtype) for n, p in state.items()
    }
    module.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(module(*inputs()), source(*inputs()))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_from_shapes_takes_a_state_dict(scheme: str, bias: bool) -> None:
    scale = 0.02 if mx.Scheme(scheme).activation == "fp8_static" else None
    source = mx.MXLinear.quantize(nn.Linear(H, 24, bias=bias), scheme, input_scale=scale)
    module = mx.MXLinear(H, 24, bias, mx.Scheme(scheme), device="meta")
    state = {name: t.reshape(()) if name == "input_scale" else t for name, t in source.state_dict().items()}
    assert {n: (p.shape, p.dtype) for n, p in module.state_dict().items()} == {
        n: (p.shape, p.dtype) for n, p in state.items()
    }
    module.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(module(inputs()[0]), source(inputs()[0]))


def test_tensors_are_not_copied() -> None:
    gate_up, down = (mx.quantize(w, "mxfp6_e3m2") for w in weights())
    module = mx.MXExperts.from_tensors(gate_up, down)
    assert module.gate_up_proj.data_ptr() == gate_up.packed.data_ptr()
    assert module.down_proj_scale.data_ptr() == down.scales.data_ptr()
    assert mx.MXLinear.from_tensors(down[0]).weight.data_ptr() == down.packed.data_ptr()


def test_fresh_modules_are_zero() -> None:
    module = mx.MXExperts(E, H, INNER, scheme="w4a4", bias=True, dtype=torch.bfloat16)
    assert module.gate_up_proj_bias.dtype is torch.bfloat16
    assert torch.equal(module(*inputs()), torch.zeros(T, H, dtype=torch.bfloat16))
    assert torch.equal(mx.MXLinear(H, 24, scheme="w8a8")(inputs()[0]), torch.zeros(T, 24, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "module", [mx.MXLinear(H, 24, True, "w_mxfp4_a_fp8"), mx.MXExperts(E, H, INNER, scheme="mxfp4_fp8")]
)
def test_an_input_scale_that_was_not_loaded_is_an_error(module: nn.Module) -> None:
    arguments = inputs() if isinstance(module, mx.MXExperts) else inputs()[:1]
    with pytest.raises(mx.ArgumentError, match=r"input_scale.* must be above 0 and finite, not \[nan\]"):
        module(*arguments)


def test_conversion_keeps_codes_and_input_scales() -> None:
    linear = mx.MXLinear.quantize(nn.Linear(H, 24), "w_mxfp4_a_fp8", input_scale=0.3)
    experts = mx.MXExperts.quantize(*weights(), "w_mxfp4_a_fp8", input_scales=(0.3, torch.full((E,), 0.7)))
    model = nn.Sequential(linear, experts)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.half().to(torch.bfloat16)
    for name, p in model.named_parameters():
        if name == "0.bias":
            assert p.dtype is torch.bfloat16
        else:
            assert torch.equal(p, before[name]), name
            assert p.dtype is before[name].dtype, name


def test_compiled_equals_eager() -> None:
    experts = mx.MXExperts.quantize(*weights(), "w4a4")
    linear = mx.MXLinear.quantize(nn.Linear(H, H), "w6a6")

    def layers(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return linear(experts(x, ids, w))

    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs()), layers(*inputs()))


def test_errors() -> None:
    gate_up, down = (mx.quantize(w, "mxfp4") for w in weights())
    with pytest.raises(mx.ArgumentError, match="one without a gate needs I"):
        mx.MXExperts.from_tensors(gate_up, down, activation="silu_no_mul")
    with pytest.raises(mx.ArgumentError, match=r"weight must have shape \[N, K\]"):
        mx.MXLinear.from_tensors(gate_up)
    with pytest.raises(mx.FormatError, match="unknown scheme"):
        mx.MXLinear(8, 8, True, "w5a5")
    with pytest.raises(mx.ArgumentError, match="'situ' needs swiglu_beta"):
        mx.MXExperts(E, H, INNER, activation="situ")
