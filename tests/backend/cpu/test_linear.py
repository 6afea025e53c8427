"""mx_linear on every path: how far its float32 sums are from exact ones, and where they must be the exact ones."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import bounds
import dense
import numpy as np
import pytest
import torch
from torch import Tensor

import mxperts as mx
from mxperts.backend.cpu import experts
from mxperts.backend.cpu.paths import PATHS
from mxperts.backend.cpu.prepared import need_care
from mxperts.backend.reference.linear import quantize_input
from mxperts.formats import BLOCK_FORMATS, parse_activation

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = [f.name for f in BLOCK_FORMATS]
ACTIVATIONS = [None, *FORMATS, "fp8_static", "fp8_dynamic"]
INTEGERS = {"mxfp4", "mxfp6_e2m3", "mxint8"}
CASES = [
    (p.name, fmt, activation)
    for p in PATHS
    for fmt in FORMATS
    for activation in ACTIVATIONS
    if not p.integers or {fmt, activation} <= INTEGERS
]
MANY = [("avx512_vnni", "mxfp6_e2m3", "mxint8"), *((p.name, "mxfp8_e4m3", None) for p in PATHS if not p.integers)]
RMS = 1e-6
"""What the contract allows ``accumulation="exact"``, relative to the results."""

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def problem(
    seed: int, fmt: str, dtype: torch.dtype, *, tokens: int = 13, n: int = 100, k: int = 100
) -> tuple[Tensor, mx.MXTensor, Tensor]:
    """Tokens from small to large, one of them zeros, each with a value that stands out."""
    g = torch.Generator().manual_seed(seed)
    w = mx.quantize(torch.randn(n, k, generator=g) * 64, fmt)
    x = torch.randn(tokens, k, generator=g) * torch.logspace(-3, 3, tokens)[:, None]
    x[:, k // 3] *= 7
    x[tokens // 2] = 0
    return x.to(dtype), w, torch.randn(n, generator=g) * 64


def exact(
    path: str, x: Tensor, w: mx.MXTensor, bias: Tensor | None, activation: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """The exact results, and the bound on the error of a path's float32."""
    scale = 0.013 if activation == "fp8_static" else None
    rows = np.array([dense.qdq(token, activation, x.dtype, scale) for token in x.double().numpy()])
    values = dense.decode(w, x.dtype)
    n = bounds.roundings([path], x.shape[-1], x.dtype, activation)
    y, error = bounds.product(rows, values, None if bias is None else bias.double().numpy(), n)
    if path == "avx512_bf16":
        error = error + bounds.flushed(values, w.scales.numpy(), 3)
    return y, error


def careful(w: mx.MXTensor, dtype: torch.dtype) -> bool:
    return bool(need_care(w.packed[None], w.scales[None], w.format)[DTYPES.index(dtype), 0])


def linear(x: Tensor, w: mx.MXTensor, bias: Tensor | None, activation: str | None, **kwargs: Any) -> Tensor:
    scale = 0.013 if activation == "fp8_static" else None
    return mx.mx_linear(x, w, bias, activation=activation, input_scale=scale, backend="cpu", **kwargs)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(("path", "fmt", "activation"), CASES)
def test_every_sum_is_within_the_bound_of_its_roundings(path: str, fmt: str, activation: str | None) -> None:
    for i, dtype in enumerate(DTYPES):
        x, w, bias = problem(i, fmt, dtype)
        assert not careful(w, dtype)
        b = bias if i % 2 else None
        y = linear(x, w, b, activation, out_dtype=torch.float32).double().numpy()
        expected, error = exact(path, x, w, b, activation)
        assert (abs(y - expected) <= error).all(), (dtype, (abs(y - expected) / error).max())
        rms = [np.sqrt(np.mean(rows**2, -1)) for rows in (y - expected, expected)]
        assert (rms[0] <= RMS * rms[1]).all(), dtype
