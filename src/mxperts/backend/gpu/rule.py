"""A format and a recipe as the numbers that kernels compute with: one constexpr argument."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from mxperts.backend.bits import scale_step
from mxperts.errors import ArgumentError
from mxperts.formats import (
    SCALE_BIAS,
    SCALE_NAN,
    BlockFormat,
    NonFinite,
    Recipe,
    Rounding,
    ScaleRule,
    SignedZero,
)

BLOCK = 32
"""Elements of a block."""


class ElementRule(NamedTuple):
    """An element format as plain numbers: all that it takes to decode and encode.

    Attributes:
        bits: width of a code.
        pack_elements, pack_bytes: fewest codes that fill whole bytes, and the bytes that they take.
        integer: whether codes are two's complements; if so they are fixed point, as floats are below 2^emin.
        mantissa_bits: bits below the leading one; of integers those behind the point.
        special: the least magnitude code that is Inf or NaN; ``1 << (bits - 1)`` if none is.
        decode_scale: 2^(127 - bias), which turns the bits of a code, put where float32 has exponent and mantissa, into
            its number; of integers 2^-mantissa_bits.
        encode_scale: the inverse.
    """

    bits: int
    pack_elements: int
    pack_bytes: int
    integer: bool
    mantissa_bits: int
    special: int
    decode_scale: float
    encode_scale: float


class BlockRule(NamedTuple):
    """A format and a recipe as plain numbers: all that happens to one block.

    Attributes:
        element: of the format.
        scale_carry: added to the bits of amax; a carry into its exponent is the scale rule's step up.
        scale_offset: what the exponent field of amax, stepped, is above the scale byte.
        scale_overflow: the exponent field from which on the scale is the largest.
        zero_scale: scale byte of a block of zeros.
        emin: exponent below which elements have the spacing that they have there.
        truncates: elements are rounded toward zero.
        ties_away, ties_toward_zero: what becomes of ties; if neither, they go to the even code.
        largest: the largest element.
        least: the magnitude of the most negative element that rounding may give.
        keep_zero: everything that is or becomes 0 keeps its sign.
        keep_rounded: what becomes 0 and is not 0 keeps its sign.
        nan_saturates, inf_saturates: such an element becomes the largest one; otherwise its block becomes NaN. Nothing
            here raises: who wants an error looks for NaN and Inf beforehand.
    """

    element: ElementRule
    scale_carry: int
    scale_offset: int
    scale_overflow: int
    zero_scale: int
    emin: int
    truncates: bool
    ties_away: bool
    ties_toward_zero: bool
    largest: float
    least: float
    keep_zero: bool
    keep_rounded: bool
    nan_saturates: bool
    inf_saturates: bool


@lru_cache(maxsize=64)
def element_rule(fmt: BlockFormat) -> ElementRule:
    """The numbers that stand for a format's elements in kernels."""
    element = fmt.element
    integer = not element.has_signed_zero
    mantissa_bits = element.mantissa_bits - integer
    exponent = -mantissa_bits if integer else SCALE_BIAS - element.bias
    values = element.values[: element.sign_bit]
    return ElementRule(
        bits=element.bits,
        pack_elements=fmt.pack_elements,
        pack_bytes=fmt.pack_bytes,
        integer=integer,
        mantissa_bits=mantissa_bits,
        special=next((code for code, value in enumerate(values) if not math.isfinite(value)), element.sign_bit),
        decode_scale=2.0**exponent,
        encode_scale=2.0**-exponent,
    )


@lru_cache(maxsize=256)
def block_rule(fmt: BlockFormat, recipe: Recipe) -> BlockRule:
    """The numbers that stand for a format and a recipe in kernels.

    Raises:
        ArgumentError: stochastic rounding, which no kernel has.
    """
    if recipe.rounding is Rounding.STOCHASTIC:
        raise ArgumentError("stochastic rounding needs a generator: pass generator=torch.Generator()")
    element = fmt.element
    integer = not element.has_signed_zero
    carry, step = scale_step(recipe, element)
    return BlockRule(
        element=element_rule(fmt),
        scale_carry=carry,
        scale_offset=element.emax - step,
        scale_overflow=SCALE_NAN if recipe.scale_rule is ScaleRule.EVEN and recipe.even_overflow else 1 << 20,
        zero_scale=recipe.zero_block_scale,
        emin=1 - element.bias - integer,
        truncates=recipe.rounding is Rounding.TOWARD_ZERO,
        ties_away=recipe.rounding is Rounding.HALF_AWAY,
        ties_toward_zero=recipe.rounding is Rounding.HALF_TOWARD_ZERO,
        largest=element.max,
        least=-element.min if integer and recipe.use_min else element.max,
        keep_zero=not integer and recipe.signed_zero is SignedZero.KEEP,
        keep_rounded=not integer and recipe.signed_zero is SignedZero.KEEP_ROUNDED,
        nan_saturates=recipe.nan is NonFinite.SATURATE,
        inf_saturates=recipe.inf is NonFinite.SATURATE,
    )
