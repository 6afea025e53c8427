"""Products in float32, for CPUs without AVX-512 and for numbers of any size: the kernels of one strip.

No instruction here belongs to one CPU: LLVM makes what it can of vectors of ``lanes`` float32. Weights are decoded to
exactly what the dtype of the hidden states holds of them, Inf and rounded subnormals included, by arithmetic on the
fields of their codes. Each block of 32 has a sum of its own, which is then added to the row's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from mxperts.backend.cpu import simd
from mxperts.backend.cpu.avx512 import row_pointers
from mxperts.backend.cpu.call import BF16, FP16
from mxperts.backend.cpu.decode import Decoder
from mxperts.backend.cpu.layout import QUARTERS, STRIP
from mxperts.backend.cpu.rule import BLOCK
from mxperts.formats import ElementFormat
from mxperts.formats.element import Encoding

BLOCK_BYTES = 4 * BLOCK
"""Bytes of a block of the input: float32 in the order of ``Words.order``."""
QUARTER = STRIP // QUARTERS


def _vector(element: Any, lanes: int) -> Any:
    return ir.VectorType(element, lanes)


def _element(b: Any, code: Any, element: ElementFormat) -> Any:
    """float32 of codes in int32 lanes, whose other bits are 0."""
    ints, floats = code.type, ir.VectorType(simd.F32, code.type.count)

    def number(value: int) -> Any:
        return simd.constant(ints, value)

    if element.encoding is Encoding.TWOS_COMPLEMENT:
        shift = number(32 - element.bits)
        integer = b.sitofp(b.ashr(b.shl(code, shift), shift), floats)
        return b.fmul(integer, simd.constant(floats, element.smallest))
    mantissa_bits = element.mantissa_bits
    magnitude = b.and_(code, number(element.sign_bit - 1))
    normal = b.add(b.shl(magnitude, number(23 - mantissa_bits)), number((127 - element.bias) << 23))
    subnormal = b.bitcast(b.fmul(b.sitofp(magnitude, floats), simd.constant(floats, element.smallest)), ints)
    bits = b.select(b.icmp_signed("<", magnitude, number(1 << mantissa_bits)), subnormal, normal)
    last = len(element.magnitudes) - 1  # codes beyond it are no finite numbers
    if last < element.sign_bit - 1:
        special = number(0x7FC00000)
        if element.encoding is Encoding.IEEE:
            special = b.select(b.icmp_signed("==", magnitude, number(last + 1)), number(0x7F800000), special)
        bits = b.select(b.icmp_signed(">", magnitude, number(last)), special, bits)
    sign = b.shl(b.and_(code, number(element.sign_bit)), number(32 - element.bits))
    return b.bitcast(b.or_(bits, sign), floats)


def _codes(b: Any, words: list[Any], bits: int, half: int, j: int) -> Any:
    """The ``j``-th code of a half of each lane, from vectors of int32 lanes."""
    word, shift = divmod(j * bits, 16)
    code = simd.shift_right(b, words[word], 16 * half + shift)
    here = min(16 - shift, bits)
    code = b.and_(code, simd.constant(code.type, (1 << here) - 1))
    if here < bits:
        rest = b.and_(simd.shift_right(b, words[word + 1], 16 * half), simd.constant(code.type, (1 << bits - here) - 1))
        code = b.or_(code, simd.shift_right(b, rest, -here))
    return code


def _rounded(b: Any, x: Any, kind: int) -> Any:
    """float32 with at most 8 significant bits, rounded to what a dtype holds."""
    floats = x.type
    ints = ir.VectorType(simd.I32, floats.count)
    bits = b.bitcast(x, ints)
    magnitude = b.and_(bits, simd.constant(ints, 0x7FFFFFFF))
    if kind == BF16:  # inexact only below 2^-126; there are no carries into Inf or NaN
        last = b.and_(simd.shift_right(b, bits, 16), simd.constant(ints, 1))
        rounded = b.add(bits, b.add(last, simd.constant(ints, 0x7FFF)))
        rounded = b.and_(rounded, simd.constant(ints, 0xFFFF0000))
        small = b.icmp_signed("<", magnitude, simd.constant(ints, 1 << 23))
        return b.bitcast(b.select(small, rounded, bits), floats)
    if kind == FP16:
        # In 1/2 + x the last place is the smallest float16: the sum is rounded as x is to be.
        half = simd.constant(floats, 0.5)
        size = b.bitcast(magnitude, floats)
        subnormal = b.bitcast(b.fsub(b.fadd(half, size), half), ints)
        tiny = b.icmp_signed("<", magnitude, simd.constant(ints, (127 - 14) << 23))
        beyond = b.fcmp_ordered(">=", size, simd.constant(floats, 65520.0))
        found = b.select(tiny, subnormal, magnitude)
        found = b.select(beyond, simd.constant(ints, 0x7F800000), found)
        return b.bitcast(b.or_(found, b.and_(bits, simd.constant(ints, 1 << 31))), floats)
    return x


@dataclass(frozen=True)
class Float32:
    """The kernels for vectors of ``lanes`` and for hidden states of a dtype (``kind``)."""

    lanes: int
    kind: int
    fused: bool

    def decode(self, decoder: Decoder) -> Any:
        """Emits tiles to float32 [blocks, quarter, 32, 16]."""
        element, words = decoder.format.element, decoder.words
        tile_bytes = STRIP + STRIP * decoder.format.block_bytes
        ints = _vector(simd.I32, self.lanes)

        def body(b: Any, arguments: Sequence[Any]) -> None:
            tiles, blocks, values, _ = arguments

            def turn(block: Any, carried: list[Any]) -> list[Any]:
                tile = b.add(tiles, b.mul(block, simd.I64(tile_bytes)))
                out = b.add(values, b.mul(block, simd.I64(4 * BLOCK * STRIP)))

                def part(i: Any, carried: list[Any]) -> list[Any]:
                    # The i-th vector of rows of the strip: quarter i / per_quarter, ``at`` bytes into its rows
                    per_quarter = simd.I64(QUARTER // self.lanes)
                    quarter, at = b.udiv(i, per_quarter), b.mul(b.urem(i, per_quarter), simd.I64(4 * self.lanes))
                    codes = b.add(tile, b.add(b.mul(quarter, simd.I64(QUARTER * decoder.format.block_bytes)), at))
                    target = b.add(out, b.add(b.mul(quarter, simd.I64(4 * BLOCK * QUARTER)), at))
                    scale = simd.e8m0(b, b.add(tile, b.mul(i, simd.I64(self.lanes))), 0, self.lanes)
                    for group in range(decoder.groups):
                        loaded = [
                            simd.load(b, codes, ints, offset=STRIP + 64 * (group * words.words + w), align=4)
                            for w in range(words.words)
                        ]
                        for j in range(words.codes):
                            for half in (0, 1):
                                value = _element(b, _codes(b, loaded, element.bits, half, j), element)
                                value = _rounded(b, b.fmul(value, scale), self.kind)
                                k = 2 * (group * words.codes + j) + half
                                simd.store(b, value, target, offset=4 * QUARTER * k, align=4)
                    return []

                simd.counted(b, simd.I64(STRIP // self.lanes), [], part)
                return []

            simd.counted(b, blocks, [], turn)

        return body

    def decoded(self, rows: int) -> Any:
        """Emits sums [rows, 64] += rows x decoded values."""
        floats, per_quarter = _vector(simd.F32, self.lanes), QUARTER // self.lanes
        name = "fma" if self.fused else "fmuladd"

        def body(b: Any, arguments: Sequence[Any]) -> None:
            values, _, blocks, row_table, offset, sums = arguments
            x = [b.add(p, offset) for p in row_pointers(b, row_table, rows)]
            slots = [(m, v) for m in range(rows) for v in range(per_quarter)]

            def quarter(q: Any, carried: list[Any]) -> list[Any]:
                sums_at = b.add(sums, b.mul(q, simd.I64(4 * QUARTER)))
                values_at = b.add(values, b.mul(q, simd.I64(4 * BLOCK * QUARTER)))

                places = [256 * m + 4 * self.lanes * v for m, v in slots]

                def turn(block: Any, carried: list[Any]) -> list[Any]:
                    at = b.add(values_at, b.mul(block, simd.I64(4 * BLOCK * STRIP)))
                    here = [b.add(p, b.mul(block, simd.I64(BLOCK_BYTES))) for p in x]

                    def step(k: Any, parts: list[Any]) -> list[Any]:
                        w_at = b.add(at, b.mul(k, simd.I64(4 * QUARTER)))
                        w = [simd.load(b, w_at, floats, offset=4 * self.lanes * v, align=4) for v in range(per_quarter)]
                        following = []
                        for m in range(rows):
                            x_at = b.add(here[m], b.mul(k, simd.I64(4)))
                            one = simd.splat(b, simd.load(b, x_at, simd.F32, align=4), floats)
                            for v in range(per_quarter):
                                terms = [w[v], one, parts[m * per_quarter + v]]
                                following.append(simd.call(b, f"llvm.{name}.v{self.lanes}f32", floats, terms))
                        return following

                    parts = simd.counted(b, simd.I64(BLOCK), [simd.constant(floats, 0.0) for _ in slots], step)
                    for part, place in zip(parts, places, strict=True):
                        so_far = simd.load(b, sums_at, floats, offset=place, align=4)
                        simd.store(b, b.fadd(so_far, part), sums_at, offset=place, align=4)
                    return []

                simd.counted(b, blocks, [], turn)
                return []

            simd.counted(b, simd.I64(QUARTERS), [], quarter)

        return body
