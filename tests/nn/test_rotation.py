"""Modules whose weights are rotated: what they compute, and that their state is told apart from that of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mxperts as mx
from mxperts.errors import ArgumentError
from mxperts.rotation import rotate_weight

E, H, I = 3, 64, 32  # noqa: E741


def dense(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(E, 2 * I, H, generator=g) / 8, torch.randn(E, H, I, generator=g) / 8


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(5, H, generator=g), torch.randint(0, E, (5, 2), generator=g), torch.rand(5, 2, generator=g)


@pytest.mark.parametrize("scheme", ["w_mxfp4_a_mxfp4", "w_mxfp6_e2m3", "none"])
def test_experts_are_the_operation_with_rotated_weights(scheme: str) -> None:
    gate_up, down = dense()
    module = mx.MXExperts.quantize(gate_up, down, scheme, rotation="hadamard32")
    fmt, activation = module.scheme.weight, module.scheme.activation
    weights: list[Any] = [rotate_weight(w) if fmt is None else mx.quantize(rotate_weight(w), fmt) for w in dense()]
    x, ids, routing = given()
    expected = mx.fused_experts(x, *weights, ids, routing, activation_format=activation, rotation="hadamard32")
    assert torch.equal(module(x, ids, routing), expected)
    module.prepare(torch.float32)
    assert torch.equal(module(x, ids, routing), expected)
    again = mx.MXExperts(E, H, I, scheme=scheme, rotation="hadamard32")
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x, ids, routing), expected)
    assert "rotation=hadamard32" in repr(again)


def test_linear_is_the_operation_with_a_rotated_weight() -> None:
    linear = torch.nn.Linear(H, 24)
    module = mx.MXLinear.quantize(linear, "w_mxfp4_a_mxfp6_e2m3", rotation="hadamard32")
    weight = mx.quantize(rotate_weight(linear.weight.detach()), "mxfp4")
    x = given()[0]
    expected = mx.mx_linear(x, weight, linear.bias, activation="mxfp6_e2m3", rotation="hadamard32")
    assert torch.equal(module(x), expected)
    assert "rotation=hadamard32" in repr(module)


@pytest.mark.parametrize(("has", "wants"), [("hadamard32", None), (None, "hadamard32")])
def test_state_of_another_rotation_is_refused(has: str | None, wants: str | None) -> None:
    state = mx.MXExperts.quantize(*dense(), "w_mxfp4", rotation=has).state_dict()
    with pytest.raises(RuntimeError, match=r"the state dict holds codes of mxfp4.*but the module's format is mxfp4"):
        mx.MXExperts(E, H, I, rotation=wants).load_state_dict(state)
    state = mx.MXLinear.quantize(torch.nn.Linear(H, 8), "w_mxfp4", rotation=has).state_dict()
    with pytest.raises(RuntimeError, match=r"rotated by hadamard32"):
        mx.MXLinear(H, 8, rotation=wants).load_state_dict(state)


def test_rows_that_cannot_be_rotated_are_refused() -> None:
    with pytest.raises(ArgumentError, match="gate_up_proj has 40 values in a row"):
        mx.MXExperts(E, 40, I, rotation="hadamard32")
    with pytest.raises(ArgumentError, match="down_proj has 40 values in a row"):
        mx.MXExperts.quantize(torch.ones(E, 80, H), torch.ones(E, H, 40), "w_mxfp4", rotation="hadamard32")
    with pytest.raises(ArgumentError, match="weight has 40 values in a row"):
        mx.MXLinear.quantize(torch.nn.Linear(40, 8), "w_mxfp4", rotation="hadamard32")
