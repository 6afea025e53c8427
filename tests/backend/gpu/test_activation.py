"""The activation functions in Triton against the reference, in units in the last place of float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from mxperts.backend.gpu.activation import activate
from mxperts.backend.reference import activation as reference
from mxperts.ops.activation import ACTIVATIONS, BoundActivation, bind_activation

Array = np.ndarray[Any, np.dtype[np.float32]]

INF, NAN = np.inf, np.nan
CHOICES = [
    *((name, {"beta": 3.0} if name == "situ" else {}) for name in ACTIVATIONS),
    ("silu", {"limit": 0.3}),
    ("swigluoai", {"limit": 1e30, "alpha": -0.7, "beta": -0.5}),
    ("swigluoai", {"alpha": 0.0}),
    ("situ", {"beta": 1e-3}),
    ("situ", {"beta": 20.0, "linear_beta": 0.01}),
    ("swiglustep", {"limit": 0.25}),
]
each = pytest.mark.parametrize(
    "activation", [bind_activation(name, **constants) for name, constants in CHOICES], ids=BoundActivation.encode
)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which the interpreter computes with


@triton.jit
def _activate(g_ptr, u_ptr, out_ptr, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g, u = tl.load(g_ptr + i, mask=i < n, other=0.0), tl.load(u_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, activate(g, u, ACTIVATION), mask=i < n)


def ordered(x: Array) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Integers that count the float32 in their order, both zeros 0."""
    bits = x.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def check(g: Array, u: Array, activation: BoundActivation, device: str) -> None:
    """NaN where the reference has NaN, else the same sign and at most the next float32; Inf is one of them."""
    gate, up = torch.from_numpy(g), torch.from_numpy(u)
    out, block = torch.empty(len(g), device=device), 1024 if device == "cuda" else 1 << 16
    _activate[(triton.cdiv(len(g), block),)](gate.to(device), up.to(device), out, len(g), activation, block)
    h = torch.stack([gate, up], 1) if activation.gated else gate[:, None]
    a, b = out.cpu().numpy(), reference.activate(h, activation, interleaved=False)[:, 0].numpy()
    number = ~np.isnan(b)
    distance = np.where(number, abs(ordered(a) - ordered(b)), 0)
    wrong = (np.isnan(a) == number) | (number & (np.signbit(a) != np.signbit(b))) | (distance > 1)
    assert not wrong.any(), [(g[i], u[i], a[i], b[i]) for i in np.flatnonzero(wrong)[:5]]


def pairs(gates: Any, ups: Any) -> tuple[Array, Array]:
    gates, ups = np.asarray(gates, np.float32), np.asarray(ups, np.float32)
    return np.repeat(gates, len(ups)), np.tile(ups, len(gates))


@each
def test_every_bf16(activation: BoundActivation, device: str) -> None:
    every = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    check(*pairs(every, [1.0, 3e38]), activation, device)
    check(*pairs([-60.0, 1.7], every), activation, device)


@each
def test_random_float32(activation: BoundActivation, device: str) -> None:
    rng = np.random.default_rng(0)
    sets = [(rng.standard_normal((2, 10_000)) * scale).astype(np.float32) for scale in (1e-3, 1, 4, 30)]
    for g, u in (*sets, rng.integers(0, 1 << 32, (2, 20_000), dtype=np.uint32).view(np.float32)):
        check(g, u, activation, device)


@each
def test_special_values(activation: BoundActivation, device: str) -> None:
    """Gates at which the function leaves the range of float32 or of float64, ups that bring it back, and the rest."""
    check(*pairs(np.linspace(-800, 0, 4_001), [1.0, 1e10, -3e38, INF]), activation, device)
    sizes = [0.0, 1e-45, 1e-38, 1e-8, 0.5, 1.0, 7.0, 88.7, 103.0, 709.5, 709.78271484375, 1e3, 1e19, 3.4028235e38, INF]
    values = np.array([*sizes, *(-s for s in sizes), NAN], np.float32)
    check(*pairs(values, values), activation, device)
