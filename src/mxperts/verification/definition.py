"""Quantising and dequantising as their documentation words it, in exact rational arithmetic: the source of the golden
bytes.

Every distinct number is a ``Fraction`` that is compared with a table of ``Fraction``; NumPy only finds the distinct
ones and puts the answers where they belong. No backend, no float arithmetic and no table of ``mxperts.formats`` takes
part: of a format only the widths of its fields are used.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mxperts.formats import BlockFormat, ElementFormat, Encoding, NonFinite, Recipe, Rounding, ScaleRule, SignedZero

Bits = npt.NDArray[Any]
"""Bit patterns: uint16 or uint32 of floats, uint8 of codes and scales."""
Ints = npt.NDArray[np.int64]

BLOCK = 32
LEAST, MOST, NAN = -127, 127, 255
"""Exponents of the smallest and the largest shared scale, and the byte that is NaN."""


@dataclass(frozen=True, kw_only=True)
class Float:
    """A floating-point format of IEEE 754's kind.

    Attributes:
        name: PyTorch's name of it.
        exponent_bits, mantissa_bits: widths of its fields.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int

    @property
    def bits(self) -> np.dtype[Any]:
        """Unsigned integers of its width."""
        return np.dtype(f"<u{(1 + self.exponent_bits + self.mantissa_bits) // 8}")

    @property
    def least(self) -> int:
        """Exponent of the smallest normal number."""
        return 2 - (1 << (self.exponent_bits - 1))

    @property
    def sign(self) -> int:
        """The pattern of -0."""
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @property
    def inf(self) -> int:
        """The pattern of Inf; greater ones without a sign are NaN."""
        return self.sign - (1 << self.mantissa_bits)

    @property
    def nan(self) -> int:
        """The pattern that stands for every NaN in golden bytes."""
        return self.inf | (1 << (self.mantissa_bits - 1))

    @property
    def torch(self) -> torch.dtype:
        """PyTorch's dtype."""
        dtype: torch.dtype = getattr(torch, self.name)
        return dtype

    def value(self, pattern: int) -> Fraction:
        """The number of a finite pattern."""
        fraction, field = pattern & ((1 << self.mantissa_bits) - 1), (pattern & (self.sign - 1)) >> self.mantissa_bits
        whole = Fraction(fraction if field == 0 else fraction | 1 << self.mantissa_bits)
        magnitude = whole * _power(max(field, 1) - 1 + self.least - self.mantissa_bits)
        return -magnitude if pattern & self.sign else magnitude

    def pattern(self, magnitude: Fraction) -> int:
        """The nearest number to one >= 0, ties to even; Inf from half a unit beyond the largest on."""
        if magnitude == 0:
            return 0
        exponent = max(floor_log2(magnitude), self.least)
        units = round(magnitude / _power(exponent - self.mantissa_bits))  # Python rounds halves to even
        return min(((exponent - self.least) << self.mantissa_bits) + units, self.inf)


BFLOAT16 = Float(name="bfloat16", exponent_bits=8, mantissa_bits=7)
FLOAT16 = Float(name="float16", exponent_bits=5, mantissa_bits=10)
FLOAT32 = Float(name="float32", exponent_bits=8, mantissa_bits=23)


def _power(exponent: int) -> Fraction:
    return Fraction(1 << exponent) if exponent >= 0 else Fraction(1, 1 << -exponent)


def floor_log2(x: Fraction) -> int:
    """The exponent of the largest power of two that is not above ``x`` > 0."""
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if _power(guess) <= x else guess - 1


