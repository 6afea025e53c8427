"""The activation functions: names, constants, and values against the standard library's mathematics."""

from __future__ import annotations

import math
from typing import Any

import dense
import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

import mxperts as mx
from mxperts.backend.reference.activation import activate
from mxperts.ops.activation import ACTIVATIONS, BoundActivation, bind_activation

INF, NAN = math.inf, math.nan
CONSTANTS: dict[str, dict[str, float]] = {"situ": {"beta": 0.75}}
CHOICES = [
    *((name, CONSTANTS.get(name, {})) for name in ACTIVATIONS),
    ("silu", {"limit": 0.5}),
    ("swigluoai", {"limit": 2.0, "alpha": 1.0, "beta": 0.0}),
    ("situ", {"beta": 2.0, "linear_beta": 0.5}),
    ("swiglustep", {"limit": 0.25}),
]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "constants"), CHOICES)
def test_values(name: str, constants: dict[str, float], dtype: torch.dtype, interleaved: bool) -> None:
    h = torch.linspace(-20, 20, 1002).to(dtype)
    a = activate(h, bind_activation(name, **constants), interleaved=interleaved).double().numpy()
    exact = dense.activate(h.double().numpy(), name, interleaved, constants)
    error = np.abs(exact) * 64 * dense.ULP
    assert np.all(dense.cast(exact - error, dtype) <= a)
    assert np.all(a <= dense.cast(exact + error, dtype))


@pytest.mark.parametrize(
    "name", ["silu", "swish", "gelu", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh", "relu2"]
)
def test_names_of_transformers(name: str) -> None:
    """Within float32's own error of what Transformers computes under the same name."""
    g, u = torch.linspace(-8, 8, 101), torch.linspace(-3, 5, 101)
    ours = activate(torch.cat([g, u]), bind_activation(name), interleaved=False)
    torch.testing.assert_close(ours, ACT2FN[name](g) * u, rtol=1e-5, atol=2e-6)


def test_swigluoai_is_gpt_oss() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    experts = GptOssExperts(GptOssConfig(num_local_experts=1, hidden_size=1, intermediate_size=1))
    h = torch.linspace(-12, 12, 200)
    ours = activate(h, bind_activation("swigluoai"), interleaved=True)
    torch.testing.assert_close(ours, experts._apply_gate(h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "gate", "up", "expected"),
    [
        ("silu", -1000.0, 2.0, -0.0),
        ("silu", INF, 2.0, INF),
        ("silu", -INF, 2.0, NAN),
        ("gelu", -1000.0, 2.0, -0.0),
        ("gelu", -INF, 2.0, NAN),
        ("gelu", -10.0, 1.0, -10 * math.erfc(10 / math.sqrt(2)) / 2),  # 1 + erf would cancel to 0
        ("gelu_tanh", INF, 2.0, INF),
        ("relu2", -INF, 2.0, 0.0),
        ("relu2", 1e20, 1e-20, 1e20),  # the square alone would overflow
        ("relu2", 1e20, 1.0, INF),
        ("relu2", NAN, 1.0, NAN),
        ("swigluoai", INF, INF, 7 / (1 + math.exp(-7 * 1.702)) * 8),
        ("swigluoai", NAN, 0.0, NAN),
        ("swigluoai", 1.0, NAN, NAN),
        ("situ", -INF, 2.0, -0.0),
        ("situ", INF, 2.0, 1.5),
        ("swiglustep", INF, -INF, -49.0),
        ("swiglustep", -1000.0, INF, -0.0),
    ],
)
def test_special_values(name: str, gate: float, up: float, expected: float) -> None:
    a = activate(torch.tensor([gate, up]), bind_activation(name, **CONSTANTS.get(name, {})), interleaved=False)
    torch.testing.assert_close(a, torch.tensor([expected]), rtol=0, atol=0, equal_nan=True)
    assert expected != 0 or math.copysign(1, a.item()) == math.copysign(1, expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_encode_and_decode(name: str) -> None:
    bound = bind_activation(name, **CONSTANTS.get(name, {}))
    assert BoundActivation.decode(bound.encode()) == bound


def test_defaults() -> None:
    bound = bind_activation("SwigluOAI", limit=None)
    assert (bound.limit, bound.alpha, bound.beta, bound.gated) == (7.0, 1.702, 1.0, True)
    assert bind_activation("silu").limit is None
    assert bind_activation("swiglustep").limit == 7.0
    assert not bind_activation("relu2_no_mul").gated


@pytest.mark.parametrize(
    ("name", "constants", "message"),
    [
        ("relu3", {}, "unknown activation 'relu3'; did you mean relu2"),
        (None, {}, "unknown activation None; known: silu"),
        ("gelu", {"limit": 1.0}, "'gelu' takes no constants, not swiglu_limit; leave it out"),
        ("situ", {}, "'situ' needs swiglu_beta"),
        ("situ", {"beta": 0.0}, "swiglu_beta of 'situ' must be above 0, not 0.0"),
        ("situ", {"beta": 1.0, "linear_beta": -1.0}, "swiglu_linear_beta of 'situ' must be above 0, not -1.0"),
        ("situ", {"beta": 1.0, "limit": 1.0}, "takes swiglu_linear_beta, swiglu_beta, not swiglu_limit"),
        ("silu", {"limit": 0}, "swiglu_limit of 'silu' must be above 0, not 0"),
        ("swigluoai", {"alpha": INF}, "swiglu_alpha must be finite, not inf"),
    ],
)
def test_errors(name: Any, constants: dict[str, float], message: str) -> None:
    with pytest.raises(mx.ArgumentError, match=message):
        bind_activation(name, **constants)
