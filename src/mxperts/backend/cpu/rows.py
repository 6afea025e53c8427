"""What is done to one row: quantising and packing an input, and everything between the two projections.

Each function is compiled by itself, once, and called by its address: see ``jit.native``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import carray

from mxperts.backend.cpu.activation import activate_at
from mxperts.backend.cpu.call import DYNAMIC, FP32, Call, activation_at, call_at
from mxperts.backend.cpu.fp8 import dynamic_scale
from mxperts.backend.cpu.inputs import is_large, load_numbers, quantize_input, rotate_input, round_numbers
from mxperts.backend.cpu.jit import jit, native
from mxperts.backend.cpu.layout import STRIP
from mxperts.backend.cpu.memory import byte_pointer, call5, floats_at, long_at
from mxperts.backend.cpu.routing import local_expert
from mxperts.backend.cpu.rule import BLOCK
from mxperts.backend.cpu.strip import AT_ONCE, SCALES_BYTES

_SMALL = 6 * 4 * STRIP
"""Bytes for the few blocks that a row's functions work on."""


def scratch_bytes(values_bytes: int, row: int) -> int:
    """Bytes of memory that each thread needs; ``row`` is the longest row of an input in values."""
    return AT_ONCE * 4 * STRIP + SCALES_BYTES + values_bytes + _SMALL + 4 * (row + STRIP)


@jit
def scratch_of(c: Call, thread: int) -> Any:
    """The address of a thread's memory: sums, decoded scales, decoded values, small arrays, a row."""
    return c.scratch_at + thread * c.scratch_bytes


@jit
def sum_planes(sums: int, planes: int) -> None:
    """Add to a row's sums of a strip those of its other planes, which follow."""
    total = floats_at(sums, STRIP)
    for plane in range(1, planes):
        part = floats_at(sums + 4 * STRIP * plane, STRIP)
        for i in range(STRIP):
            total[i] += part[i]


@jit
def _scale(c: Call, at: int, step: int, expert: int) -> Any:
    """A static scale."""
    return floats_at(at, c.experts)[expert * step] if at != 0 else np.float32(1)


@jit
def _pack_row(address: int, source: int, expert: int, routing: Any, target: int, thread: int) -> bool:
    """One row of the first input; whether it needs the careful path."""
    c = call_at(address)
    small = scratch_of(c, thread) + AT_ONCE * 4 * STRIP + SCALES_BYTES + c.values_bytes
    x, q = floats_at(small, BLOCK), floats_at(small + 4 * BLOCK, BLOCK)
    size = 2 if c.kind != FP32 else 4
    scale: Any = _scale(c, c.scale1_at, c.scale1_step, expert)
    large = False
    if c.qdq == DYNAMIC:
        row = floats_at(small + _SMALL, c.blocks1 * BLOCK)
        row[:] = np.float32(0)
        load_numbers(c.kind, source, c.width, row)
        if c.on_input:
            for i in range(c.width):
                row[i] *= routing
            round_numbers(c.kind, row)
        rotate_input(address, row)
        scale = dynamic_scale(row)
    for block in range(c.blocks1):
        n = min(BLOCK, c.width - block * BLOCK)
        if n < BLOCK:
            x[:] = np.float32(0)
        load_numbers(c.kind, source + block * BLOCK * size, n, x)
        if c.on_input:
            for i in range(BLOCK):
                x[i] *= routing
            round_numbers(c.kind, x)
        rotate_input(address, x)
        large |= is_large(x, c.amax)
        byte = quantize_input(address, x, q, scale)
        call5(c.pack_block, (small, small + 4 * BLOCK, byte, target + block * c.block_bytes, c.x1_bytes))
    return large


def _pack_token(address: int, token: int, thread: int) -> None:
    """The first input's row of a token."""
    c = call_at(address)
    routing = floats_at(c.routing_at, c.tokens * c.k)[token * c.k] if c.on_input else np.float32(1)
    target = c.x1_at + token * c.planes * c.x1_bytes
    large = _pack_row(address, c.hidden_at + token * c.hidden_stride, 0, routing, target, thread)
    if large and c.marks:
        marks = carray(byte_pointer(c.careful_at), c.tokens * c.k)
        for pair in range(token * c.k, token * c.k + c.k):
            marks[pair] = local_expert(c, pair) >= 0