@lru_cache
def elements(element: ElementFormat) -> tuple[Fraction | None, ...]:
    """The magnitude of every code, OCP MX v1.0 section 5.3; None for Inf and NaN."""
    found: list[Fraction | None] = []
    mantissas = 1 << element.mantissa_bits
    for code in range(1 << element.bits):
        if element.encoding is Encoding.TWOS_COMPLEMENT:
            integer = code if code < element.sign_bit else (1 << element.bits) - code
            found.append(Fraction(integer, mantissas // 2))
            continue
        field, mantissa = divmod(code & (element.sign_bit - 1), mantissas)
        top = field == (1 << element.exponent_bits) - 1
        if (element.encoding is Encoding.IEEE and top) or (
            element.encoding is Encoding.NAN and top and mantissa == mantissas - 1
        ):
            found.append(None)
        else:
            whole = Fraction(mantissa if field == 0 else mantissas + mantissa, mantissas)
            found.append(whole * _power(max(field, 1) - element.bias))
    return tuple(found)


@lru_cache
def is_inf(element: ElementFormat, code: int) -> bool:
    """Whether a code is Inf of either sign."""
    top = ((1 << element.exponent_bits) - 1) << element.mantissa_bits
    return element.encoding is Encoding.IEEE and code & (element.sign_bit - 1) == top


@lru_cache
def magnitudes(element: ElementFormat) -> tuple[Fraction, ...]:
    """The finite positive numbers, and 0, in increasing order: the index of each is its code."""
    return tuple(v for v in elements(element)[: element.sign_bit] if v is not None)


def scale_exponent(amax: Fraction, element: ElementFormat, recipe: Recipe) -> int:
    """The exponent of the shared scale of a block whose largest magnitude is ``amax`` > 0; see ``ScaleRule``."""
    exponent, largest = floor_log2(amax), magnitudes(element)[-1]
    emax = floor_log2(largest)
    mantissa, of_largest = amax / _power(exponent), largest / _power(emax)
    match recipe.scale_rule:
        case ScaleRule.FLOOR:
            pass
        case ScaleRule.EVEN:
            bits = element.mantissa_bits if recipe.even_bits is None else recipe.even_bits
            exponent += mantissa >= 2 - _power(-(bits + 1))
            if recipe.even_overflow and exponent >= 128:
                return MOST
        case ScaleRule.RCEIL:
            exponent += mantissa > of_largest
        case ScaleRule.CEIL:
            exponent += mantissa > 1
        case ScaleRule.RFLOOR:
            exponent -= mantissa < of_largest
    return min(max(exponent - emax, LEAST), MOST)


@lru_cache(1 << 20)
def nearest(odd: int, exponent: int, element: ElementFormat, rounding: Rounding) -> int:
    """The index, in the table of magnitudes, of ``odd * 2^exponent``; one past its end is possible for an integer."""
    x, table = Fraction(odd) * _power(exponent), magnitudes(element)
    if element.encoding is Encoding.TWOS_COMPLEMENT:
        table = (*table, 2 * table[-1] - table[-2])
    above = bisect.bisect_left(table, x)
    if above == len(table) or x == table[above]:
        return min(above, len(table) - 1)
    below = above - 1
    middle = (table[below] + table[above]) / 2
    match rounding:
        case Rounding.NEAREST_EVEN:
            up = x > middle or (x == middle and above % 2 == 0)
        case Rounding.HALF_AWAY:
            up = x >= middle
        case Rounding.HALF_TOWARD_ZERO:
            up = x > middle
        case Rounding.TOWARD_ZERO:
            up = False
        case Rounding.STOCHASTIC:
            raise AssertionError("a draw has no golden bytes")
    return above if up else below


def quantize(x: Bits, dtype: Float, fmt: BlockFormat, recipe: Recipe) -> tuple[Bits, Bits]:
    """Codes uint8 [rows, ceil(K / 32) * 32], padding included, and scales uint8 [rows, ceil(K / 32)].

    Args:
        x: bit patterns [rows, K].
        dtype: what they are patterns of.
        fmt, recipe: as in ``mxperts.quantize``; neither NaN nor Inf may be "raise".
    """
    element = fmt.element
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK))).reshape(len(x), -1, BLOCK).astype(np.int64)
    magnitude, negative = blocks & (dtype.sign - 1), (blocks & dtype.sign) != 0
    nan, inf = magnitude > dtype.inf, magnitude == dtype.inf
    amax = np.where(nan, 0, magnitude).max(-1)  # [rows, K/32]: patterns are ordered as their numbers are
    scale = _each(amax, lambda pattern: _scale(pattern, dtype, element, recipe))

    odd, exponent = _split(np.where(nan | inf, 0, magnitude), dtype)
    key = (odd << 12) | (exponent - scale[..., None] + 2048)
    code = _each(key, lambda k: nearest(k >> 12, (k & 4095) - 2048, element, recipe.rounding) if k >> 12 else 0)
    last = len(magnitudes(element)) - 1
    saturated = (nan & (recipe.nan is NonFinite.SATURATE)) | (inf & (recipe.inf is NonFinite.SATURATE))
    limit = np.where(negative & ~saturated, last + (recipe.use_min and not element.has_signed_zero), last)
    code = np.where(saturated, last, np.minimum(code, limit))
    if element.has_signed_zero:
        match recipe.signed_zero:
            case SignedZero.KEEP:
                signed = negative
            case SignedZero.DROP:
                signed = negative & (code != 0)
            case SignedZero.KEEP_ROUNDED:
                signed = negative & (magnitude != 0)
        code = code | np.where(signed, element.sign_bit, 0)
    else:
        code = np.where(negative, -code, code) & ((1 << element.bits) - 1)

    byte = np.where(amax == 0, recipe.zero_block_scale, scale - LEAST)
    lost = (nan.any(-1) & (recipe.nan is NonFinite.BLOCK_NAN)) | (inf.any(-1) & (recipe.inf is NonFinite.BLOCK_NAN))
    byte, code = np.where(lost, NAN, byte), np.where(lost[..., None], 0, code)
    return code.reshape(len(x), -1).astype(np.uint8), byte.astype(np.uint8)


