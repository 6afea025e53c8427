"""The block-32 Hadamard rotation of an input, compiled into kernels: ``mxperts.rotation`` says what it computes."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mxperts.backend.cpu.blocks import Memory
from mxperts.backend.cpu.lanes import Lanes
from mxperts.backend.cpu.rule import BLOCK, bits_of
from mxperts.rotation import INPUT_FACTOR, STRIDES

_SIGN = -(1 << 31)


def rotate(bits: Lanes) -> Lanes:
    """A block of float32, rotated as inputs are.

    In each step a lane gets its partner plus itself, or minus itself where it is the second of the pair; that is a + b
    and a - b to the bit, for a - b is a + (-b) and the order of a sum makes no difference.
    """
    for stride in STRIDES:
        partner = bits.pick([i ^ stride for i in range(BLOCK)])
        second = [_SIGN if i & stride else 0 for i in range(BLOCK)]
        bits = partner.plus(bits ^ Lanes(bits.builder, ir.Constant(bits.value.type, second)))
    return bits.times(bits_of(INPUT_FACTOR))


@intrinsic  # type: ignore[untyped-decorator]
def rotate_block(typing: Any, x: Any) -> Any:
    """Rotate 32 numbers, float32 [32], in place: ``rotate_block(x)``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        memory = Memory(context, builder, signature.args[0], args[0])
        memory.store_lanes(rotate(memory.load()))
        return context.get_dummy_value()

    return types.none(x), generate
