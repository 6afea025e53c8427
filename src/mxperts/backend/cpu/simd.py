"""Vector instructions by name, as LLVM IR for kernels that Numba compiles.

Addresses are 64-bit integers. Vectors are 512 bits wide: ``WIDTH`` lanes of 32 bits. Where LLVM has an operation of its
own it is used, so that any CPU can run it; what exists on x86 alone is marked so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

WIDTH = 16
"""32-bit lanes of a vector."""


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


VOID, F32, BF16 = ir.VoidType(), ir.FloatType(), BFloat()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32S, I32S = ir.VectorType(F32, WIDTH), ir.VectorType(I32, WIDTH)
I16S, BF16S = ir.VectorType(I16, 2 * WIDTH), ir.VectorType(BF16, 2 * WIDTH)
I8S = ir.VectorType(I8, 4 * WIDTH)


def constant(type_: Any, values: Sequence[int | float] | int | float) -> Any:
    """A vector constant; one number fills all lanes."""
    listed = [values] * type_.count if isinstance(values, int | float) else list(values)
    return ir.Constant(type_, listed)


def call(b: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    """A call of an LLVM intrinsic."""
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [a.type for a in arguments]), name)
    return b.call(function, arguments)


def load(b: Any, address: Any, type_: Any, *, offset: int = 0, align: int = 1) -> Any:
    """A value of ``type_`` from memory."""
    value = b.load(_pointer(b, address, type_, offset))
    value.align = align
    return value


def store(b: Any, value: Any, address: Any, *, offset: int = 0, align: int = 1) -> None:
    """A value to memory."""
    instruction = b.store(value, _pointer(b, address, value.type, offset))
    instruction.align = align


def _pointer(b: Any, address: Any, type_: Any, offset: int) -> Any:
    # A pointer with an offset lets LLVM fold the offset into the instruction, a sum of integers does not.
    base = b.inttoptr(address, ir.PointerType(I8))
    return b.bitcast(b.gep(base, [I64(offset)]), ir.PointerType(type_))


def opaque(b: Any, address: Any) -> Any:
    """The same address, but LLVM cannot know: what lies there stays in memory instead of in registers it lacks."""
    return b.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [address], side_effect=True)


def prefetch(b: Any, address: Any, offset: int) -> None:
    """Ask for a cache line, into the second-level cache, that will be read soon; any address is allowed."""
    pointer = _pointer(b, address, I8, offset)
    call(b, "llvm.prefetch.p0", VOID, [pointer, I32(0), I32(2), I32(1)])


def splat(b: Any, value: Any, type_: Any) -> Any:
    """A scalar in all lanes."""
    one = b.insert_element(ir.Constant(type_, ir.Undefined), value, I32(0))
    return b.shuffle_vector(one, ir.Constant(type_, ir.Undefined), constant(ir.VectorType(I32, type_.count), 0))


def shift_right(b: Any, vector: Any, bits: int) -> Any:
    """A logical shift of each lane; negative ``bits`` shift left."""
    if bits == 0:
        return vector
    amount = constant(vector.type, abs(bits))
    return b.lshr(vector, amount) if bits > 0 else b.shl(vector, amount)


def select_bits(b: Any, a: Any, c: Any, mask: int) -> Any:
    """``a`` where a bit of ``mask`` is 0, ``c`` where it is 1, in each lane."""
    width = a.type.element.width
    keep, take = constant(a.type, ~mask & ((1 << width) - 1)), constant(a.type, mask)
    return b.or_(b.and_(a, keep), b.and_(c, take))


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """``x * y + z`` with one rounding, where the CPU has that."""
    return call(b, f"llvm.fma.v{x.type.count}f32", x.type, [x, y, z])


def lookup16(b: Any, table: Sequence[Any], index: Any) -> Any:
    """x86 AVX-512: 16-bit entries of a table of 32 or 64 by the low 5 or 6 bits of each 16-bit lane."""
    if len(table) == 1:
        return call(b, "llvm.x86.avx512.permvar.hi.512", I16S, [table[0], index])
    return call(b, "llvm.x86.avx512.vpermi2var.hi.512", I16S, [table[0], index, table[1]])


def lookup8(b: Any, table: Sequence[Any], index: Any) -> Any:
    """x86 AVX-512 VBMI: bytes of a table of 64, 128 or 256 by the low 6, 7 or 8 bits of each byte."""
    if len(table) == 1:
        return call(b, "llvm.x86.avx512.permvar.qi.512", I8S, [table[0], index])
    low = call(b, "llvm.x86.avx512.vpermi2var.qi.512", I8S, [table[0], index, table[1]])
    if len(table) == 2:
        return low
    high = call(b, "llvm.x86.avx512.vpermi2var.qi.512", I8S, [table[2], index, table[3]])
    return b.select(b.icmp_signed("<", index, constant(I8S, 0)), high, low)


def dot_bf16(b: Any, sums: Any, x: Any, y: Any) -> Any:
    """x86 AVX-512 BF16: adds the two products of each 32-bit lane's bf16 pairs; subnormal operands count as zero."""
    operands = [b.bitcast(v, BF16S) for v in (x, y)]
    return call(b, "llvm.x86.avx512bf16.dpbf16ps.512", F32S, [sums, *operands])


