"""A projection by quantised weights: input QDQ, exact products, float64 sums, one rounding.

A product of an input value (24 bits at most) and a weight (24 bits at most) is exact in float64, and so are their sums
but for the last few of its 53 bits. The result, rounded to at most 24, therefore does not depend on the batch, the
number of threads or the BLAS, and defines what backends that accumulate in float32 are measured against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxperts.backend.reference.fp8 import fake_quantize_dynamic, fake_quantize_static
from mxperts.backend.reference.quantize import CHUNK, dequantize, fake_quantize
from mxperts.formats import FP8_DYNAMIC, FP8_STATIC, Activation, BlockFormat, Role, recipe
from mxperts.rotation import rotate_input


def mx_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    fmt: BlockFormat | None,
    bias: Tensor | None,
    activation: Activation,
    input_scale: Tensor | None,
    rotation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``x`` [..., K] times ``weight`` [N, K] transposed, plus ``bias`` [N]: [..., N] in ``out_dtype``."""
    return round_once(project(quantize_input(x, activation, input_scale, rotation), weight, fmt, bias), out_dtype)


def quantize_input(x: Tensor, activation: Activation, scale: Tensor | None, rotation: str | None = None) -> Tensor:
    """``x``, rotated, as the activation format holds it, in its own dtype; ``scale`` is for static fp8 only."""
    if rotation is not None:
        return quantize_input(rotate_input(x), activation, scale).to(x.dtype)
    if activation is None:
        return x
    if activation == FP8_DYNAMIC:
        return fake_quantize_dynamic(x)
    if activation == FP8_STATIC:
        assert scale is not None, "static fp8 without a scale"
        return fake_quantize_static(x, scale)
    assert isinstance(activation, BlockFormat), activation
    return fake_quantize(x, activation, recipe(activation, Role.ACTIVATION))


def project(x: Tensor, weight: Sequence[Tensor], fmt: BlockFormat | None, bias: Tensor | None) -> Tensor:
    """``x`` [..., K] times the weight's values transposed, plus ``bias``: float64 [..., N].

    Args:
        weight: packed [N, P] and scales [N, ceil(K / 32)] if there is a format, else one dense tensor [N, K]. Its
            values are rounded to the dtype of ``x``, so many rows at a time as ``CHUNK`` allows.
    """
    rows = weight[0].shape[0]
    step = max(1, CHUNK // x.shape[-1])
    wide = x.to(torch.float64)
    parts = [
        wide @ _values([t[start : start + step] for t in weight], fmt, x.shape[-1], x.dtype).T
        for start in range(0, rows, step)
    ]
    y = torch.cat(parts, dim=-1)
    return y if bias is None else y + bias.to(torch.float32)


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to ``dtype`` by way of float32, the accumulator of the contract."""
    return x.to(torch.float32).to(dtype)


def _values(weight: Sequence[Tensor], fmt: BlockFormat | None, k: int, dtype: torch.dtype) -> Tensor:
    """Weights rounded to ``dtype``, as float64."""
    if fmt is None:
        return weight[0].to(dtype).to(torch.float64)
    packed, scales = weight
    return dequantize(packed, scales, fmt, k, dtype).to(torch.float64)
