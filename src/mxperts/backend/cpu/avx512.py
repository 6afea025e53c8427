"""The kernels of one strip of 64 weight rows on AVX-512: products with packed weights, decoded by permutes.

Two instructions multiply: pairs of bf16 (``BF16``), and fours of 8-bit integers (``VNNI``). What surrounds them is the
same. For each block of 32 there is a sum ``P`` over its values in order, and then ``sum = fma(P, scale, sum)``, block
after block, whatever the number of rows and whichever of the kernels: a result is the same bits. The scale is never
folded into the operands, so that every scale byte is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mxperts.backend.cpu import simd
from mxperts.backend.cpu.decode import Decoder
from mxperts.backend.cpu.layout import QUARTERS, STRIP

ROWS = 6
"""Most rows of the input that a kernel takes at a time: 24 vectors of sums, of the 32 registers."""
PREFETCH = 24576
"""How far ahead in bytes codes are fetched, into the second-level cache: decides the speed when few rows use them."""


@dataclass(frozen=True, kw_only=True)
class Products:
    """One way to multiply a block.

    Attributes:
        name: in the names of functions.
        steps: vectors that a row's block of weights is decoded to.
        block_bytes: of a block of the input, which begins with 4 bytes for each step.
        table: what codes are looked up in.
        decode: the vectors of one group of a format's codes.
        start: what ``P`` starts from, given a row of the input.
        dot: adds the products of a step.
        add: adds ``P`` times the scale to a sum, given a row of the input.
    """

    name: str
    steps: int
    block_bytes: int
    table: Callable[[Decoder], list[Any]]
    decode: Callable[..., list[Any]]
    start: Callable[[Any, Any], Any]
    dot: Callable[[Any, Any, Any, Any], Any]
    add: Callable[[Any, Any, Any, Any, Any], Any]


def _broadcast(b: Any, row: Any, offset: int) -> Any:
    """Four bytes of a row in all lanes."""
    return simd.splat(b, simd.load(b, row, simd.I32, offset=offset, align=4), simd.I32S)


BF16 = Products(
    name="bf16",
    steps=16,
    block_bytes=64,
    table=Decoder.table,
    decode=Decoder.bf16,
    start=lambda b, row: simd.constant(simd.F32S, 0.0),
    dot=simd.dot_bf16,
    add=lambda b, part, row, scale, so_far: simd.fma(b, part, scale, so_far),
)
"""An input's block is its bf16 pairs in ``Words.order``. Subnormal operands and sums count as zero."""

T_AT, START_AT = 32, 36
"""In a block of the input of ``VNNI``: see there."""


def _add_integers(b: Any, part: Any, row: Any, scale: Any, so_far: Any) -> Any:
    t = b.bitcast(_broadcast(b, row, T_AT), simd.F32S)
    return simd.fma(b, b.fmul(b.sitofp(part, simd.F32S), t), scale, so_far)


VNNI = Products(
    name="vnni",
    steps=8,
    block_bytes=40,
    table=Decoder.byte_table,
    decode=Decoder.bytes,
    start=lambda b, row: _broadcast(b, row, START_AT),
    dot=simd.dot_u8_i8,
    add=_add_integers,
)
"""Weights are unsigned bytes: elements plus an offset. An input's block is 32 signed bytes, its elements in the order
of ``Decoder.byte_order``; ``t`` as float32, its scale over both formats' fractions; and minus the offset times the sum
of its elements, as int32, with which every ``P`` starts. ``P`` is an exact integer, exact as a float32, and still exact
times ``t``: only the addition to the sum rounds."""


