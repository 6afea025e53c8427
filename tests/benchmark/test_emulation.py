"""The baseline as a backend: operations against the reference, every argument that models use."""

import pytest
import torch

import mxperts as mx
from mxperts.benchmark import emulation


@pytest.fixture(autouse=True)
def registered():
    with emulation.registered():
        yield


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def weights(e=4, h=64, i=32, fmt=mx.MXFP4):
    return [mx.quantize(torch.randn(shape) * 0.1, fmt) for shape in ((e, 2 * i, h), (e, h, i))]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"activation_format": "mxfp8_e4m3"},
        {"activation_format": "fp8_dynamic"},
        {"activation_format": "fp8_static", "input_scales": (0.01, 0.02)},
        {"activation": "swigluoai", "interleaved": True},
        {"gate_up_bias": torch.linspace(-1, 1, 256).view(4, 64), "down_bias": torch.linspace(-1, 1, 256).view(4, 64)},
        {"expert_map": torch.tensor([3, -1, 0, 1])},
    ],
    ids=lambda more: ",".join(more),
)
def test_experts(more):
    torch.manual_seed(0)
    x, (gate_up, down) = torch.randn(5, 64).bfloat16(), weights()
    ids = torch.tensor([[0, 1], [2, 3], [-1, 2], [1, 1], [3, 0]])
    call = (x, gate_up, down, ids, torch.rand(5, 2))
    found, expected = (mx.fused_experts(*call, backend=b, **more) for b in (emulation.NAME, "reference"))
    assert relative(found, expected) < 2e-2
    assert found.dtype is torch.bfloat16


def test_router_weights_on_the_input():
    torch.manual_seed(0)
    x, (gate_up, down) = torch.randn(3, 64).bfloat16(), weights()
    call = (x, gate_up, down, torch.tensor([[0], [1], [2]]), torch.rand(3, 1))
    found, expected = (
        mx.fused_experts(*call, backend=b, apply_router_weight_on_input=True) for b in (emulation.NAME, "reference")
    )
    assert relative(found, expected) < 2e-2


@pytest.mark.parametrize("activation", [None, "mxfp4", "fp8_dynamic"])
def test_linear(activation):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 64).bfloat16(), mx.quantize(torch.randn(48, 64), mx.MXFP6_E3M2), torch.randn(48)
    found, expected = (
        mx.mx_linear(x, weight, bias, activation=activation, backend=b) for b in (emulation.NAME, "reference")
    )
    assert found.shape == (2, 3, 48)
    assert relative(found, expected) < 1e-2
