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
    seed: int, fmt: str, dtype: torch.dtype, *, tokens: int = 31, n: int = 100, k: int = 100
) -> tuple[Tensor, mx.MXTensor, Tensor]:
    """Tokens from small to large, one of them zeros, each with a value that stands out; weights with many scales."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.exp2((1.5 * torch.randn(n, -(-k // 32), generator=g)).clamp(-2, 4))
    values = torch.randn(n, k, generator=g) * 256
    values[:, ::32] = 500  # no block is so small that float16 rounds its E5M2 values
    w = mx.quantize(values * scales.repeat_interleave(32, -1)[:, :k], fmt)
    x = torch.randn(tokens, k, generator=g) * torch.logspace(-3, 3, tokens)[:, None]
    x[:, k // 3] *= 7
    x[tokens // 2 : tokens // 2 + 1] = 0
    return x.to(dtype), w, torch.randn(n, generator=g) * 256


def exact(
    path: str, x: Tensor, w: mx.MXTensor, bias: Tensor | None, activation: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """The exact results, and the bound on the error of a path's float32."""
    scale = 0.013 if activation == "fp8_static" else None
    rows = np.array([dense.qdq(token, activation, x.dtype, scale) for token in x.double().numpy()])
    values = dense.decode(w, x.dtype)
    n = bounds.roundings([path], x.shape[-1], x.dtype, activation)
    y = bounds.product(bounds.Interval.known(rows), values, None if bias is None else bias.double().numpy(), n)
    flushed = bounds.flushed(values, w.scales.numpy(), 3) if path == "avx512_bf16" else 0.0
    return y.mid, y.error + flushed


def careful(w: mx.MXTensor, dtype: torch.dtype) -> bool:
    return bool(need_care(w.packed[None], w.scales[None], w.format)[DTYPES.index(dtype), 0])


def linear(x: Tensor, w: mx.MXTensor, bias: Tensor | None, activation: str | None, **kwargs: Any) -> Tensor:
    scale = 0.013 if activation == "fp8_static" else None
    return mx.mx_linear(x, w, bias, activation=activation, input_scale=scale, backend="cpu", **kwargs)


def assert_close(y: np.ndarray, expected: np.ndarray, error: np.ndarray) -> None:
    """Each result is within its bound, and all of a row together are much closer."""
    assert (abs(y - expected) <= error).all(), np.nanmax(abs(y - expected) / error)
    rms = [np.sqrt(np.mean(rows**2, -1)) for rows in (y - expected, expected)]
    assert (rms[0] <= RMS * rms[1]).all(), np.nanmax(rms[0] / rms[1])


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(("path", "fmt", "activation"), CASES)
def test_every_sum_is_within_the_bound_of_its_roundings(path: str, fmt: str, activation: str | None) -> None:
    for i, dtype in enumerate(DTYPES):
        x, w, bias = problem(i, fmt, dtype)
        assert not careful(w, dtype)
        b = bias if i % 2 else None
        y = linear(x, w, b, activation, out_dtype=torch.float32)
        assert_close(y.double().numpy(), *exact(path, x, w, b, activation))
        for tokens in (1, 5):
            assert torch.equal(linear(x[:tokens], w, b, activation, out_dtype=torch.float32), y[:tokens])


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(("path", "fmt", "activation"), MANY)
@pytest.mark.parametrize("k", [1100, 7168])
def test_long_rows(path: str, fmt: str, activation: str | None, k: int) -> None:
    """Weights are decoded 32 blocks at a time where many tokens use them."""
    x, w, _ = problem(3, fmt, torch.bfloat16, n=70, k=k)
    expected, error = exact(path, x, w, None, activation)
    for tokens in (31, 2):
        y = linear(x[:tokens], w, None, activation, out_dtype=torch.float32).double().numpy()
        assert_close(y, expected[:tokens], error[:tokens])


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("path", [p.name for p in PATHS])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 33), (63, 32), (64, 31), (65, 65), (129, 97)])
def test_shapes(path: str, n: int, k: int) -> None:
    for tokens in (0, 1, 2, 5, 7, 40, 200):
        for fmt, activation in (("mxfp4", "mxfp4"), ("mxint8", "mxfp6_e2m3")):
            x, w, bias = problem(n + k, fmt, torch.bfloat16, tokens=tokens, n=n, k=k)
            y = linear(x, w, bias, activation, out_dtype=torch.float32)
            assert y.shape == (tokens, n)
            if tokens:
                expected, error = exact(path, x, w, bias, activation)
                assert (abs(y.double().numpy() - expected) <= error).all()


# Sums that must be exact


def random_codes(fmt: str, n: int, k: int, scales: Tensor, seed: int) -> mx.MXTensor:
    """Every code as often as any other."""
    g, f = torch.Generator().manual_seed(seed), mx.format(fmt)
    codes = torch.randint(1 << f.element.bits, (n, k), generator=g, dtype=torch.uint8)
    return mx.MXTensor.from_codes(codes, scales[torch.randint(len(scales), (n, f.blocks(k)), generator=g)], f)


