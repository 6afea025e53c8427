"""Memory by address, for kernels whose arguments are numbers: to pass an array takes a call longer than to use it."""

from __future__ import annotations

import threading
from typing import Any

import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from mxperts.backend.cpu.jit import jit

ALIGNMENT = 64
"""What workspaces and their parts are aligned to, in bytes."""


def pointer_to(dtype: Any) -> Any:
    """The function that makes an address a pointer to a Numba type."""

    @intrinsic  # type: ignore[untyped-decorator]
    def pointer(typing: Any, address: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
            return b.inttoptr(values[0], context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(types.int64), codegen

    return pointer


float_pointer = pointer_to(types.float32)
double_byte_pointer = pointer_to(types.uint16)
byte_pointer = pointer_to(types.uint8)
signed_byte_pointer = pointer_to(types.int8)
int_pointer = pointer_to(types.int32)
long_pointer = pointer_to(types.int64)


@jit
def floats_at(address: int, n: int) -> Any:
    """The float32 array [n] at an address."""
    return carray(float_pointer(address), n)


@jit
def long_at(address: int, i: int) -> Any:
    """The i-th int64 from an address."""
    return carray(long_pointer(address), i + 1)[i]


@intrinsic  # type: ignore[untyped-decorator]
def take_next(typing: Any, counter: Any) -> Any:
    """The number at an address, which becomes one more, whichever thread asks."""

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        pointer = b.inttoptr(values[0], ir.PointerType(ir.IntType(64)))
        return b.atomic_rmw("add", pointer, ir.IntType(64)(1), "monotonic")

    return types.int64(types.int64), codegen


def _caller(arguments: int) -> Any:
    """The function that calls another by its address with so many 64-bit integers."""

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        integer = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [integer] * arguments)
        b.call(b.inttoptr(values[0], ir.PointerType(function)), cgutils.unpack_tuple(b, values[1]))
        return context.get_dummy_value()

    @intrinsic  # type: ignore[untyped-decorator]
    def call(typing: Any, address: Any, values: Any) -> Any:
        return types.void(types.int64, types.UniTuple(types.int64, arguments)), codegen

    return call


call3, call4, call5, call6, call7 = (_caller(n) for n in range(3, 8))


class Workspace(threading.local):
    """Memory that a thread's calls use one after another; it grows as needed."""

    buffer: Tensor | None = None

    def address(self, nbytes: int) -> int:
        """Where at least ``nbytes`` bytes are, until this thread asks again."""
        if self.buffer is None or self.buffer.nbytes < nbytes + ALIGNMENT:
            self.buffer = None
            self.buffer = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
        start = self.buffer.data_ptr()
        return start + -start % ALIGNMENT


class Plan:
    """Where the parts of a workspace lie."""

    def __init__(self) -> None:
        self.nbytes = 0

    def add(self, nbytes: int) -> int:
        """The offset of a part of ``nbytes`` bytes."""
        offset = self.nbytes
        self.nbytes += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return offset