class _Prefetch:
    """Asks for the lines of the tile ``PREFETCH`` bytes on, a few at each step of the present one.

    Asked for all at once they would hold up the loads that follow, and LLVM would put them all first.
    """

    def __init__(self, b: Any, tile: Any, tile_bytes: int, steps: int) -> None:
        self.b, self.tile = b, tile
        self.lines = list(range(0, tile_bytes, 64))
        self.at_once = -(-len(self.lines) // steps)

    def step(self) -> None:
        """The next few lines."""
        now, self.lines = self.lines[: self.at_once], self.lines[self.at_once :]
        for line in now:
            simd.prefetch(self.b, simd.opaque(self.b, self.tile), PREFETCH + line)


def row_pointers(b: Any, table: Any, rows: int) -> list[Any]:
    """The addresses of rows in a table of them."""
    return [simd.load(b, table, simd.I64, offset=8 * m, align=8) for m in range(rows)]


def _slots(rows: int) -> list[tuple[int, int, int]]:
    """Row, quarter and offset of each vector of sums [rows, 64]."""
    return [(m, v, 4 * STRIP * m + 64 * v) for m in range(rows) for v in range(QUARTERS)]


def _codes_at(decoder: Decoder, tile: Any, b: Any, quarter: int) -> Any:
    """The codes of a quarter of a tile's rows."""
    return b.add(tile, simd.I64(STRIP + quarter * (STRIP // QUARTERS) * decoder.format.block_bytes))


def emit_direct(products: Products, decoder: Decoder, rows: int) -> Any:
    """sums [rows, 64] = rows x tiles: codes are decoded as they are used.

    The function's arguments: tiles, number of blocks, table of the rows' addresses, sums.
    """
    tile_bytes = STRIP + STRIP * decoder.format.block_bytes
    in_registers = rows <= 2  # the sums; more than these would not leave enough for the rest
    together = QUARTERS if in_registers else 2
    per_group = products.steps // decoder.groups

    def body(b: Any, arguments: Sequence[Any]) -> None:
        tiles, blocks, row_table, sums = arguments
        x = row_pointers(b, row_table, rows)
        table = products.table(decoder)
        zero = simd.constant(simd.F32S, 0.0)
        if not in_registers:
            for _, _, offset in _slots(rows):
                simd.store(b, zero, sums, offset=offset, align=64)

        def turn(block: Any, carried: list[Any]) -> list[Any]:
            tile = b.add(tiles, b.mul(block, simd.I64(tile_bytes)))
            here = [b.add(p, b.mul(block, simd.I64(products.block_bytes))) for p in x]
            ahead = _Prefetch(b, tile, tile_bytes, QUARTERS * decoder.groups)
            following, kept = list(carried), simd.opaque(b, sums)
            for first in range(0, QUARTERS, together):
                quarters = range(first, first + together)
                parts = {(m, v): products.start(b, here[m]) for m in range(rows) for v in quarters}
                for group in range(decoder.groups):
                    decoded = {}
                    for v in quarters:
                        ahead.step()
                        decoded[v] = products.decode(decoder, b, _codes_at(decoder, tile, b, v), table, group)
                    for j in range(per_group):
                        for m in range(rows):
                            values = _broadcast(b, here[m], 4 * (group * per_group + j))
                            for v in quarters:
                                parts[m, v] = products.dot(b, parts[m, v], decoded[v][j], values)
                for v in quarters:
                    scale = simd.e8m0(b, tile, 16 * v)
                    for m in range(rows):
                        slot, offset = m * QUARTERS + v, 4 * STRIP * m + 64 * v
                        if in_registers:
                            following[slot] = products.add(b, parts[m, v], here[m], scale, carried[slot])
                        else:
                            so_far = simd.load(b, kept, simd.F32S, offset=offset, align=64)
                            total = products.add(b, parts[m, v], here[m], scale, so_far)
                            simd.store(b, total, kept, offset=offset, align=64)
            return following

        final = simd.counted(b, blocks, [zero for _ in _slots(rows)] if in_registers else [], turn)
        for (_, _, offset), total in zip(_slots(rows), final, strict=False):
            simd.store(b, total, sums, offset=offset, align=64)

    return body


def emit_decode(products: Products, decoder: Decoder) -> Any:
    """Tiles to decoded values [blocks, steps, 64] of 4 bytes and float32 scales [blocks, 64].

    The function's arguments: tiles, number of blocks, values, scales.
    """
    tile_bytes = STRIP + STRIP * decoder.format.block_bytes

    def body(b: Any, arguments: Sequence[Any]) -> None:
        tiles, blocks, values, scales = arguments
        table = products.table(decoder)

        def turn(block: Any, carried: list[Any]) -> list[Any]:
            tile = b.add(tiles, b.mul(block, simd.I64(tile_bytes)))
            ahead = _Prefetch(b, tile, tile_bytes, QUARTERS * decoder.groups)
            out = b.add(values, b.mul(block, simd.I64(4 * STRIP * products.steps)))
            scale_out = b.add(scales, b.mul(block, simd.I64(4 * STRIP)))
            for v in range(QUARTERS):
                vectors = []
                for group in range(decoder.groups):
                    ahead.step()
                    vectors += products.decode(decoder, b, _codes_at(decoder, tile, b, v), table, group)
                for step, vector in enumerate(vectors):
                    simd.store(b, vector, out, offset=64 * (step * QUARTERS + v), align=64)
                simd.store(b, simd.e8m0(b, tile, 16 * v), scale_out, offset=64 * v, align=64)
            return []

        simd.counted(b, blocks, [], turn)

    return body


def emit_decoded(products: Products, rows: int) -> Any:
    """sums [rows, 64] += rows x decoded values, times their scales.

    The function's arguments: values, scales, number of blocks, table of the rows' addresses, offset in rows, sums.
    """

    def body(b: Any, arguments: Sequence[Any]) -> None:
        values, scales, blocks, row_table, offset, sums = arguments
        x = [b.add(p, offset) for p in row_pointers(b, row_table, rows)]

        def turn(block: Any, carried: list[Any]) -> list[Any]:
            at = b.add(values, b.mul(block, simd.I64(4 * STRIP * products.steps)))
            scale_at = b.add(scales, b.mul(block, simd.I64(4 * STRIP)))
            here = [b.add(p, b.mul(block, simd.I64(products.block_bytes))) for p in x]
            starts = [products.start(b, row) for row in here]
            parts = {(m, v): starts[m] for m, v, _ in _slots(rows)}
            for step in range(products.steps):
                vectors = [
                    simd.load(b, at, simd.I32S, offset=64 * (step * QUARTERS + v), align=64) for v in range(QUARTERS)
                ]
                for m in range(rows):
                    four = _broadcast(b, here[m], 4 * step)
                    for v in range(QUARTERS):
                        parts[m, v] = products.dot(b, parts[m, v], vectors[v], four)
            kept = simd.opaque(b, sums)
            for v in range(QUARTERS):
                scale = simd.load(b, scale_at, simd.F32S, offset=64 * v, align=64)
                for m in range(rows):
                    place = 4 * STRIP * m + 64 * v
                    so_far = simd.load(b, kept, simd.F32S, offset=place, align=64)
                    total = products.add(b, parts[m, v], here[m], scale, so_far)
                    simd.store(b, total, kept, offset=place, align=64)
            return []

        simd.counted(b, blocks, [], turn)

    return body