@lru_cache(1 << 20)
def _scale(pattern: int, dtype: Float, element: ElementFormat, recipe: Recipe) -> int:
    if pattern == 0:
        return LEAST
    return scale_exponent(_power(128) if pattern == dtype.inf else dtype.value(pattern), element, recipe)


def _split(magnitude: Ints, dtype: Float) -> tuple[Ints, Ints]:
    """Odd integers and exponents of finite patterns without a sign; 0 has exponent 0."""
    field, fraction = magnitude >> dtype.mantissa_bits, magnitude & ((1 << dtype.mantissa_bits) - 1)
    whole = np.where(field == 0, fraction, fraction | 1 << dtype.mantissa_bits)
    twos: Ints = np.zeros_like(whole)
    for bit in range(dtype.mantissa_bits):
        twos += (whole != 0) & (whole & ((2 << bit) - 1) == 0)
    exponent = np.maximum(field, 1) - 1 + dtype.least - dtype.mantissa_bits + twos
    return whole >> twos, np.where(whole == 0, 0, exponent)


def _each(keys: Ints, answer: Any) -> Ints:
    """The answer to every key, asked once for each distinct one."""
    distinct, place = np.unique(keys, return_inverse=True)
    return np.array([answer(int(key)) for key in distinct], dtype=np.int64)[place].reshape(keys.shape)


@lru_cache
def values(fmt: BlockFormat, dtype: Float) -> Bits:
    """Patterns [256, codes] of every code under every scale byte: the exact product, in float32, in ``dtype``."""
    element = fmt.element
    found = np.empty((NAN + 1, 1 << element.bits), dtype=dtype.bits)
    for code, magnitude in enumerate(elements(element)):
        sign = dtype.sign if code & element.sign_bit and (element.has_signed_zero or magnitude) else 0
        for byte in range(NAN):
            if magnitude is None:
                found[byte, code] = sign | dtype.inf if is_inf(element, code) else dtype.nan
            else:
                found[byte, code] = sign | _in_float32_first(magnitude * _power(byte + LEAST), dtype)
    found[NAN] = dtype.nan
    return found


def _in_float32_first(magnitude: Fraction, dtype: Float) -> int:
    single = FLOAT32.pattern(magnitude)
    return dtype.inf if single == FLOAT32.inf else dtype.pattern(FLOAT32.value(single))


def dequantize(codes: Bits, scales: Bits, fmt: BlockFormat, dtype: Float) -> Bits:
    """Patterns, of the shape of ``codes`` [rows, blocks * 32], under ``scales`` [rows, blocks]."""
    found: Bits = values(fmt, dtype)[np.repeat(scales, BLOCK, axis=-1), codes]
    return found


def pack(codes: Bits, fmt: BlockFormat) -> Bits:
    """A little-endian bit stream, uint8 [rows, K * bits / 8], of codes uint8 [rows, K]."""
    bits = np.unpackbits(codes[..., None], axis=-1, count=fmt.element.bits, bitorder="little")
    return np.packbits(bits.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack(packed: Bits, fmt: BlockFormat) -> Bits:
    """The codes that ``pack`` packed."""
    bits = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, fmt.element.bits)
    codes: Bits = np.packbits(bits, axis=-1, bitorder="little")[..., 0]
    return codes


def canonical(x: Bits, dtype: Float) -> Bits:
    """Patterns in which every NaN is the same."""
    return np.where((x & (dtype.sign - 1)) > dtype.inf, dtype.nan, x).astype(dtype.bits)
