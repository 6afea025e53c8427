"""Products of packed integer weights with integer rows on AVX-512 VNNI: the kernels of one strip of 64 weight rows.

Weights are unsigned bytes ``w + offset``, inputs signed ones. The sum over a block is an exact integer; it becomes a
float32, exactly, and then ``sum = fma(P * t, scale, sum)`` with ``t`` the input block's scale over both formats'
fractions: the product with a power of two is exact too, so that only the last addition rounds.

A row of the input is a sequence of blocks of 40 bytes: 32 elements in the order of ``Decoder.byte_order``, ``t`` as
float32, and minus ``offset`` times the sum of the elements as int32, with which every sum starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mxperts.backend.cpu import simd
from mxperts.backend.cpu.bf16 import Prefetch, row_pointers
from mxperts.backend.cpu.decode import Decoder
from mxperts.backend.cpu.layout import QUARTERS, STRIP

STEPS = 8
"""Vectors of four values that a row's block of 32 makes."""
BLOCK_BYTES = 40
"""Bytes of a block of the input."""
_T, _START = 32, 36


def _broadcast(b: Any, row: Any, offset: int) -> Any:
    return simd.splat(b, simd.load(b, row, simd.I32, offset=offset, align=4), simd.I32S)


def _add_block(b: Any, part: Any, row: Any, scale: Any, so_far: Any) -> Any:
    t = b.bitcast(_broadcast(b, row, _T), simd.F32S)
    return simd.fma(b, b.fmul(b.sitofp(part, simd.F32S), t), scale, so_far)


def emit_direct(decoder: Decoder, rows: int) -> Any:
    """sums [rows, 64] = rows x tiles: codes are decoded as they are used."""
    tile_bytes = STRIP + STRIP * decoder.format.block_bytes
    together = QUARTERS if rows <= 2 else 2
    in_registers = rows <= 2
    per_group = STEPS // decoder.groups

    def body(b: Any, arguments: Sequence[Any]) -> None:
        tiles, blocks, row_table, sums = arguments
        x = row_pointers(b, row_table, rows)
        table = decoder.byte_table()
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
                parts = {(m, v): _broadcast(b, here[m], _START) for m in range(rows) for v in quarters}
                for group in range(decoder.groups):
                    decoded = {}
                    for v in quarters:
                        ahead.step()
                        codes = b.add(tile, simd.I64(STRIP + v * 16 * decoder.format.block_bytes))
                        decoded[v] = decoder.bytes(b, codes, table, group)
                    for j in range(per_group):
                        for m in range(rows):
                            four = _broadcast(b, here[m], 4 * (group * per_group + j))
                            for v in quarters:
                                parts[m, v] = simd.dot_u8_i8(b, parts[m, v], decoded[v][j], four)
                for v in quarters:
                    scale = simd.e8m0(b, tile, 16 * v)
                    for m in range(rows):
                        slot, offset = m * QUARTERS + v, 256 * m + 64 * v
                        so_far = (
                            carried[slot] if in_registers else simd.load(b, kept, simd.F32S, offset=offset, align=64)
                        )
                        total = _add_block(b, parts[m, v], here[m], scale, so_far)
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
    """Tiles to unsigned bytes [blocks, 8, 64 x 4] and float32 scales [blocks, 64]."""
    tile_bytes = STRIP + STRIP * decoder.format.block_bytes
    per_group = STEPS // decoder.groups

    def body(b: Any, arguments: Sequence[Any]) -> None:
        tiles, blocks, values, scales = arguments
        table = decoder.byte_table()

        def turn(block: Any, carried: list[Any]) -> list[Any]:
            tile = b.add(tiles, b.mul(block, simd.I64(tile_bytes)))
            ahead = Prefetch(b, tile, tile_bytes, QUARTERS * decoder.groups)
            out = b.add(values, b.mul(block, simd.I64(STEPS * 64 * QUARTERS)))
            scale_out = b.add(scales, b.mul(block, simd.I64(64 * QUARTERS)))
            for v in range(QUARTERS):
                codes = b.add(tile, simd.I64(STRIP + v * 16 * decoder.format.block_bytes))
                for group in range(decoder.groups):
                    ahead.step()
                    for j, fours in enumerate(decoder.bytes(b, codes, table, group)):
                        step = group * per_group + j
                        simd.store(b, fours, out, offset=64 * (step * QUARTERS + v), align=64)
                simd.store(b, simd.e8m0(b, tile, 16 * v), scale_out, offset=64 * v, align=64)
            return []

        simd.counted(b, blocks, [], turn)

    return body


def emit_decoded(rows: int) -> Any:
    """sums [rows, 64] += rows x decoded values and scales."""

    def body(b: Any, arguments: Sequence[Any]) -> None:
        values, scales, blocks, row_table, offset, sums = arguments
        x = [b.add(p, offset) for p in row_pointers(b, row_table, rows)]

        def turn(block: Any, carried: list[Any]) -> list[Any]:
            at = b.add(values, b.mul(block, simd.I64(STEPS * 64 * QUARTERS)))
            scale_at = b.add(scales, b.mul(block, simd.I64(64 * QUARTERS)))
            here = [b.add(p, b.mul(block, simd.I64(BLOCK_BYTES))) for p in x]
            starts = [_broadcast(b, here[m], _START) for m in range(rows)]
            parts = {(m, v): starts[m] for m in range(rows) for v in range(QUARTERS)}
            for step in range(STEPS):
                vectors = [
                    simd.load(b, at, simd.I8S, offset=64 * (step * QUARTERS + v), align=64) for v in range(QUARTERS)
                ]
                for m in range(rows):
                    four = _broadcast(b, here[m], 4 * step)
                    for v in range(QUARTERS):
                        parts[m, v] = simd.dot_u8_i8(b, parts[m, v], vectors[v], four)
            kept = simd.opaque(b, sums)
            for v in range(QUARTERS):
                scale = simd.load(b, scale_at, simd.F32S, offset=64 * v, align=64)
                for m in range(rows):
                    so_far = simd.load(b, kept, simd.F32S, offset=256 * m + 64 * v, align=64)
                    total = _add_block(b, parts[m, v], here[m], scale, so_far)
                    simd.store(b, total, kept, offset=256 * m + 64 * v, align=64)
            return []

        simd.counted(b, blocks, [], turn)

    return body
