"""E4M3 activations of one token at a time, to be compiled into kernels; equal to the reference bit for bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mxperts.backend.cpu.blocks import float_of, magnitude_bits, round_e4m3
from mxperts.backend.cpu.jit import jit

Floats = npt.NDArray[np.float32]

LARGEST = np.float32(448)
"""The largest E4M3 number."""


@jit
def fake_quantize_fp8(x: Floats, scale: float, out: Floats) -> None:
    """Write ``q * scale`` with ``q`` the E4M3 number nearest to ``x / scale``, in float32, to ``out``.

    Beyond ±448 * scale, Inf included, values saturate; NaN stays NaN; zeros keep their sign.

    Args:
        x: float32 [n].
        scale: float32, above 0.
        out: float32 [n], may be ``x``.
    """
    single = np.float32(scale)
    for i in range(len(x)):
        out[i] = round_e4m3(x[i] / single) * single


@jit
def dynamic_scale(x: Floats) -> np.float32:
    """The scale, float32, of a token ``x`` [n]: amax / 448, or 1 if that is 0; not finite if ``x`` is not."""
    top = np.int32(0)
    for i in range(len(x)):
        magnitude = magnitude_bits(x[i])
        top = magnitude if magnitude > top else top  # NaN is above Inf
    scale = float_of(top)
    scale /= LARGEST
    return scale if scale != 0 else np.float32(1)
