"""Inputs that kernels rotate: the reference's bits on every path, also where numbers are large, and in any batch."""

from __future__ import annotations

import pytest
import rotated
import torch

import mxperts as mx
from mxperts.backend.cpu.paths import PATHS

INTEGERS = ("mxfp4", "mxfp6_e2m3", "mxint8")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = [(p.name, a) for p in PATHS for a in rotated.ACTIVATIONS if not p.integers or a in INTEGERS]


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("path", "activation"), CASES)
def test_bits_are_the_reference_s(path: str, activation: str | None, dtype: torch.dtype) -> None:
    x = rotated.tokens(dtype)
    found, expected = (rotated.run(x, "mxfp4", activation, backend) for backend in ("cpu", "reference"))
    rotated.assert_same(found, expected)
    assert torch.equal(rotated.run(x[6:9], "mxfp4", activation, "cpu"), found[6:9])  # of the same experts


@pytest.mark.parametrize("activation", rotated.ACTIVATIONS)
def test_large_numbers_take_the_careful_path(activation: str | None) -> None:
    """Beyond 2^100 in bf16, beyond 2^15 in float16; what is rotated may be where what is not is below."""
    for dtype, size in ((torch.bfloat16, 2.0**98), (torch.float16, 2.0**13)):
        x = (torch.rand(4, rotated.WIDTH, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
        weight = mx.quantize(torch.eye(rotated.WIDTH), "mxfp8_e4m3")
        scale = 0.5 if activation == "fp8_static" else None
        found, expected = (
            mx.mx_linear(x, weight, activation=activation, input_scale=scale, rotation="hadamard32", backend=backend)
            for backend in ("cpu", "reference")
        )
        rotated.assert_same(found, expected)
        assert bool((expected.isfinite().all(-1)).any())
