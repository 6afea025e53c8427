"""Between float32 and the dtypes of tensors, in kernels: compiled, and under Triton's interpreter.

The interpreter of Triton 3.6 truncates float32 to bfloat16 and loses subnormal numbers between the two, so there
the bits are moved by hand; a GPU has instructions for all of it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRET = tl.constexpr(bool(knobs.runtime.interpret))
"""Whether kernels run under the interpreter."""


@triton.jit
def to_float32(x):
    """The same numbers as float32.

    Args:
        x: float32, bfloat16 or float16, any shape.
    """
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def from_float32(x, DTYPE: tl.constexpr):
    """The nearest numbers of a dtype, ties to even; beyond its range Inf.

    Args:
        x: float32, any shape.
        DTYPE: float32, bfloat16 or float16.
    """
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        # The largest bits that are not NaN give Inf; NaN would be carried into other numbers
        rounded = tl.where(x == x, (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16, 0x7FC0)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)
