"""E4M3 activations: values quantised to fp8 with a float32 scale and dequantised again.

The divisions and products are float32, one rounding each; the rounding to E4M3 goes through its table of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxperts.backend.reference.quantize import round_to_code
from mxperts.formats import E4M3, Recipe


def fake_quantize_static(x: Tensor, scale: Tensor) -> Tensor:
    """``q * scale`` with ``q`` the E4M3 number nearest to ``x / scale``, ties to even, in the dtype of ``x``.

    Args:
        x: any shape.
        scale: float32, above 0, broadcast against ``x``.

    Returns:
        Beyond ±448 * scale, Inf included, values saturate; NaN stays NaN; zeros keep their sign.
    """
    return (_round_to_e4m3(x.to(torch.float32) / scale) * scale).to(x.dtype)


def fake_quantize_dynamic(x: Tensor) -> Tensor:
    """As ``fake_quantize_static``, with one scale a token: amax / 448 over the last dimension, in float32.

    A scale of 0, that of zeros or of a token within 2^-141 of them, counts as 1 and gives zeros. A NaN or an Inf makes
    the whole token NaN: there is no scale for it.
    """
    amax = x.to(torch.float32).abs().amax(-1, keepdim=True)
    scale = amax / torch.full_like(amax, E4M3.max)  # by a number, GPUs would multiply by its inverse
    return fake_quantize_static(x, torch.where(scale == 0, 1.0, scale))


def _round_to_e4m3(scaled: Tensor) -> Tensor:
    """The nearest E4M3 number, saturating, as float32."""
    magnitude = scaled.to(torch.float64).abs().clamp(max=E4M3.max)
    code = round_to_code(magnitude.contiguous(), scaled.signbit(), E4M3, Recipe(), None)
    table = torch.tensor(E4M3.magnitudes, dtype=torch.float32, device=scaled.device)
    return torch.copysign(table[code], scaled).masked_fill(scaled.isnan(), torch.nan)
