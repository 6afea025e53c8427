"""The kernel of ``fused_experts``: one function that Python calls, in four steps whose work all threads share.

1. Inputs: each token is quantised and packed once.
2. Gate and up: for each expert and strip, products with the rows of its tokens; the activation function and the
   quantisation of its result follow while it is in registers and first-level cache.
3. Down: the same for the second projection; each pair of token and expert has a row of the result.
4. Sum: each token's rows, weighted, in the order of its experts.

A number is computed in one way, whatever else is in the batch and whichever thread does it: results do not depend on
either.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import carray, prange

from mxperts.backend.cpu.call import DYNAMIC, FP32, Call, call_at
from mxperts.backend.cpu.inputs import store_numbers
from mxperts.backend.cpu.jit import jit, kernel, native
from mxperts.backend.cpu.layout import STRIP
from mxperts.backend.cpu.memory import (
    byte_pointer,
    call3,
    call4,
    call6,
    call7,
    floats_at,
    long_at,
    long_pointer,
    take_next,
)
from mxperts.backend.cpu.routing import ACTIVE, NEXT1, NEXT2, PIECES1, PIECES2, local_expert, sort_pairs
from mxperts.backend.cpu.rows import scratch_of, sum_planes
from mxperts.backend.cpu.strip import AT_ONCE, SCALES_BYTES

FEW = 4
"""Tokens up to which one thread packs and sums faster than it takes to start others."""


@jit
def fill_tables(address: int) -> None:
    """Where the rows of both inputs are, in the order of experts."""
    c = call_at(address)
    rows = long_at(c.start_at, c.experts)
    table1 = carray(long_pointer(c.table1_at), rows * c.planes)
    table2 = carray(long_pointer(c.table2_at), rows * c.planes)
    for row in range(rows):
        first = row if c.per_pair else long_at(c.order_at, row) // c.k
        for plane in range(c.planes):
            table1[row * c.planes + plane] = c.x1_at + (first * c.planes + plane) * c.x1_bytes
            table2[row * c.planes + plane] = (
                table1[row * c.planes + plane] if c.linear else c.x2_at + (row * c.planes + plane) * c.x2_bytes
            )


def _gate_up(address: int, thread: int, threads: int) -> None:
    """This thread's share of the first projection."""
    c = call_at(address)
    sums = scratch_of(c, thread)
    scales = sums + AT_ONCE * 4 * STRIP
    values = scales + SCALES_BYTES
    small = values + c.values_bytes
    pieces = long_at(c.counters_at, PIECES1)
    while True:
        piece = take_next(c.counters_at + 8 * NEXT1)
        if piece >= pieces:
            return
        for item in range(long_at(c.pieces1_at, piece), long_at(c.pieces1_at, piece + 1)):
            expert, strip = long_at(c.active_at, item // c.strips1), item % c.strips1
            tiles = c.tiles1_at + (expert * c.strips1 + strip) * c.blocks1 * c.tile_bytes
            after = long_at(c.start_at, expert + 1)
            at_once = AT_ONCE // c.planes
            for row in range(long_at(c.start_at, expert), after, at_once):
                rows = min(at_once, after - row)
                table_at = c.table1_at + 8 * row * c.planes
                call7(c.multiply, (tiles, c.blocks1, table_at, rows * c.planes, sums, values, scales))
                for i in range(rows):
                    call6(c.finish, (address, row + i, expert, strip, sums + 4 * STRIP * c.planes * i, small))


def _down(address: int, thread: int, threads: int) -> None:
    """This thread's share of the second projection."""
    c = call_at(address)
    sums = scratch_of(c, thread)
    scales = sums + AT_ONCE * 4 * STRIP
    values = scales + SCALES_BYTES
    pieces = long_at(c.counters_at, PIECES2)
    while True:
        piece = take_next(c.counters_at + 8 * NEXT2)
        if piece >= pieces:
            return
        for item in range(long_at(c.pieces2_at, piece), long_at(c.pieces2_at, piece + 1)):
            expert, strip = long_at(c.active_at, item // c.strips2), item % c.strips2
            tiles = c.tiles2_at + (expert * c.strips2 + strip) * c.blocks2 * c.tile_bytes
            after = long_at(c.start_at, expert + 1)
            at_once = AT_ONCE // c.planes
            for row in range(long_at(c.start_at, expert), after, at_once):
                rows = min(at_once, after - row)
                table_at = c.table2_at + 8 * row * c.planes
                call7(c.multiply, (tiles, c.blocks2, table_at, rows * c.planes, sums, values, scales))
                for i in range(rows):
                    pair = long_at(c.order_at, row + i)
                    y = floats_at(c.y_at + 4 * STRIP * (pair * c.strips2 + strip), STRIP)
                    sum_planes(sums + 4 * STRIP * c.planes * i, c.planes)
                    total = floats_at(sums + 4 * STRIP * c.planes * i, STRIP)
                    for column in range(STRIP):
                        y[column] = total[column]


@jit
def sum_token(address: int, token: int, thread: int) -> None:
    """The weighted sum of one token's rows."""
    c = call_at(address)
    total = floats_at(scratch_of(c, thread), STRIP)
    routing = floats_at(c.routing_at, c.tokens * c.k)
    size = 2 if c.out_kind != FP32 else 4
    for strip in range(c.strips2):
        n = min(STRIP, c.hidden - strip * STRIP)
        total[:] = np.float32(0)
        for pair in range(token * c.k, token * c.k + c.k):
            expert = local_expert(c, pair)
            if expert < 0:
                continue
            weight = np.float32(1) if c.on_input else routing[pair]
            y = floats_at(c.y_at + 4 * STRIP * (pair * c.strips2 + strip), STRIP)
            if c.bias2_at != 0:
                bias = floats_at(c.bias2_at + 4 * (expert * c.hidden + strip * STRIP), n)
                for i in range(n):
                    total[i] += (y[i] + bias[i]) * weight
            else:
                for i in range(n):
                    total[i] += y[i] * weight
        store_numbers(c.out_kind, total, n, c.out_at + size * (token * c.hidden + strip * STRIP))


def _pack_inputs(address: int, thread: int, threads: int) -> None:
    """This thread's share of the first input."""
    c = call_at(address)
    if c.per_pair:
        for item in range(thread, long_at(c.counters_at, ACTIVE), threads):
            expert = long_at(c.active_at, item)
            for row in range(long_at(c.start_at, expert), long_at(c.start_at, expert + 1)):
                call4(c.pack_pair, (address, row, expert, thread))
    else:
        for token in range(c.tokens * thread // threads, c.tokens * (thread + 1) // threads):
            call3(c.pack_token, (address, token, thread))


def _pack_kept(address: int, thread: int, threads: int) -> None:
    """This thread's share of ``pack_activations``."""
    c = call_at(address)
    rows = long_at(c.start_at, c.experts)
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        call3(c.pack_activations, (address, row, thread))


def _sum_tokens(address: int, thread: int, threads: int) -> None:
    """This thread's share of the results."""
    c = call_at(address)
    for token in range(c.tokens * thread // threads, c.tokens * (thread + 1) // threads):
        sum_token(address, token, thread)


@jit
def count_marks(c: Call) -> int:
    """Pairs to be computed on the careful path."""
    marked = 0
    if c.marks:
        marks = carray(byte_pointer(c.careful_at), c.tokens * c.k)
        for pair in range(c.tokens * c.k):
            marked += marks[pair]
    return marked


@jit
def _prepare_call(address: int) -> int:
    """Sort the pairs; how many rows there are."""
    c = call_at(address)
    sort_pairs(c)
    fill_tables(address)
    rows: int = long_at(c.start_at, c.experts)
    return rows


@kernel()
def in_parallel(function_at: int, address: int, threads: int) -> None:
    """Let threads share a step; the one loop of this backend that starts them."""
    for thread in prange(threads):
        call3(function_at, (address, thread, threads))


@jit
def _share(function_at: int, address: int, threads: int) -> None:
    if threads == 1:
        call3(function_at, (address, 0, 1))
    else:
        in_parallel(function_at, address, threads)


@kernel(parallel=False)
def layer(address: int) -> int:
    """Run the call whose ``record`` is at an address.

    Returns:
        The number of pairs that are marked for the careful path; the sums are still to be computed if there are any.
    """
    c = call_at(address)
    few = 1 if c.tokens <= FEW else c.threads
    if _prepare_call(address) > 0:
        _share(c.pack_inputs, address, few)
        if c.linear == 0:
            _share(c.gate_up, address, c.threads)
            if c.qdq == DYNAMIC:
                _share(c.pack_kept, address, c.threads)
        _share(c.down, address, c.threads)
    marked = count_marks(c)
    if marked == 0:
        _share(c.sum_tokens, address, few)
    return marked


class Steps(NamedTuple):
    """The functions of this file that threads share, compiled."""

    pack_inputs: Any
    gate_up: Any
    pack_kept: Any
    down: Any
    sum_tokens: Any


@lru_cache
def compiled_steps() -> Steps:
    """Compile them, or read them from the cache."""
    functions = (_pack_inputs, _gate_up, _pack_kept, _down, _sum_tokens)
    return Steps(*(native(3, function.__name__)(function) for function in functions))
