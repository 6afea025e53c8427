"""Quantising blocks in registers: device functions that kernels build on, equal to the reference bit for bit.

Numbers are multiplied by the inverse of their block's scale and rounded by adding and subtracting a power of two whose
unit in the last place is the spacing of elements at that number: the GPU's own rounding, to nearest and ties to even,
is that of the elements. What this leaves subnormal is too small to be an element, or exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxperts.backend.gpu.convert import INTERPRET
from mxperts.backend.gpu.elements import encode_elements, inverse_scale_factors, scale_factors

_SIGN = tl.constexpr(-(1 << 31))
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_EXPONENT = tl.constexpr(0x7F800000)
_INF = tl.constexpr(0x7F800000)
_E4M3_MAX = tl.constexpr(448.0)
_E4M3_NORMAL = tl.constexpr(2.0**-6)
_E4M3_SHIFT = tl.constexpr(2.0**20)


@triton.jit
def qdq_blocks(x, RULE: tl.constexpr):
    """Quantised and dequantised again: float32 of the shape of ``x``, exact, not yet rounded to another dtype.

    Args:
        x: float32 [..., 32], exactly the numbers of the input's dtype; what pads a block is 0.
        RULE: from ``rule.block_rule``.

    Returns:
        Elements times their scales; NaN in blocks that become NaN, Inf beyond the range of float32.
    """
    magnitudes, signs, scales = round_to_elements(x, RULE, False)
    elements = (magnitudes.to(tl.int32, bitcast=True) | (signs & _SIGN)).to(tl.float32, bitcast=True)
    return elements * tl.expand_dims(scale_factors(scales), -1)


@triton.jit
def quantize_blocks(x, RULE: tl.constexpr):
    """Codes int32 of the shape of ``x`` and scales int32 [...], in 0 .. 255; arguments as of ``qdq_blocks``."""
    ELEMENT: tl.constexpr = RULE.element
    magnitudes, signs, scales = round_to_elements(x, RULE, True)
    signed = tl.expand_dims(tl.where(scales == 255, 0, -1), -1)
    return encode_elements(magnitudes, signs, signed, ELEMENT), scales


@triton.jit
def round_to_elements(x, RULE: tl.constexpr, NAN_IS_ZERO: tl.constexpr):
    """Elements, not multiplied by their scale.

    Args:
        x: float32 [..., 32].
        RULE: from ``rule.block_rule``.
        NAN_IS_ZERO: whether the magnitudes of a block that becomes NaN are 0; otherwise they are anything.

    Returns:
        Their magnitudes, float32 of the shape of ``x``; int32 of that shape, negative for negative elements; and scale
        bytes, int32 [...].
    """
    axis: tl.constexpr = len(x.shape) - 1
    bits = x.to(tl.int32, bitcast=True)
    magnitude_bits = bits & _MAGNITUDE
    top = tl.max(magnitude_bits, axis=axis)  # as integers NaN is above Inf
    if RULE.nan_saturates:
        numbers = tl.max(tl.where(magnitude_bits <= _INF, magnitude_bits, 0), axis=axis)
    else:
        numbers = tl.minimum(top, _INF)
    byte = scale_bytes(numbers, RULE)
    scales = tl.where(numbers == 0, RULE.zero_scale, byte)
    if not RULE.nan_saturates:
        scales = tl.where(top > _INF, 255, scales)
    if not RULE.inf_saturates:
        scales = tl.where(numbers == _INF, 255, scales)

    # Clamped first: the largest element is rounded to itself. NaN and Inf become it, too.
    largest = RULE.largest
    least = RULE.least
    if NAN_IS_ZERO:
        largest = tl.expand_dims(tl.where(scales == 255, 0.0, largest), -1)
        least = tl.expand_dims(tl.where(scales == 255, 0.0, least), -1)
    scaled = tl.abs(x * tl.expand_dims(inverse_scale_factors(byte), -1))
    if RULE.least != RULE.largest:
        scaled = at_most(scaled, tl.where((bits < 0) & (magnitude_bits < _INF), least, largest))
    else:
        scaled = at_most(scaled, largest)
    rounded = round_magnitudes(scaled, RULE)
    if RULE.keep_rounded:
        bits = tl.where(magnitude_bits != 0, bits, 0)
    elif not RULE.keep_zero:
        bits = tl.where(rounded != 0, bits, 0)
    return rounded, bits, scales


@triton.jit
def at_most(x, limit):
    """The lesser of two float32; the limit where ``x`` is NaN."""
    if INTERPRET:  # there a NaN would stay
        return tl.where(x < limit, x, limit)
    else:
        return tl.minimum(x, limit)


@triton.jit
def scale_bytes(amax, RULE: tl.constexpr):
    """Scale bytes, int32 in 0 .. 254, of blocks whose largest magnitude has the bits ``amax``; Inf counts as 2^128."""
    # The integer of a subnormal's bits, as a float, has its exponent and fraction but for a factor of 2^149
    subnormal = tl.maximum(amax, 1).to(tl.float32).to(tl.int32, bitcast=True) - (149 << 23)
    normalized = tl.where(amax >= 1 << 23, amax, subnormal)
    # Inf plus a carry would be beyond int32: exponents are 128 lower meanwhile
    field = ((normalized - (128 << 23) + RULE.scale_carry) >> 23) + 128
    scales = tl.minimum(tl.maximum(field - RULE.scale_offset, 0), 254)
    return tl.where(field >= RULE.scale_overflow, 254, scales)


@triton.jit
def round_magnitudes(x, RULE: tl.constexpr):
    """Numbers from 0 to the largest element, float32, rounded to elements."""
    mantissa_bits: tl.constexpr = RULE.element.mantissa_bits
    normal: tl.constexpr = 2.0**RULE.emin
    if RULE.element.integer:
        binade = normal
    else:
        binade = (x.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)
        binade = tl.maximum(binade, normal)
    shift = binade * 2.0 ** (23 - mantissa_bits)
    rounded = (x + shift) - shift
    if RULE.truncates or RULE.ties_away or RULE.ties_toward_zero:
        spacing = binade * 2.0**-mantissa_bits
        error = rounded - x  # exact
        if RULE.truncates:
            rounded = tl.where(error > 0, rounded - spacing, rounded)
        elif RULE.ties_away:
            rounded = tl.where(error == -0.5 * spacing, rounded + spacing, rounded)
        else:
            rounded = tl.where(error == 0.5 * spacing, rounded - spacing, rounded)
    return rounded


@triton.jit
def fake_quantize_fp8(x, scale):
    """``q * scale`` with ``q`` the E4M3 number nearest to ``x / scale``, ties to even: float32 of the shape of ``x``.

    Beyond ±448 * scale, Inf included, values saturate; NaN stays NaN; zeros keep their sign.

    Args:
        x: float32, any shape.
        scale: float32, above 0, broadcast against ``x``.
    """
    scaled = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude = at_most((bits & _MAGNITUDE).to(tl.float32, bitcast=True), _E4M3_MAX)
    binade = (magnitude.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)
    shift = tl.maximum(binade, _E4M3_NORMAL) * _E4M3_SHIFT
    rounded = ((magnitude + shift) - shift).to(tl.int32, bitcast=True) | (bits & _SIGN)
    return tl.where(scaled == scaled, rounded.to(tl.float32, bitcast=True), scaled) * scale


@triton.jit
def fp8_scale_of(amax):
    """The scale, float32, of numbers whose largest magnitude, or NaN, has the bits ``amax``, int32; 1 for zeros."""
    scale = tl.div_rn(amax.to(tl.float32, bitcast=True), tl.full(amax.shape, _E4M3_MAX, tl.float32))
    return tl.where(scale == 0, 1.0, scale)
