"""The block-32 Hadamard rotation of inputs in registers: ``mxperts.rotation`` says what it computes, to the bit."""

from __future__ import annotations

import triton
import triton.language as tl

from mxperts.rotation import INPUT_FACTOR, STRIDES

_FACTOR = tl.constexpr(INPUT_FACTOR)
_STEPS = tl.constexpr(len(STRIDES))


@triton.jit
def rotate_blocks(x):
    """Rotated as inputs are: float32 of the shape of ``x``, float32 [N, 32]."""
    for step in tl.static_range(_STEPS):  # strides 1, 2, 4, 8, 16
        x = _butterflies(x, 1 << step)
    return x * _FACTOR


@triton.jit
def _butterflies(x, STRIDE: tl.constexpr):
    """All pairs (a, b) of float32 [N, 32] that lie a stride apart become (a + b, a - b)."""
    pairs = tl.reshape(x, [x.shape[0], 16 // STRIDE, 2, STRIDE])
    a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))  # [N, 16 / STRIDE, STRIDE]
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), [x.shape[0], 32])


@triton.jit
def rotate_rows(x):
    """Rotated as inputs are, in blocks along the last dimension: float32 [M, N], N a multiple of 32."""
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1]
    return tl.reshape(rotate_blocks(tl.reshape(x, [rows * (columns // 32), 32])), [rows, columns])
