"""The compiled activation functions against the reference, in units in the last place of float32."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from llvmlite import binding

from mxperts.backend.cpu.activation import ActivationRule, activate, activation_rule
from mxperts.backend.reference import activation as reference
from mxperts.ops.activation import ACTIVATIONS, BoundActivation, bind_activation

Array = np.ndarray[Any, np.dtype[np.float32]]

INF, NAN = np.inf, np.nan
BOUND = 1
CHOICES = [
    *((name, {"beta": 3.0} if name == "situ" else {}) for name in ACTIVATIONS),
    ("silu", {"limit": 2.0}),
    ("silu", {"limit": 0.3}),
    ("swigluoai", {"limit": 2.0, "alpha": 1.0, "beta": 0.0}),
    ("swigluoai", {"limit": 1e30, "alpha": -0.7, "beta": -0.5}),
    ("swigluoai", {"alpha": 0.0}),
    ("situ", {"beta": 1e-3}),
    ("situ", {"beta": 1e30}),
    ("situ", {"beta": 0.75, "linear_beta": 2.0}),
    ("situ", {"beta": 20.0, "linear_beta": 0.01}),
    ("swiglustep", {"limit": 0.25}),
    ("swiglustep", {"limit": 1e30}),
]
BOUND_CHOICES = [bind_activation(name, **constants) for name, constants in CHOICES]
each = pytest.mark.parametrize("activation", BOUND_CHOICES, ids=BoundActivation.encode)


def compiled(g: Array, u: Array, activation: BoundActivation) -> Array:
    out = np.full_like(g, 0.125)
    activate(g, u, out, activation_rule(activation))
    return out


def expected(g: Array, u: Array, activation: BoundActivation, dtype: torch.dtype = torch.float32) -> Array:
    h = torch.from_numpy(np.stack([g, u], axis=1) if activation.gated else g[:, None]).to(dtype)
    result: Array = reference.activate(h, activation, interleaved=False)[:, 0].float().numpy()
    return result


def ordered(x: Array) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Integers that count the float32 in their order, both zeros 0."""
    bits = x.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def check(g: Array, u: Array, activation: BoundActivation) -> None:
    """NaN where the reference has NaN, else the same sign and at most ``BOUND`` float32 away; Inf is one of them."""
    a, b = compiled(g, u, activation), expected(g, u, activation)
    number = ~np.isnan(b)
    distance = np.where(number, abs(ordered(a) - ordered(b)), 0)
    wrong = (np.isnan(a) == number) | (number & (np.signbit(a) != np.signbit(b))) | (distance > BOUND)
    assert not wrong.any(), [(g[i], u[i], a[i], b[i]) for i in np.flatnonzero(wrong)[:5]]


def pairs(gates: Array, ups: Array) -> tuple[Array, Array]:
    return np.repeat(gates, len(ups)), np.tile(ups, len(gates))


def every_bf16() -> Array:
    return (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)


@each
def test_every_bf16_gate(activation: BoundActivation) -> None:
    ups = np.array([1.0, -7.3, 3e38, 1e-38], np.float32) if activation.gated else np.ones(1, np.float32)
    check(*pairs(every_bf16(), ups), activation)


@each
def test_every_bf16_up(activation: BoundActivation) -> None:
    if activation.gated:
        check(*reversed(pairs(every_bf16(), np.array([-60.0, 1.7], np.float32))), activation)


@each
def test_random_float32(activation: BoundActivation) -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1, 4, 30):
        g, u = (rng.standard_normal((2, 30_000)) * scale).astype(np.float32)
        check(g, u, activation)
    g, u = rng.integers(0, 1 << 32, (2, 100_000), dtype=np.uint32).view(np.float32)
    check(g, u, activation)


@each
def test_underflow(activation: BoundActivation) -> None:
    """Gates at which the function leaves the range of float32 or of float64, and ups that bring it back."""
    gates = np.linspace(-800, 0, 20_001, dtype=np.float32)
    ups = np.array([1.0, 1e10, -3e38, INF], np.float32)
    check(*pairs(gates, ups), activation)
    check(*pairs(np.linspace(-40, 0, 20_001, dtype=np.float32), ups), activation)


@each
def test_special_values(activation: BoundActivation) -> None:
    sizes = [
        0.0,
        1e-45,
        1e-38,
        1.2e-38,
        1e-8,
        0.5,
        1.0,
        2.0,
        7.0,
        88.7,
        89.0,
        103.0,
        709.5,
        1e3,
        1e19,
        3.4028235e38,
        INF,
    ]
    values = np.array([*sizes, *(-s for s in sizes), NAN, -NAN], np.float32)
    check(*pairs(values, values), activation)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_results_agree(activation: BoundActivation, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    g, u = (torch.randn(2, 100_000) * 3).to(dtype).float().numpy()
    rounded = torch.from_numpy(compiled(g, u, activation)).to(dtype).float().numpy()
    assert np.mean(rounded == expected(g, u, activation, dtype)) >= 0.999


@each
def test_any_length(activation: BoundActivation) -> None:
    """An element's result does not depend on its place, and nothing else is written."""
    rng = np.random.default_rng(0)
    g, u = (rng.standard_normal((2, 70)) * 3).astype(np.float32)
    whole = compiled(g, u, activation)
    for n in (0, 1, 7, 8, 31, 32, 33, 64, 69):
        out = np.full_like(g, -77)
        activate(g[:n], u[:n], out[:n], activation_rule(activation))
        assert np.array_equal(out[:n], whole[:n])
        assert np.all(out[n:] == -77)


@each
def test_in_place(activation: BoundActivation) -> None:
    g, u = np.linspace(-4, 4, 64, dtype=np.float32), np.linspace(2, -1, 64, dtype=np.float32)
    whole = compiled(g, u, activation)
    for target in (0, 1):
        arrays = [g.copy(), u.copy()]
        activate(*arrays, arrays[target], activation_rule(activation))
        assert np.array_equal(arrays[target], whole)


@pytest.mark.parametrize("name", [a.name for a in ACTIVATIONS.values() if not a.gated])
def test_no_up_projection(name: str) -> None:
    g = np.linspace(-4, 4, 64, dtype=np.float32)
    activation = bind_activation(name)
    assert np.array_equal(compiled(g, np.full_like(g, NAN), activation), compiled(g, g[:0], activation))


def test_rule() -> None:
    assert activation_rule(bind_activation("silu")) == ActivationRule(0, INF, 1.0, 0.0, INF)
    swigluoai = activation_rule(bind_activation("swigluoai"))
    assert swigluoai[1:] == (7.0, 1.702, 1.0, INF)
    assert len({activation_rule(a).function for a in BOUND_CHOICES}) == len(ACTIVATIONS)


@pytest.mark.skipif(not binding.get_host_cpu_features().get("avx2"), reason="looks for AVX instructions")
def test_every_loop_is_vectorised() -> None:
    """The divisions of all functions, 16 in all, as vector instructions."""
    g = np.ones(32, np.float32)
    activate(g, g, g.copy(), activation_rule(bind_activation("silu")))
    code = "".join(activate.inspect_asm().values())  # type: ignore[attr-defined]
    assert len(re.findall(r"\tvdivpd\t.*%[yz]mm", code)) >= 16