def nearest(x: Fraction) -> np.float32:
    """The float32 next to a number, ties to even."""
    guess = np.float32(float(x))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min((f for f in near if np.isfinite(f)), key=lambda f: (abs(Fraction(float(f)) - x), f.view(np.int32) & 1))


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("path", ["avx512_vnni"])
@pytest.mark.parametrize("activation", sorted(INTEGERS))
@pytest.mark.parametrize("fmt", sorted(INTEGERS))
def test_a_block_of_integers_is_exact_and_rounded_once(path: str, fmt: str, activation: str) -> None:
    """One block: the exact result, rounded. Two: the second is added to the first's and the sum rounded."""
    scales = torch.tensor([20, 90, 120, 127, 128, 135, 159], dtype=torch.uint8)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(31, 64, generator=g) * torch.logspace(-30, 24, 31)[:, None]
    x[3], x[4, ::2], x[4, 1::2] = 7.5, -127.0, 127.0  # as large as sums become
    x = x.bfloat16()
    for k in (32, 64):
        w = random_codes(fmt, 70, k, scales, k)
        w.packed[5], w.packed[6] = 0x77 if fmt == "mxfp4" else 0x7F, 0x80
        assert not careful(w, x.dtype)
        y = linear(x[:, :k], w, None, activation, out_dtype=torch.float32).numpy()
        rows = np.array([dense.qdq(token, activation, x.dtype, None) for token in x[:, :k].double().numpy()])
        values = dense.decode(w, torch.float32)
        for t, n in np.ndindex(*y.shape):
            blocks = [math.fsum(rows[t, at : at + 32] * values[n, at : at + 32]) for at in range(0, k, 32)]
            total = np.float32(0)
            for block in blocks:
                total = nearest(Fraction(float(total)) + Fraction(block))
            assert y[t, n] == total, (t, n, blocks)


# Numbers of any size


def special(fmt: str, scales: list[int], k: int = 96) -> mx.MXTensor:
    """All codes, those of NaN and Inf in every ninth row only."""
    w = random_codes(fmt, 70, k, torch.tensor(scales, dtype=torch.uint8), 1)
    codes, last = w.codes(), len(w.format.element.magnitudes) - 1
    if w.format.element.has_signed_zero:
        finite = (codes & (w.format.element.sign_bit - 1)) <= last
        finite[::9] = True
        codes = torch.where(finite, codes, 1)
    return mx.MXTensor.from_codes(codes, w.scales, w.format)


def tokens_of_any_size(dtype: torch.dtype, k: int = 96) -> Tensor:
    """The largest and smallest numbers of a dtype, alone, together and in blocks of their own; zeros, NaN and Inf."""
    g, limits = torch.Generator().manual_seed(2), torch.finfo(dtype)
    x = torch.randn(16, k, generator=g)
    x[0] = limits.max
    x[1] = limits.max * torch.tensor([1.0, -1.0]).repeat(k // 2)
    x[2, ::7] *= limits.max / 8
    x[3, 40] = -limits.max
    x[4] *= limits.tiny
    x[5] *= limits.tiny * 2**-5
    x[6, :32] *= limits.tiny * 2**-5
    x[6, 64:] = limits.max / 2
    x[7] = 0
    x[8, :64] = 0
    x[9, 33] = torch.nan
    x[10, 2] = torch.inf
    x[11, 50], x[11, 51] = torch.inf, -torch.inf
    x[12] = 0
    x[12, 95] = -torch.inf
    x[13] = 1.0  # nothing is left for the second and third parts
    x = x.to(dtype)
    x[14, 7] = torch.tensor(limits.max * 2).to(dtype)  # Inf
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    x.view(bits)[14, 7] += 1  # a NaN with only its lowest bit
    return x


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(("path", "fmt", "activation"), CASES)
def test_numbers_of_any_size(path: str, fmt: str, activation: str | None) -> None:
    """NaN and Inf are where they must be; all that cannot overflow on the way is within the bound."""
    scale, a = torch.tensor([0.013]), parse_activation(activation)
    for scales in ([0, 1, 100, 127, 160], [0, 1, 127, 161, 254], [90, 127, 254, 255]):
        w = special(fmt, scales)
        for dtype in DTYPES:
            x = tokens_of_any_size(dtype)
            y = linear(x, w, None, activation, out_dtype=torch.float32).double().numpy()
            rows = quantize_input(x, a, scale).double().numpy()
            values = mx.dequantize(w, dtype, backend="reference").double().numpy()
            with np.errstate(invalid="ignore", over="ignore"):
                terms = rows[:, None] * values
                expected = terms.sum(-1)
                finite = np.where(np.isfinite(terms), terms, 0)
                size = np.abs(finite).sum(-1)
                one_sign = (terms >= 0).all(-1) | (terms <= 0).all(-1)
                expected = expected.astype(np.float32).astype(np.float64)
            certain = (size < 2.0**127) | ((size > 2.0**129) & one_sign)  # sums cannot overflow on the way, or must
            same = (np.isnan(y) & np.isnan(expected)) | (y == expected)
            error = bounds.gamma(110) * size + 200 * bounds.SMALLEST + np.abs(expected) * bounds.UNIT
            if path == "avx512_bf16":
                error = error + bounds.flushed(np.nan_to_num(values), w.scales.numpy().clip(max=160), 3)
            with np.errstate(invalid="ignore"):
                same |= np.isfinite(y) & np.isfinite(expected) & (abs(y - expected) <= error)
            wrong = np.argwhere(certain & ~same)
            assert certain.mean() > 0.4
            assert not len(wrong), (
                dtype,
                scales,
                len(wrong),
                [(*i, y[tuple(i)], expected[tuple(i)]) for i in wrong[:5]],
            )
