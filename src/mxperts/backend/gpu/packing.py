"""Codes to packed bytes and back, in kernels: the little-endian bit stream of ``mxperts.packing``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack_4(packed):
    """The codes of bytes of two: int32 [R, 2 * P] of ``packed`` uint8 [R, P]."""
    both = packed.to(tl.int32)
    codes = tl.join(both & 0xF, both >> 4)
    return tl.reshape(codes, [packed.shape[0], 2 * packed.shape[1]])


@triton.jit
def unpack_6(first, second, third):
    """The codes of groups of three bytes: int32 [R, 4 * G].

    Args:
        first, second, third: uint8 [R, G], the bytes of each group, lowest bits first.
    """
    word = first.to(tl.int32) | (second.to(tl.int32) << 8) | (third.to(tl.int32) << 16)
    even = tl.join(word & 0x3F, (word >> 12) & 0x3F)
    odd = tl.join((word >> 6) & 0x3F, word >> 18)
    return tl.reshape(tl.join(even, odd), [first.shape[0], 4 * first.shape[1]])


@triton.jit
def load_codes(packed_ptr, rows, row_mask, group, groups, COUNT: tl.constexpr, ELEMENT: tl.constexpr):
    """Codes of ``COUNT`` consecutive elements of each row: int32 [R, COUNT], in their order; 0 where masked.

    Args:
        packed_ptr: to uint8 [..., groups * pack_bytes], contiguous.
        rows: int64 [R], the row's number.
        row_mask: int1 [R].
        group: first group of ``pack_elements`` codes to load.
        groups: in a row; what lies beyond is masked.
        COUNT: a power of two.
        ELEMENT: from ``rule.element_rule``.
    """
    columns = group + tl.arange(0, COUNT // ELEMENT.pack_elements)
    mask = row_mask[:, None] & (columns < groups)[None, :]
    at = packed_ptr + (rows * (groups * ELEMENT.pack_bytes))[:, None] + (columns * ELEMENT.pack_bytes)[None, :]
    first = tl.load(at, mask=mask, other=0)
    if ELEMENT.bits == 8:
        return first.to(tl.int32)
    elif ELEMENT.bits == 4:
        return unpack_4(first)
    else:
        tl.static_assert(ELEMENT.bits == 6, "codes have 4, 6 or 8 bits")
        second = tl.load(at + 1, mask=mask, other=0)
        third = tl.load(at + 2, mask=mask, other=0)
        return unpack_6(first, second, third)


@triton.jit
def store_codes(packed_ptr, codes, rows, row_mask, ELEMENT: tl.constexpr):
    """Pack and store whole rows of codes.

    Args:
        packed_ptr: to uint8 [..., K * bits / 8], contiguous, at a multiple of 4 bytes.
        codes: int32 [R, K], K a multiple of 16, bits above the code's width 0.
        rows: [R], the row's number.
        row_mask: int1 [R], which rows to store.
        ELEMENT: from ``rule.element_rule``.
    """
    groups: tl.constexpr = codes.shape[1] // ELEMENT.pack_elements
    at = packed_ptr + (rows * (groups * ELEMENT.pack_bytes))[:, None] + tl.arange(0, groups)[None, :]
    mask = row_mask[:, None]
    if ELEMENT.bits == 8:
        tl.store(at, codes.to(tl.uint8), mask=mask)
    elif ELEMENT.bits == 4:
        low, high = tl.split(tl.reshape(codes, [codes.shape[0], groups, 2]))
        tl.store(at, (low + high * 16).to(tl.uint8), mask=mask)
    else:
        tl.static_assert(ELEMENT.bits == 6, "codes have 4, 6 or 8 bits")
        # 16 codes are three words; a byte a store would be slower than memory
        first, second, third, fourth = _in_fours(codes)
        first, second, third, fourth = _in_fours(first + second * (1 << 6) + third * (1 << 12) + fourth * (1 << 18))
        words = packed_ptr.to(tl.pointer_type(tl.int32)) + (rows * (groups * ELEMENT.pack_bytes // 4))[:, None]
        words += tl.arange(0, groups // 4)[None, :] * 3
        tl.store(words, first | (second << 24), mask=mask)
        tl.store(words + 1, (second >> 8) | (third << 16), mask=mask)
        tl.store(words + 2, (third >> 16) | (fourth << 8), mask=mask)


@triton.jit
def _in_fours(x):
    """The first, second, third and fourth of every four: [R, K / 4] each of ``x`` [R, K]."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth
