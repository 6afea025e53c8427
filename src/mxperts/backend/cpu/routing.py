"""Which rows each expert gets, and in which pieces the work is handed out."""

from __future__ import annotations

from typing import Any

from numba import carray

from mxperts.backend.cpu.call import Call
from mxperts.backend.cpu.jit import jit
from mxperts.backend.cpu.memory import byte_pointer, long_pointer

ACTIVE, NEXT1, NEXT2, PIECES1, PIECES2, COUNTERS = 0, 8, 16, 1, 2, 24
"""Places in ``Call.counters_at``; the two that threads write are apart, each in a cache line of its own."""
MOST_PIECES = 1024
"""Boundaries that there is room for."""


@jit
def local_expert(c: Call, pair: int) -> int:
    """The local expert of a pair; -1 for none."""
    expert = carray(long_pointer(c.ids_at), c.tokens * c.k)[pair]
    if c.map_at != 0:
        if expert < 0 or expert >= c.map_size:
            return -1
        expert = carray(long_pointer(c.map_at), c.map_size)[expert]
    return expert if 0 <= expert < c.experts else -1


@jit
def sort_pairs(c: Call) -> None:
    """Fill order, start, active and pieces. Pairs of one expert stay in their order."""
    pairs = c.tokens * c.k
    order = carray(long_pointer(c.order_at), pairs)
    start = carray(long_pointer(c.start_at), c.experts + 1)
    active = carray(long_pointer(c.active_at), c.experts)
    counters = carray(long_pointer(c.counters_at), COUNTERS)
    careful = carray(byte_pointer(c.careful_at), pairs)
    start[:] = 0
    for pair in range(pairs):
        if c.careful_only == 0:
            careful[pair] = 0
        expert = local_expert(c, pair)
        if expert >= 0 and _takes(c, pair, expert):
            start[expert + 1] += 1
    found = 0
    for expert in range(c.experts):
        if start[expert + 1] > 0:
            active[found] = expert
            found += 1
        start[expert + 1] += start[expert]
    for pair in range(pairs):
        expert = local_expert(c, pair)
        if expert >= 0 and _takes(c, pair, expert):
            order[start[expert]] = pair
            start[expert] += 1
    for expert in range(c.experts, 0, -1):
        start[expert] = start[expert - 1]
    start[0] = 0
    counters[:] = 0
    counters[ACTIVE] = found
    counters[PIECES1] = _cut(c.pieces1_at, found * c.strips1, c.threads)
    counters[PIECES2] = _cut(c.pieces2_at, found * c.strips2, c.threads)


@jit
def _takes(c: Call, pair: int, expert: int) -> Any:
    """Whether this call computes a pair; those that another will are marked."""
    careful = carray(byte_pointer(c.careful_at), c.tokens * c.k)
    if c.careful_only:
        return careful[pair] != 0
    if c.marks and carray(byte_pointer(c.careful_experts_at), c.experts)[expert] != 0:
        careful[pair] = 1
        return False
    return True


@jit
def _cut(boundaries_at: int, items: int, threads: int) -> int:
    """Cut ``items`` into pieces, large ones first: threads that were slower get less of what is left."""
    boundaries = carray(long_pointer(boundaries_at), MOST_PIECES)
    at = 0
    for piece in range(MOST_PIECES - 1):
        boundaries[piece] = at
        if at == items:
            return piece
        at = min(items, at + max((items - at) // (2 * threads), 1 + items // (MOST_PIECES // 2)))
    boundaries[MOST_PIECES - 1] = items
    return MOST_PIECES - 1
