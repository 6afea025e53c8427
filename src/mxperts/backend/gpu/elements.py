"""From codes to numbers, in kernels: of the elements, of the scales and of tiles of weights.

Numbers are built from the bits of float32 and multiplied by powers of two. Some of these operands and products are
subnormal, and exact: no kernel here is compiled to flush such numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxperts.backend.gpu.convert import from_float32
from mxperts.backend.gpu.packing import load_codes

BLOCK = tl.constexpr(32)
_SIGN = tl.constexpr(-(1 << 31))
_INF = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
_TWO_TO_MINUS_127 = tl.constexpr(0x00400000)


@triton.jit
def decode_codes(codes, ELEMENT: tl.constexpr):
    """The numbers of codes: float32 of their shape, exact; -0, Inf and NaN where the format has them.

    Args:
        codes: int32, any shape; bits above the code's width must be 0.
        ELEMENT: from ``rule.element_rule``.
    """
    if ELEMENT.integer:
        signed = (codes << (32 - ELEMENT.bits)) >> (32 - ELEMENT.bits)
        return signed.to(tl.float32) * ELEMENT.decode_scale
    else:
        magnitude = (codes << (23 - ELEMENT.mantissa_bits)) & (
            ((1 << (ELEMENT.bits - 1)) - 1) << (23 - ELEMENT.mantissa_bits)
        )
        bits = magnitude | ((codes << (32 - ELEMENT.bits)) & _SIGN)
        values = bits.to(tl.float32, bitcast=True) * ELEMENT.decode_scale
        if ELEMENT.special < 1 << (ELEMENT.bits - 1):
            # Their mantissa is that of Inf or NaN already, only the exponent is not
            special = magnitude >= (ELEMENT.special << (23 - ELEMENT.mantissa_bits))
            values = tl.where(special, (bits | _INF).to(tl.float32, bitcast=True), values)
        return values


@triton.jit
def encode_elements(magnitudes, signs, signed, ELEMENT: tl.constexpr):
    """The codes of elements: int32 of their shape.

    Args:
        magnitudes: float32, any shape, each the absolute value of a code's number, which is finite.
        signs: int32 of that shape, negative where the sign is set; zeros of integers must have none.
        signed: int32, broadcast against that shape, 0 where no sign is wanted and -1 elsewhere.
        ELEMENT: from ``rule.element_rule``.
    """
    mantissa_bits: tl.constexpr = ELEMENT.mantissa_bits
    if ELEMENT.integer:
        # Added to 2^(23 - mantissa_bits), whose unit in the last place is the smallest element
        shifted = (magnitudes + 2.0 ** (23 - mantissa_bits)).to(tl.int32, bitcast=True)
        negative = (signs >> 31) & signed
        return ((shifted ^ negative) - negative) & ((1 << ELEMENT.bits) - 1)
    else:
        bits = (magnitudes * ELEMENT.encode_scale).to(tl.int32, bitcast=True)
        sign = (signs >> (32 - ELEMENT.bits)) & (signed & (1 << (ELEMENT.bits - 1)))
        return (bits >> (23 - mantissa_bits)) | sign


@triton.jit
def scale_factors(scales):
    """2^(scale - 127), and NaN for 255: float32 of the shape of ``scales``, int32 in 0 .. 255."""
    bits = tl.where(scales == 0, _TWO_TO_MINUS_127, scales << 23)
    return tl.where(scales == 255, _NAN, bits).to(tl.float32, bitcast=True)


@triton.jit
def inverse_scale_factors(scales):
    """2^(127 - scale): float32 of the shape of ``scales``, int32 in 0 .. 254."""
    bits = tl.where(scales == 254, _TWO_TO_MINUS_127, (254 - scales) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def decode_weight_tile(
    packed_ptr,
    scales_ptr,
    rows,
    row_mask,
    k0,
    blocks,
    BLOCK_K: tl.constexpr,
    ELEMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The weights ``[rows, k0 : k0 + BLOCK_K]``: element * 2^(scale - 127), in float32 and rounded once to ``DTYPE``.

    Args:
        packed_ptr: to codes uint8 [..., blocks * 4 * bits], contiguous.
        scales_ptr: to scales uint8 [..., blocks], contiguous.
        rows: int64 [R], the row's number: expert * N + n.
        row_mask: int1 [R]; rows that are masked are 0.
        k0: first column, a multiple of 32.
        blocks: blocks of 32 in a row; columns of others are 0.
        BLOCK_K: a power of two, 32 or more.
        ELEMENT: from ``rule.element_rule``.
        DTYPE: float32, bfloat16 or float16.

    Returns:
        [R, BLOCK_K]; blocks of scale 255 are NaN.
    """
    pack_elements: tl.constexpr = ELEMENT.pack_elements
    groups = blocks * (BLOCK // pack_elements)
    codes = load_codes(packed_ptr, rows, row_mask, k0 // pack_elements, groups, BLOCK_K, ELEMENT)
    columns = k0 // BLOCK + tl.arange(0, BLOCK_K // BLOCK)
    mask = row_mask[:, None] & (columns < blocks)[None, :]
    scales = tl.load(scales_ptr + (rows * blocks)[:, None] + columns[None, :], mask=mask, other=0).to(tl.int32)
    shape: tl.constexpr = (codes.shape[0], BLOCK_K // BLOCK, BLOCK)
    values = tl.reshape(decode_codes(codes, ELEMENT), shape) * scale_factors(scales)[:, :, None]
    return from_float32(tl.reshape(values, codes.shape), DTYPE)
