"""Integers and float32 bits in LLVM IR, with operators: vectors of as many lanes as a block has, on any CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from mxperts.backend.cpu import simd
from mxperts.backend.cpu.rule import BLOCK


class Lanes:
    """Signed integers in LLVM IR, one or a vector of them, with Python's operators.

    The other operand may be an int. Floats are in here as their bits.
    """

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder = builder
        self.value = value

    def like(self, number: int) -> Lanes:
        """As many lanes with this number."""
        type_ = self.value.type
        listed = [number] * type_.count if isinstance(type_, ir.VectorType) else number
        return Lanes(self.builder, ir.Constant(type_, listed))

    def _of(self, other: Lanes | int) -> Any:
        return other.value if isinstance(other, Lanes) else self.like(other).value

    def _with(self, operation: str, other: Lanes | int) -> Lanes:
        return Lanes(self.builder, getattr(self.builder, operation)(self.value, self._of(other)))

    def __add__(self, other: Lanes | int) -> Lanes:
        return self._with("add", other)

    def __sub__(self, other: Lanes | int) -> Lanes:
        return self._with("sub", other)

    def __rsub__(self, other: int) -> Lanes:
        return self.like(other) - self

    def __and__(self, other: Lanes | int) -> Lanes:
        return self._with("and_", other)

    def __or__(self, other: Lanes | int) -> Lanes:
        return self._with("or_", other)

    def __xor__(self, other: Lanes | int) -> Lanes:
        return self._with("xor", other)

    def __lshift__(self, other: Lanes | int) -> Lanes:
        return self._with("shl", other)

    def __rshift__(self, other: Lanes | int) -> Lanes:
        return self._with("ashr", other)

    def is_(self, comparison: str, other: Lanes | int) -> Any:
        """The truth values of a signed comparison, for ``select``."""
        return self.builder.icmp_signed(comparison, self.value, self._of(other))

    def select(self, condition: Any, other: Lanes | int) -> Lanes:
        """These where the condition holds, the others elsewhere."""
        return Lanes(self.builder, self.builder.select(condition, self.value, self._of(other)))

    def when(self, condition: Any, change: Callable[[Lanes], Lanes]) -> Lanes:
        """``change`` of these if one condition for all of them holds; otherwise that code does not run."""
        return branch(self.builder, condition, lambda: [change(self)], lambda: [self])[0]

    def at_most(self, other: Lanes | int) -> Lanes:
        """The smaller ones."""
        return self.select(self.is_("<", other), other)

    def at_least(self, other: Lanes | int) -> Lanes:
        """The larger ones."""
        return self.select(self.is_(">", other), other)

    def times(self, other: Lanes | int) -> Lanes:
        """The product as floats."""
        return self._as_floats("fmul", other)

    def plus(self, other: Lanes | int) -> Lanes:
        """The sum as floats."""
        return self._as_floats("fadd", other)

    def _as_floats(self, operation: str, other: Lanes | int) -> Lanes:
        b, floats = self.builder, _like(self.value.type, ir.FloatType())
        result = getattr(b, operation)(b.bitcast(self.value, floats), b.bitcast(self._of(other), floats))
        return Lanes(b, b.bitcast(result, self.value.type))

    def to_float(self) -> Lanes:
        """The float32 numbers nearest to these integers."""
        b = self.builder
        return Lanes(b, b.bitcast(b.sitofp(self.value, _like(self.value.type, ir.FloatType())), self.value.type))

    def to_int(self) -> Lanes:
        """The integers that these floats are."""
        b = self.builder
        return Lanes(b, b.fptosi(b.bitcast(self.value, _like(self.value.type, ir.FloatType())), self.value.type))

    def cast(self, bits: int, *, signed: bool = False) -> Lanes:
        """The same integers in more bits, or their lowest bits."""
        type_ = _like(self.value.type, ir.IntType(bits))
        element = getattr(self.value.type, "element", self.value.type)
        wider = self.builder.sext if signed else self.builder.zext
        if bits == element.width:
            return self
        return Lanes(self.builder, (wider if bits > element.width else self.builder.trunc)(self.value, type_))

    def regroup(self, count: int, bits: int) -> Lanes:
        """The same bytes as ``count`` integers of ``bits``."""
        return Lanes(self.builder, self.builder.bitcast(self.value, ir.VectorType(ir.IntType(bits), count)))

    def pick(self, indices: Sequence[int]) -> Lanes:
        """Lanes by their number, in a new order; one past the last is a zero."""
        order = ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), list(indices))
        return Lanes(self.builder, self.builder.shuffle_vector(self.value, self.like(0).value, order))

    def splat(self) -> Lanes:
        """This one number in all 32 lanes."""
        vector = ir.VectorType(self.value.type, BLOCK)
        one = self.builder.insert_element(ir.Constant(vector, ir.Undefined), self.value, ir.IntType(32)(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), BLOCK), None)
        return Lanes(self.builder, self.builder.shuffle_vector(one, one, zeros))

    def largest(self) -> Lanes:
        """The largest lane; none may be negative."""
        type_ = self.value.type
        name = f"llvm.vector.reduce.umax.v{type_.count}i{type_.element.width}"
        return Lanes(self.builder, simd.call(self.builder, name, type_.element, [self.value]))


def branch(
    builder: Any, condition: Any, then: Callable[[], Sequence[Lanes]], otherwise: Callable[[], Sequence[Lanes]]
) -> list[Lanes]:
    """The values of one of two pieces of code; only that one runs."""
    ends: list[tuple[Any, Sequence[Lanes]]] = []
    with builder.if_else(condition) as (if_then, if_not):
        for path, code in ((if_then, then), (if_not, otherwise)):
            with path:
                values = code()
                ends.append((builder.block, values))
    results = []
    for pair in zip(ends[0][1], ends[1][1], strict=True):
        phi = builder.phi(pair[0].value.type)
        for (block, _), value in zip(ends, pair, strict=True):
            phi.add_incoming(value.value, block)
        results.append(Lanes(builder, phi))
    return results


def _like(type_: Any, element: Any) -> Any:
    return ir.VectorType(element, type_.count) if isinstance(type_, ir.VectorType) else element
