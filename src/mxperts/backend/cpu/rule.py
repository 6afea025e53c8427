"""A format and a recipe as the integers that kernels compute with."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mxperts.backend.bits import scale_step
from mxperts.errors import ArgumentError
from mxperts.formats import (
    SCALE_BIAS,
    SCALE_NAN,
    BlockFormat,
    Encoding,
    NonFinite,
    Recipe,
    Rounding,
    ScaleRule,
    SignedZero,
)

BLOCK = 32
"""Elements of a block."""
INF = 0x7F800000
"""Bits of Inf as float32."""


class BlockRule(NamedTuple):
    """A format and a recipe as plain integers: all that happens to one block.

    Attributes:
        scale_carry: added to the bits of amax; a carry into its exponent is the scale rule's step up.
        scale_offset: what the exponent field of amax, stepped, is above the scale byte.
        overflow: the exponent field from which on the scale is the largest.
        zero_scale: scale byte of a block of zeros.
        mantissa_bits, emin: of the elements; integers are fixed point, as floats are below 2^emin.
        etop: exponents above this are treated as this.
        half, down, even: rounding adds half a unit if ``half`` is 1, less ``down``, plus the unit's last bit if
            ``even`` is 1.
        largest: bits of the largest element as float32.
        below: what the bits of the most negative element's magnitude are above that.
        keep_zero: 1 if everything that is or becomes 0 keeps its sign.
        keep_rounded: -1 if what becomes 0 and is not 0 keeps its sign.
        nan_saturates, inf_saturates: 1 if such an element becomes the largest one, 0 if its block becomes NaN. Nothing
            here raises: who wants an error looks for NaN and Inf beforehand.
        normal: bits of 2^emin as float32, beyond all elements if they are integers.
        unit: bits of 2^(mantissa_bits - emin) as float32.
        code_offset: what the top bits of a normal element's float32 are above its code.
        negate: -1 if negative codes are two's complements.
        sign_bit: of a code; 0 if negative codes are two's complements.
        inf_code, nan_code: the magnitude code that is Inf, 255 if none is, and the last one that is not NaN; of 8 bits.
        bits: width of a code.
    """

    scale_carry: int
    scale_offset: int
    overflow: int
    zero_scale: int
    mantissa_bits: int
    emin: int
    etop: int
    half: int
    down: int
    even: int
    largest: int
    below: int
    keep_zero: int
    keep_rounded: int
    nan_saturates: int
    inf_saturates: int
    normal: int
    unit: int
    code_offset: int
    negate: int
    sign_bit: int
    inf_code: int
    nan_code: int
    bits: int


_ROUNDINGS = {  # half, down, even
    Rounding.NEAREST_EVEN: (1, 1, 1),
    Rounding.HALF_AWAY: (1, 0, 0),
    Rounding.HALF_TOWARD_ZERO: (1, 1, 0),
    Rounding.TOWARD_ZERO: (0, 0, 0),
}


@lru_cache(maxsize=256)
def block_rule(fmt: BlockFormat, recipe: Recipe) -> BlockRule:
    """The numbers that stand for a format and a recipe in kernels.

    Raises:
        ArgumentError: stochastic rounding, which no kernel has.
    """
    if recipe.rounding not in _ROUNDINGS:
        raise ArgumentError("stochastic rounding needs a generator: pass generator=torch.Generator()")
    element = fmt.element
    integer = not element.has_signed_zero
    mantissa_bits = element.mantissa_bits - integer
    emin = 1 - element.bias - integer
    carry, step = scale_step(recipe, element)
    half, down, even = _ROUNDINGS[recipe.rounding]
    largest = bits_of(element.max)
    top_exponent = ((1 << element.exponent_bits) - 1) << element.mantissa_bits
    return BlockRule(
        scale_carry=carry,
        scale_offset=element.emax - step,
        overflow=SCALE_NAN if recipe.scale_rule is ScaleRule.EVEN and recipe.even_overflow else 1 << 20,
        zero_scale=recipe.zero_block_scale,
        mantissa_bits=mantissa_bits,
        emin=emin,
        etop=emin if integer else element.emax + 1,
        half=half,
        down=down,
        even=even,
        largest=largest,
        below=bits_of(-element.min) - largest if integer and recipe.use_min else 0,
        keep_zero=int(not integer and recipe.signed_zero is SignedZero.KEEP),
        keep_rounded=-int(not integer and recipe.signed_zero is SignedZero.KEEP_ROUNDED),
        nan_saturates=int(recipe.nan is NonFinite.SATURATE),
        inf_saturates=int(recipe.inf is NonFinite.SATURATE),
        normal=INF if integer else bits_of(2.0**emin),
        unit=bits_of(2.0 ** (mantissa_bits - emin)),
        code_offset=(SCALE_BIAS + emin - 1) << mantissa_bits,
        negate=-int(integer),
        sign_bit=0 if integer else element.sign_bit,
        inf_code=top_exponent if element.encoding is Encoding.IEEE else 255,
        nan_code=len(element.magnitudes) - (element.encoding is not Encoding.IEEE),
        bits=element.bits,
    )


def bits_of(value: float) -> int:
    """Bits of the float32 nearest to a number."""
    return int(np.float32(value).view(np.int32))
