"""Products of packed weights with bf16 rows on AVX-512 BF16: the kernels of one strip of 64 weight rows.

Whatever the number of rows and whichever kernel, a result is the same bits: for each block of 32 a sum ``P`` over its
pairs in order, from zero, and then ``sum = fma(P, scale, sum)``, block after block. The scale is never folded into the
operands, so that every scale byte is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mxperts.backend.cpu import simd
from mxperts.backend.cpu.decode import Decoder
from mxperts.backend.cpu.layout import QUARTERS, STRIP

ROWS = 6
"""Most rows of the input that a kernel takes at a time: 24 vectors of sums, of the 32 registers."""
STEPS = 16
"""Pairs that a row's block of 32 makes."""
BLOCK_BYTES = 64
"""Bytes of a block of the input: pairs in the order of ``Words.order``."""
PREFETCH = 24576
"""How far ahead in bytes codes are fetched, into the second-level cache: decides the speed when few rows use them."""


class Prefetch:
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
    return [simd.load(b, table, simd.I64, offset=8 * m, align=8) for m in range(rows)]


def _pair(b: Any, row: Any, step: int) -> Any:
    """The ``step``-th pair of a row's block in all lanes."""
    return simd.splat(b, simd.load(b, row, simd.I32, offset=4 * step, align=4), simd.I32S)


def emit_direct(decoder: Decoder, rows: int) -> Any:
    """sums [rows, 64] = row pairs [rows, blocks * 16] x tiles: codes are decoded as they are used."""
    tile_bytes = STRIP + STRIP * decoder.format.block_bytes
    together = QUARTERS if rows <= 2 else 2
    in_registers = rows <= 2

    def body(b: Any, arguments: Sequence[Any]) -> None:
        tiles, blocks, row_table, sums = arguments
        x = row_pointers(b, row_table, rows)
        table = decoder.table()
        zero = simd.constant(simd.F32S, 0.0)
        slots = [(m, v) for m in range(rows) for v in range(QUARTERS)]
        if not in_registers:
            for m, v in slots:
                simd.store(b, zero, sums, offset=256 * m + 64 * v, align=64)

        def turn(block: Any, carried: list[Any]) -> list[Any]:
            tile = b.add(tiles, b.mul(block, simd.I64(tile_bytes)))
            at = b.mul(block, simd.I64(BLOCK_BYTES))
            here = [b.add(p, at) for p in x]
            ahead = Prefetch(b, tile, tile_bytes, QUARTERS * decoder.groups)
            following = list(carried)
            kept = sums if in_registers else simd.opaque(b, sums)
            for first in range(0, QUARTERS, together):
                quarters = range(first, first + together)
                parts = {(m, v): zero for m in range(rows) for v in quarters}
                for group in range(decoder.groups):
                    decoded = {}
                    for v in quarters:
                        ahead.step()
                        codes = b.add(tile, simd.I64(STRIP + v * 16 * decoder.format.block_bytes))
                        decoded[v] = decoder.bf16(b, codes, table, group)
                    for j in range(decoder.words.codes):
                        for m in range(rows):
                            pair = _pair(b, here[m], group * decoder.words.codes + j)
                            for v in quarters:
                                parts[m, v] = simd.dot_bf16(b, parts[m, v], decoded[v][j], pair)
                for v in quarters:
                    scale = simd.e8m0(b, tile, 16 * v)
                    for m in range(rows):
                        slot = m * QUARTERS + v
                        offset = 256 * m + 64 * v
                        so_far = (
                            carried[slot] if in_registers else simd.load(b, kept, simd.F32S, offset=offset, align=64)
                        )
                        total = simd.fma(b, parts[m, v], scale, so_far)
                        if in_registers:
                            following[slot] = total
                        else:
                            simd.store(b, total, kept, offset=offset, align=64)
            return following

        final = simd.counted(b, blocks, [zero for _ in slots] if in_registers else [], turn)
        if in_registers:
            for (m, v), total in zip(slots, final, strict=True):
                simd.store(b, total, sums, offset=256 * m + 64 * v, align=64)

    return body


def emit_decode(decoder: Decoder) -> Any:
    """Tiles to bf16 pairs [blocks, 16, 64] and float32 scales [blocks, 64]."""
    tile_bytes = STRIP + STRIP * decoder.format.block_bytes

    def body(b: Any, arguments: Sequence[Any]) -> None:
        tiles, blocks, values, scales = arguments
        table = decoder.table()

        def turn(block: Any, carried: list[Any]) -> list[Any]:
            tile = b.add(tiles, b.mul(block, simd.I64(tile_bytes)))
            ahead = Prefetch(b, tile, tile_bytes, QUARTERS * decoder.groups)
            out = b.add(values, b.mul(block, simd.I64(STEPS * 64 * QUARTERS)))
            scale_out = b.add(scales, b.mul(block, simd.I64(64 * QUARTERS)))
            for v in range(QUARTERS):
                codes = b.add(tile, simd.I64(STRIP + v * 16 * decoder.format.block_bytes))
                for group in range(decoder.groups):
                    ahead.step()
                    for j, pairs in enumerate(decoder.bf16(b, codes, table, group)):
                        step = group * decoder.words.codes + j
                        simd.store(b, pairs, out, offset=64 * (step * QUARTERS + v), align=64)
                simd.store(b, simd.e8m0(b, tile, 16 * v), scale_out, offset=64 * v, align=64)
            return []

        simd.counted(b, blocks, [], turn)

    return body


def emit_decoded(rows: int) -> Any:
    """sums [rows, 64] += row pairs [rows, blocks * STEPS] x decoded values and scales."""

    def body(b: Any, arguments: Sequence[Any]) -> None:
        values, scales, blocks, row_table, offset, sums = arguments
        x = [b.add(p, offset) for p in row_pointers(b, row_table, rows)]
        zero = simd.constant(simd.F32S, 0.0)

        def turn(block: Any, carried: list[Any]) -> list[Any]:
            at = b.add(values, b.mul(block, simd.I64(STEPS * 64 * QUARTERS)))
            scale_at = b.add(scales, b.mul(block, simd.I64(64 * QUARTERS)))
            here = [b.add(p, b.mul(block, simd.I64(BLOCK_BYTES))) for p in x]
            parts = {(m, v): zero for m in range(rows) for v in range(QUARTERS)}
            for step in range(STEPS):
                vectors = [
                    simd.load(b, at, simd.I16S, offset=64 * (step * QUARTERS + v), align=64) for v in range(QUARTERS)
                ]
                for m in range(rows):
                    pair = _pair(b, here[m], step)
                    for v in range(QUARTERS):
                        parts[m, v] = simd.dot_bf16(b, parts[m, v], vectors[v], pair)
            here = simd.opaque(b, sums)
            for v in range(QUARTERS):
                scale = simd.load(b, scale_at, simd.F32S, offset=64 * v, align=64)
                for m in range(rows):
                    so_far = simd.load(b, here, simd.F32S, offset=256 * m + 64 * v, align=64)
                    simd.store(b, simd.fma(b, parts[m, v], scale, so_far), here, offset=256 * m + 64 * v, align=64)
            return []

        simd.counted(b, blocks, [], turn)

    return body
