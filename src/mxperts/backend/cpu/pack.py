"""Blocks of 32 numbers into the rows that the paths read: ordered as decoded weights are, in their number format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mxperts.backend.cpu import simd
from mxperts.backend.cpu.avx512 import START_AT, T_AT
from mxperts.backend.cpu.decode import Decoder, Integers
from mxperts.backend.cpu.jit import native
from mxperts.backend.cpu.rule import BLOCK
from mxperts.formats import BlockFormat

_F32, _I32, _I16 = (ir.VectorType(t, BLOCK) for t in (simd.F32, simd.I32, simd.I16))


@dataclass(frozen=True)
class Packing:
    """What is packed for which weights.

    Attributes:
        weight: format of the weights.
        activation: the integer format whose elements are packed, or None for numbers.
        planes: into how many rows of bf16 a row of numbers is split; 0 for float32 as they are.
    """

    weight: BlockFormat
    activation: BlockFormat | None
    planes: int

    def emitted(self) -> Any:
        """The code of ``pack_block``."""
        if self.activation is not None:
            return pack_integers(self.weight, self.activation)
        return pack_bf16(self.weight, self.planes) if self.planes else pack_float32(self.weight)

    def __str__(self) -> str:
        return f"{self.weight} {self.activation} {self.planes}"


@lru_cache
def pack_block(packing: Packing) -> Any:
    """The native function that packs a block.

    Its arguments: address of the numbers, float32 [32]; address of their elements, if there are; the scale byte;
    address of the block in the row; bytes from one plane's row to the next.
    """
    emitted = packing.emitted()

    @native(5, str(packing))
    def pack(source: int, elements: int, byte: int, target: int, stride: int) -> None:
        emitted(source, elements, byte, target, stride)

    return pack


def pack_float32(fmt: BlockFormat) -> Any:
    """``pack_block`` for float32 as they are."""
    order = ir.Constant(ir.VectorType(simd.I32, BLOCK), Decoder(fmt).words.order(BLOCK))

    @intrinsic  # type: ignore[untyped-decorator]
    def pack(typing: Any, source: Any, elements: Any, byte: Any, target: Any, stride: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
            x = simd.load(b, values[0], _F32, align=4)
            x = b.shuffle_vector(x, ir.Constant(_F32, ir.Undefined), order)
            simd.store(b, x, values[3], align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return pack


def pack_bf16(fmt: BlockFormat, planes: int) -> Any:
    """``pack_block`` for bf16.

    The sum of the planes, 8 bits each, is the number: one holds what was bf16, two what was float16, three any float32.
    What is not finite is in the first.
    """
    order = ir.Constant(ir.VectorType(simd.I32, BLOCK), Decoder(fmt).words.order(BLOCK))

    @intrinsic  # type: ignore[untyped-decorator]
    def pack(typing: Any, source: Any, elements: Any, byte: Any, target: Any, stride: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
            source, _, _, target, stride = values
            x = simd.load(b, source, _F32, align=4)
            x = b.shuffle_vector(x, ir.Constant(_F32, ir.Undefined), order)
            quiet = simd.constant(_I32, 0x00400000)
            for plane in range(planes):
                bits = b.bitcast(x, _I32)
                magnitude = b.and_(bits, simd.constant(_I32, 0x7FFFFFFF))
                infinity = simd.constant(_I32, 0x7F800000)
                bits = b.select(b.icmp_signed(">", magnitude, infinity), b.or_(bits, quiet), bits)
                top = simd.shift_right(b, bits, 16)
                simd.store(b, b.trunc(top, _I16), b.add(target, b.mul(stride, simd.I64(plane))), align=4)
                rest = b.fsub(x, b.bitcast(simd.shift_right(b, top, -16), _F32))
                finite = b.icmp_signed("<", magnitude, infinity)
                x = b.select(finite, rest, simd.constant(_F32, 0.0))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return pack


def pack_integers(weight: BlockFormat, activation: BlockFormat) -> Any:
    """``pack_block`` for elements of ``activation`` and integer weights: see ``avx512.VNNI``."""
    of_weight, of_input = Integers.of(weight.element), Integers.of(activation.element)
    assert of_weight is not None
    assert of_input is not None
    order = ir.Constant(ir.VectorType(simd.I32, BLOCK), Decoder(weight).byte_order())
    unit = 2.0**of_input.fraction_bits
    fraction_bits = of_weight.fraction_bits + of_input.fraction_bits

    @intrinsic  # type: ignore[untyped-decorator]
    def pack(typing: Any, source: Any, elements: Any, byte: Any, target: Any, stride: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
            _, source, byte, target, _ = values
            x = simd.load(b, source, _F32, align=4)
            x = b.shuffle_vector(x, ir.Constant(_F32, ir.Undefined), order)
            integers = b.fptosi(b.fmul(x, simd.constant(_F32, unit)), _I32)
            simd.store(b, b.trunc(integers, ir.VectorType(simd.I8, BLOCK)), target, align=4)
            total = simd.call(b, f"llvm.vector.reduce.add.v{BLOCK}i32", simd.I32, [integers])
            start = b.mul(total, simd.I32(-of_weight.offset))
            # 2^(byte - 127 - fraction bits), a subnormal number if need be
            field = b.sub(b.trunc(byte, simd.I32), simd.I32(fraction_bits))
            normal = b.shl(field, simd.I32(23))
            drop = b.sub(simd.I32(1), field)
            subnormal = b.lshr(simd.I32(1 << 23), b.select(b.icmp_signed("<", drop, simd.I32(1)), simd.I32(1), drop))
            t = b.select(b.icmp_signed(">", field, simd.I32(0)), normal, subnormal)
            t = b.select(b.icmp_signed("==", byte, simd.I64(255)), simd.I32(0x7FC00000), t)
            simd.store(b, t, target, offset=T_AT, align=4)
            simd.store(b, start, target, offset=START_AT, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return pack
