"""From numbers to the rows that strips are multiplied with: read, quantise, round, pack."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from mxperts.backend.cpu.blocks import (
    bf16_to_float,
    float_bits,
    fp16_to_float,
    quantize_block,
    round_bf16,
    round_fp16,
    scale_block,
)
from mxperts.backend.cpu.call import BF16, BLOCKS, FP16, NONE, call_at, rule_at
from mxperts.backend.cpu.fp8 import fake_quantize_fp8
from mxperts.backend.cpu.jit import jit
from mxperts.backend.cpu.memory import double_byte_pointer, float_pointer
from mxperts.backend.cpu.rotation import rotate_block
from mxperts.backend.cpu.rule import BLOCK, INF


@jit
def load_numbers(kind: int, address: int, n: int, out: Any) -> None:
    """``n`` numbers of a dtype to float32."""
    if kind == BF16:
        bits = carray(double_byte_pointer(address), n)
        for i in range(n):
            out[i] = bf16_to_float(bits[i])
    elif kind == FP16:
        halves = carray(double_byte_pointer(address), n)
        for i in range(n):
            out[i] = fp16_to_float(halves[i])
    else:
        floats = carray(float_pointer(address), n)
        for i in range(n):
            out[i] = floats[i]


@jit
def store_numbers(kind: int, x: Any, n: int, address: int) -> None:
    """``n`` float32 rounded to a dtype."""
    if kind == BF16:
        bits = carray(double_byte_pointer(address), n)
        for i in range(n):
            bits[i] = round_bf16(x[i])
    elif kind == FP16:
        halves = carray(double_byte_pointer(address), n)
        for i in range(n):
            halves[i] = round_fp16(x[i])
    else:
        floats = carray(float_pointer(address), n)
        for i in range(n):
            floats[i] = x[i]


@jit
def round_numbers(kind: int, x: Any) -> None:
    """float32 rounded to a dtype, in place."""
    if kind == BF16:
        for i in range(len(x)):
            x[i] = bf16_to_float(round_bf16(x[i]))
    elif kind == FP16:
        for i in range(len(x)):
            x[i] = fp16_to_float(round_fp16(x[i]))


@jit
def is_large(x: Any, limit: int) -> bool:
    """Whether one of the finite numbers has a magnitude whose bits are ``limit`` or more."""
    top = np.int32(0)
    for i in range(len(x)):
        top = max(top, np.int32(float_bits(x[i]) & 0x7FFFFFFF))
    if top < limit:
        return False
    found = False
    for i in range(len(x)):
        bits = float_bits(x[i]) & 0x7FFFFFFF
        found |= limit <= bits < INF
    return found


@jit
def rotate_input(address: int, x: Any) -> None:
    """Rotate, in place, whole blocks ``x``, float32 [n], of an input of the call at an address, if it asks for that.

    Quantising reads the float32 numbers; where nothing is quantised, they are rounded to the input's dtype.
    """
    c = call_at(address)
    if c.rotated:
        for block in range(len(x) // BLOCK):
            rotate_block(x[BLOCK * block : BLOCK * (block + 1)])
        if c.qdq == NONE:
            round_numbers(c.kind, x)


@jit
def quantize_input(address: int, x: Any, q: Any, scale: Any) -> int:
    """One block ``x``, float32 [32], of an input of the call at an address: quantised and back, as its dtype holds it.

    For MX formats ``q`` gets the elements, and the result is the scale byte; otherwise 0.
    """
    c, byte = call_at(address), 0
    if c.qdq == NONE:
        return byte
    if c.qdq == BLOCKS:
        byte = quantize_block(x, q, rule_at(address))
        scale_block(q, byte, x)
    else:
        fake_quantize_fp8(x, scale, x)
    round_numbers(c.kind, x)
    return byte
