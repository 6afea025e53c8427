"""MX quantisation in integers only, on the bits of float32: a second definition, in arithmetic that the reference
backend does not use."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mxperts.formats import BlockFormat, Encoding, NonFinite, Recipe, Rounding, ScaleRule, SignedZero

Ints = npt.NDArray[np.int64]
NO_NUMBER = -(10**6)
"""The exponent of zero: below every other."""


def split(bits: npt.NDArray[np.uint32]) -> tuple[Ints, Ints, Ints]:
    """Sign, integer mantissa m < 2^24 and exponent e of float32 numbers: magnitude m * 2^e; Inf counts as 2^128."""
    wide = bits.astype(np.int64)
    sign, field, fraction = wide >> 31, (wide >> 23) & 0xFF, wide & 0x7FFFFF
    mantissa = np.where(field > 0, fraction | 0x800000, fraction)
    mantissa = np.where(field == 0xFF, 0x800000, mantissa)
    return sign, mantissa, np.maximum(field, 1) - 150


def floor_log2(m: Ints, e: Ints) -> Ints:
    """floor(log2(m * 2^e)), exact."""
    return np.where(m == 0, NO_NUMBER, np.frexp(m.astype(np.float64))[1] - 1 + e)


def scale_exponents(m: Ints, e: Ints, fmt: BlockFormat, recipe: Recipe) -> Ints:
    """Exponent of the shared scale from amax = m * 2^e, by carries into and comparisons of its 23-bit fraction."""
    element = fmt.element
    top = floor_log2(m, e)
    fraction = (m << np.where(m == 0, 0, 23 - (top - e))) & 0x7FFFFF
    max_fraction = int((element.max / 2.0**element.emax - 1) * 2**23)
    match recipe.scale_rule:
        case ScaleRule.FLOOR:
            step = np.zeros_like(top)
        case ScaleRule.EVEN:
            bits = element.mantissa_bits if recipe.even_bits is None else recipe.even_bits
            step = (fraction + (1 << (22 - bits))) >> 23
        case ScaleRule.RCEIL:
            step = (fraction > max_fraction).astype(np.int64)
        case ScaleRule.CEIL:
            step = (fraction + 0x7FFFFF) >> 23
        case ScaleRule.RFLOOR:
            step = -(fraction < max_fraction).astype(np.int64)
    return np.where(m == 0, -127, np.clip(top + step - element.emax, -127, 127))


def round_shift(m: Ints, shift: Ints, rounding: Rounding) -> Ints:
    """m / 2^shift, rounded to an integer."""
    left, right = np.clip(-shift, 0, 40), np.clip(shift, 0, 40)
    m = m << left
    whole, rest, half = m >> right, m & ((1 << right) - 1), (1 << right) >> 1
    tie, above = (rest == half) & (right > 0), rest > half
    match rounding:
        case Rounding.NEAREST_EVEN:
            return whole + (above | (tie & (whole % 2 == 1)))
        case Rounding.HALF_AWAY:
            return whole + (above | tie)
        case Rounding.HALF_TOWARD_ZERO:
            return whole + above
        case Rounding.TOWARD_ZERO:
            return whole
    raise AssertionError(f"no integer formula for {rounding}")


def quantize(bits: npt.NDArray[np.uint32], fmt: BlockFormat, recipe: Recipe) -> tuple[Ints, Ints]:
    """Codes [n, 32] and scale bytes [n] of float32 bit patterns [n, 32]; Inf and NaN poison their block."""
    assert recipe.nan is recipe.inf is NonFinite.BLOCK_NAN
    element = fmt.element
    sign, m, e = split(bits)
    special = (bits & 0x7F800000) == 0x7F800000
    magnitudes = (bits & 0x7FFFFFFF).astype(np.int64)
    largest = np.argmax(np.where(special, 0, magnitudes), axis=-1)[:, None]
    scale = scale_exponents(np.take_along_axis(m, largest, 1), np.take_along_axis(e, largest, 1), fmt, recipe)
    zero_block = np.where(special, 0, magnitudes).max(-1) == 0

    integer = element.encoding is Encoding.TWOS_COMPLEMENT
    mantissa_bits = 6 if integer else element.mantissa_bits
    emin = 0 if integer else 1 - element.bias
    binade = np.maximum(floor_log2(m, e) - scale, emin)
    if integer:
        binade = np.zeros_like(m)
    quanta = round_shift(m, binade - mantissa_bits - (e - scale), recipe.rounding)
    code = ((binade - emin) << mantissa_bits) + quanta
    if integer:
        code = np.where(sign == 1, -np.minimum(code, 128 if recipe.use_min else 127), np.minimum(code, 127)) & 0xFF
    else:
        code = np.minimum(code, len(element.magnitudes) - 1)
        match recipe.signed_zero:
            case SignedZero.KEEP:
                keep = sign
            case SignedZero.DROP:
                keep = sign * (code > 0)
            case SignedZero.KEEP_ROUNDED:
                keep = sign * (magnitudes > 0)
        code |= keep << (element.bits - 1)
    byte = np.where(zero_block, recipe.zero_block_scale, scale[:, 0] + 127)
    poisoned = special.any(-1)
    return np.where(poisoned[:, None], 0, code), np.where(poisoned, 255, byte)
