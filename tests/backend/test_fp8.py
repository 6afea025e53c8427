"""E4M3 activations against the conversions of ml_dtypes, bit by bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from mxperts.backend.reference.fp8 import fake_quantize_dynamic, fake_quantize_static
from mxperts.formats import E4M3

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASTS = {torch.float32: np.float32, torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}
INF, NAN = torch.inf, torch.nan


def with_ml_dtypes(x: Tensor, scale: np.ndarray) -> np.ndarray:
    """QDQ of finite numbers in the dtype of ``x``, as float32."""
    q = np.clip(x.float().numpy() / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return (q.astype(np.float32) * scale).astype(CASTS[x.dtype]).astype(np.float32)


def assert_same_bits(a: Tensor, b: np.ndarray) -> None:
    assert np.array_equal(a.float().numpy().view(np.int32), b.view(np.int32))


def interesting(dtype: torch.dtype) -> Tensor:
    """All E4M3 numbers, the midpoints between them and both neighbours of each, with both signs."""
    table = torch.tensor(E4M3.magnitudes)
    points = torch.cat([table, (table[1:] + table[:-1]) / 2, torch.tensor([464.0, 480.0, 1e4])])
    points = points.to(dtype)
    around = [torch.nextafter(points, torch.full_like(points, end)) for end in (0.0, 6e4)]
    points = torch.cat([points, *around])
    return torch.cat([points, -points])


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.3, 7.1e-3, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_static(dtype: torch.dtype, scale: float) -> None:
    x = interesting(dtype)
    s = np.float32(scale)
    assert_same_bits(fake_quantize_static(x, torch.tensor(scale)), with_ml_dtypes(x, s))
    scaled = (x.float() * scale).to(dtype)
    assert_same_bits(fake_quantize_static(scaled, torch.tensor(scale)), with_ml_dtypes(scaled, s))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dynamic(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 48, generator=generator) * torch.logspace(-6, 2, 64).unsqueeze(1)).to(dtype)
    scale = np.abs(x.float().numpy()).max(1, keepdims=True) / np.float32(448)
    assert_same_bits(fake_quantize_dynamic(x), with_ml_dtypes(x, scale))


def test_ties_go_to_even() -> None:
    x = torch.tensor(
        [17.0, 19.0, 2.0**-10, 3 * 2.0**-10, 400.0, 432.0]
    )  # midpoints of 16, 18, 20; 0, 1, 2 * 2^-9; 384 …
    y = fake_quantize_static(x, torch.tensor(1.0))
    assert y.tolist() == [16.0, 20.0, 0.0, 2.0**-8, 384.0, 448.0]


def test_static_special_values() -> None:
    x = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1e30, -1e-30])
    y = fake_quantize_static(x, torch.tensor(0.5))
    expected = torch.tensor([0.0, -0.0, 224.0, -224.0, NAN, 224.0, -0.0])
    assert torch.equal(y.nan_to_num(nan=-1), expected.nan_to_num(nan=-1))
    assert torch.equal(y.signbit()[[0, 1, 6]], torch.tensor([False, True, True]))


def test_dynamic_special_values() -> None:
    """Zeros stay; a NaN or an Inf takes its whole token, and no other, with it."""
    x = torch.tensor([[0.0, -0.0, 0.0], [1.0, NAN, 2.0], [1.0, -INF, 2.0], [1e-45, -1e-45, 0.0], [1.0, 2.0, -4.0]])
    y = fake_quantize_dynamic(x)
    assert torch.equal(y[0].view(torch.int32), x[0].view(torch.int32))
    assert y[1:3].isnan().all()
    assert torch.equal(y[3], torch.zeros(3))
    assert torch.equal(y[4], x[4])


def test_no_tokens() -> None:
    assert fake_quantize_dynamic(torch.empty(0, 8)).shape == (0, 8)
