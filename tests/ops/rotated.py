"""Layers that show the inputs of both projections bit for bit: weights that are the identity, one expert a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mxperts as mx
from mxperts.formats import BLOCK_FORMATS

ACTIVATIONS = [None, *(f.name for f in BLOCK_FORMATS), "fp8_static", "fp8_dynamic"]
E, WIDTH = 3, 96


def tokens(dtype: torch.dtype, count: int = 12) -> Tensor:
    """From small to large, with one of zeros, one with an Inf and one with a NaN."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, WIDTH, generator=g) * torch.logspace(-2, 1, count)[:, None]
    x[:, WIDTH // 3] *= 9
    x[3], x[4, 5], x[5, 40] = 0, torch.inf, torch.nan
    return x.to(dtype)


def identity(fmt: str, rows: int = WIDTH) -> mx.MXTensor:
    """[E, rows, WIDTH]; by any format exactly."""
    return mx.quantize(torch.eye(WIDTH).repeat(rows // WIDTH, 1).expand(E, -1, -1), fmt, backend="reference")


def run(
    x: Tensor, weight: str, activation_format: str | None, backend: str, *, device: str = "cpu", **changes: Any
) -> Tensor:
    """``relu2`` of the first input, quantised, is the second; the result is that, quantised: no sum has two terms.

    Each expert has its own static scales.
    """
    scales = (
        torch.tensor([0.013, 0.5, 0.0625], device=device),
        torch.tensor([0.25, 0.0371, 0.5], device=device),
    )
    arguments: dict[str, Any] = {
        "activation": "relu2_no_mul",
        "activation_format": activation_format,
        "input_scales": scales if activation_format == "fp8_static" else None,
        "rotation": "hadamard32",
        "backend": backend,
    }
    ids = torch.arange(len(x)).unsqueeze(1) % E
    routing = torch.exp2(torch.arange(len(x)) % 3 - 1.0).unsqueeze(1)
    given = (x, identity(weight), identity(weight), ids, routing)
    y: Tensor = mx.fused_experts(*(t.to(device) for t in given), **{**arguments, **changes})
    return y.cpu()


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal bits, but for which NaN and for the sign of zero, which a sum does not keep."""
    assert found.dtype is expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0))
