"""Operations that go to their backend straight away give what the operators give, and only where nothing watches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mxperts as mx
from mxperts.ops import experts as ops_experts
from mxperts.ops import linear as ops_linear
from mxperts.ops.eager import is_eager

E, H, INNER, T = 3, 40, 72, 5


def layer(**changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(T, H, generator=g),
        "gate_up_proj": mx.quantize(torch.randn(E, 2 * INNER, H, generator=g), "mxfp4"),
        "down_proj": mx.quantize(torch.randn(E, H, INNER, generator=g), "mxfp4"),
        "top_k_index": torch.randint(E, (T, 2), generator=g),
        "top_k_weights": torch.rand(T, 2, generator=g),
        "gate_up_bias": torch.randn(E, 2 * INNER, generator=g),
        "down_bias": torch.randn(E, H, generator=g),
        **changes,
    }


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    pass


@pytest.mark.filterwarnings("ignore:`torch.jit.trace`:DeprecationWarning")
def test_what_watches() -> None:
    x = torch.ones(2)
    assert is_eager()
    assert is_eager(x, None, torch.nn.Parameter(x, requires_grad=False))
    assert not is_eager(x, x.clone().requires_grad_())
    with torch.no_grad():
        assert is_eager(torch.nn.Parameter(x))
    with torch.inference_mode():
        assert is_eager(torch.nn.Parameter(x), torch.ones(2))
    assert not is_eager(x.as_subclass(Wrapped))
    with Counting():
        assert not is_eager(x)
    seen: list[bool] = []
    torch.func.vmap(lambda x: seen.append(is_eager(x)) or x)(x)
    torch.jit.trace(lambda x: seen.append(is_eager(x)) or x, x, check_trace=False)
    assert not any(seen)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation_format": "fp8", "input_scales": (0.5, torch.tensor([0.5, 0.75, 1.5]))},
        {"expert_map": torch.tensor([2, -1, 0]), "interleaved": True, "activation": "swigluoai"},
    ],
    ids=["plain", "fp8", "mapped"],
)
def test_experts_are_those_of_the_operator(
    changes: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = layer(**changes)
    expected = mx.fused_experts(**arguments, backend=backend)
    outs = [torch.empty(T, H) for _ in range(2)]
    assert mx.fused_experts(**arguments, backend=backend, out=outs[0]) is outs[0]
    monkeypatch.setattr(ops_experts, "is_eager", lambda *tensors: False)
    assert torch.equal(mx.fused_experts(**arguments, backend=backend), expected)
    assert mx.fused_experts(**arguments, backend=backend, out=outs[1]) is outs[1]
    assert torch.equal(outs[0], expected)
    assert torch.equal(outs[1], expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("activation", [None, "mxfp4", "fp8_static"])
def test_linear_is_that_of_the_operator(activation: str | None, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, bias = torch.randn(2, T, H), mx.quantize(torch.randn(24, H), "mxfp6_e2m3"), torch.randn(24)
    options: Any = {"activation": activation, "out_dtype": torch.bfloat16, "backend": backend}
    options["input_scale"] = 0.5 if activation == "fp8_static" else None
    expected = mx.mx_linear(x, w, bias, **options)
    monkeypatch.setattr(ops_linear, "is_eager", lambda *tensors: False)
    assert torch.equal(mx.mx_linear(x, w, bias, **options), expected)


def test_modes_see_the_operators() -> None:
    arguments = layer()
    with Counting() as mode:
        mx.fused_experts(**arguments)
        mx.fused_experts(**arguments, out=torch.empty(T, H))
        mx.mx_linear(torch.ones(2, H), arguments["gate_up_proj"][0])
    seen = [name for name in mode.names if name.startswith("mxperts")]
    assert seen == ["mxperts.fused_experts.default", "mxperts.fused_experts_out.default", "mxperts.mx_linear.default"]


def test_fake_tensors_get_fake_results() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        arguments = layer() | {"hidden_states": torch.empty(T, H)}
        y = mx.fused_experts(**arguments)
        assert type(y).__name__ == "FakeTensor"
        assert y.shape == (T, H)


@pytest.mark.parametrize("name", ["hidden_states", "top_k_weights", "gate_up_bias", "down_bias"])
def test_a_gradient_that_nothing_gives_is_an_error(name: str) -> None:
    arguments = layer()
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        mx.fused_experts(**arguments).sum().backward()
    with torch.no_grad():
        assert not mx.fused_experts(**arguments).requires_grad