def _pack_pair(address: int, row: int, expert: int, thread: int) -> None:
    """The first input's row of a pair."""
    c = call_at(address)
    pair = long_at(c.order_at, row)
    routing = floats_at(c.routing_at, c.tokens * c.k)[pair] if c.on_input else np.float32(1)
    target = c.x1_at + row * c.planes * c.x1_bytes
    large = _pack_row(address, c.hidden_at + pair // c.k * c.hidden_stride, expert, routing, target, thread)
    if large and c.marks:
        carray(byte_pointer(c.careful_at), c.tokens * c.k)[pair] = 1


def _finish(address: int, row: int, expert: int, strip: int, sums: int, small: int) -> None:
    """From one row's sums of a strip of gate and up to one or two blocks of the second input."""
    c, function = call_at(address), activation_at(address)
    sum_planes(sums, c.planes)
    h = floats_at(sums, STRIP)
    columns = STRIP // 2 if c.gated else STRIP
    first = strip * columns
    n = min(columns, c.intermediate - first)
    if c.bias1_at != 0:
        rows1 = 2 * c.intermediate if c.gated else c.intermediate
        bias = floats_at(c.bias1_at + 4 * expert * rows1, rows1)
        if c.gated and c.interleaved:
            for i in range(n):
                h[i] += bias[2 * (first + i)]
                h[columns + i] += bias[2 * (first + i) + 1]
        elif c.gated:
            for i in range(n):
                h[i] += bias[first + i]
                h[columns + i] += bias[c.intermediate + first + i]
        else:
            for i in range(n):
                h[i] += bias[first + i]
    round_numbers(c.kind, h)
    a_at = small
    activate_at(sums, sums + 4 * columns, a_at, columns, function)
    a = floats_at(a_at, STRIP)
    for i in range(n, STRIP):
        a[i] = np.float32(0)
    round_numbers(c.kind, a)
    rotate_input(address, floats_at(a_at, columns))
    if c.marks and is_large(a, c.amax):
        carray(byte_pointer(c.careful_at), c.tokens * c.k)[long_at(c.order_at, row)] = 1
    width = c.blocks2 * BLOCK
    if c.qdq == DYNAMIC:
        kept = floats_at(c.a_at + 4 * row * width, width)
        for i in range(min(columns, width - first)):
            kept[first + i] = a[i]
        return
    scale = _scale(c, c.scale2_at, c.scale2_step, expert)
    for half in range(columns // BLOCK):
        block = first // BLOCK + half
        if block < c.blocks2:
            x = floats_at(a_at + 4 * BLOCK * half, BLOCK)
            q = floats_at(a_at + 4 * STRIP, BLOCK)
            byte = quantize_input(address, x, q, scale)
            target = c.x2_at + row * c.planes * c.x2_bytes + block * c.block_bytes
            call5(c.pack_block, (a_at + 4 * BLOCK * half, a_at + 4 * STRIP, byte, target, c.x2_bytes))


def _pack_activations(address: int, row: int, thread: int) -> None:
    """The second input's row of a pair, where its scale is known only now."""
    c = call_at(address)
    width = c.blocks2 * BLOCK
    kept_at = c.a_at + 4 * row * width
    scale = dynamic_scale(floats_at(kept_at, width))
    small = scratch_of(c, thread) + AT_ONCE * 4 * STRIP
    q = floats_at(small, BLOCK)
    for block in range(c.blocks2):
        x = floats_at(kept_at + 4 * BLOCK * block, BLOCK)
        byte = quantize_input(address, x, q, scale)
        target = c.x2_at + row * c.planes * c.x2_bytes + block * c.block_bytes
        call5(c.pack_block, (kept_at + 4 * BLOCK * block, small, byte, target, c.x2_bytes))


class Rows(NamedTuple):
    """The functions of this file, compiled."""

    pack_token: Any
    pack_pair: Any
    finish: Any
    pack_activations: Any


@lru_cache
def compiled_rows() -> Rows:
    """Compile them, or read them from the cache."""
    return Rows(
        native(3, "pack_token")(_pack_token),
        native(4, "pack_pair")(_pack_pair),
        native(6, "finish")(_finish),
        native(3, "pack_activations")(_pack_activations),
    )