def dot_u8_i8(b: Any, sums: Any, x: Any, y: Any) -> Any:
    """x86 AVX-512 VNNI: adds the four products of each 32-bit lane's bytes, ``x`` unsigned and ``y`` signed."""
    operands = [b.bitcast(v, I32S) for v in (x, y)]  # LLVM 20's signature, which later ones translate to theirs
    return call(b, "llvm.x86.avx512.vpdpbusd.512", I32S, [sums, *operands])


def e8m0(b: Any, address: Any, offset: int, lanes: int = WIDTH) -> Any:
    """Shared scales: 2^(byte - 127) as float32, byte 0 a subnormal, byte 255 NaN."""
    ints = ir.VectorType(I32, lanes)
    byte = b.zext(load(b, address, ir.VectorType(I8, lanes), offset=offset), ints)
    bits = b.shl(byte, constant(ints, 23))
    bits = b.select(b.icmp_signed("==", byte, constant(ints, 0)), constant(ints, 1 << 22), bits)
    bits = b.select(b.icmp_signed("==", byte, constant(ints, 255)), constant(ints, 0x7FC00000), bits)
    return b.bitcast(bits, ir.VectorType(F32, lanes))


def counted(b: Any, count: Any, carried: Sequence[Any], body: Callable[[Any, list[Any]], Sequence[Any]]) -> list[Any]:
    """``for i in range(count)`` with values carried from turn to turn; ``count`` may be 0.

    Args:
        carried: the first turn's values.
        body: gets ``i`` and the values of this turn, returns those of the next.

    Returns:
        The values after the last turn.
    """
    before = b.block
    head, turn, after = (b.append_basic_block(name) for name in ("head", "turn", "after"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    i.add_incoming(I64(0), before)
    values = []
    for value in carried:
        phi = b.phi(value.type)
        phi.add_incoming(value, before)
        values.append(phi)
    b.cbranch(b.icmp_signed("<", i, count), turn, after)
    b.position_at_end(turn)
    following = body(i, values)
    i.add_incoming(b.add(i, I64(1)), b.block)
    for phi, value in zip(values, following, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return values


def define(module: Any, name: str, arguments: int, body: Callable[[Any, Sequence[Any]], None]) -> Any:
    """A function of 64-bit integers that is compiled once and called, not inlined; found again by its name."""
    function = module.globals.get(name)
    if function is not None:
        return function
    function = ir.Function(module, ir.FunctionType(VOID, [I64] * arguments), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    body(builder, function.args)
    builder.ret_void()
    return function


def switch(b: Any, value: Any, cases: Sequence[int], emit: Callable[[int], None]) -> None:
    """One of several pieces of code by a 64-bit value; none if it is not among them."""
    after = b.append_basic_block("after")
    instruction = b.switch(value, after)
    for case in cases:
        block = b.append_basic_block(f"case{case}")
        instruction.add_case(I64(case), block)
        b.position_at_end(block)
        emit(case)
        b.branch(after)
    b.position_at_end(after)
