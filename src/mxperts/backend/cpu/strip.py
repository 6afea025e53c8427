"""One strip of 64 weight rows times any number of input rows, on any path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from mxperts.backend.cpu import avx512, float32, simd
from mxperts.backend.cpu.avx512 import Products
from mxperts.backend.cpu.decode import Decoder
from mxperts.backend.cpu.float32 import Float32
from mxperts.backend.cpu.jit import native
from mxperts.backend.cpu.layout import STRIP
from mxperts.backend.cpu.memory import float_pointer
from mxperts.backend.cpu.paths import AVX2, AVX512_BF16, AVX512_VNNI, Path
from mxperts.backend.cpu.rule import BLOCK
from mxperts.formats import BlockFormat

AT_ONCE = 96
"""Most input rows of one call: their sums, and a chunk of decoded weights, stay in the second-level cache."""
CHUNK = 4
"""Blocks that are decoded at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernels:
    """What a path consists of: three functions that emit code, and the sizes of what they read.

    Attributes:
        name: of the path.
        careful: whether weights are decoded to what the dtype of the hidden states makes of them, whatever their scale.
        kind: the dtype that careful kernels are for.
        rows: most input rows of one call of ``direct`` or ``decoded``.
        block_bytes: of an input row.
        decoded_bytes: of a tile once it is decoded, without its scales.
        direct, decode, decoded: emit the functions of that name, the outer ones for a number of rows.
        direct_up_to: by the bits of a code, rows up to which decoding at each use takes less time than decoding once,
            as measured.
    """

    name: str
    careful: bool = False
    kind: int = 0
    rows: int
    block_bytes: int
    decoded_bytes: int
    direct: Callable[[Decoder, int], Any] | None
    decode: Callable[[Decoder], Any]
    decoded: Callable[[int], Any]
    direct_up_to: Mapping[int, int]


def _avx512(path: Path, products: Products, direct_up_to: dict[int, int]) -> Kernels:
    return Kernels(
        name=path.name,
        rows=avx512.ROWS,
        block_bytes=products.block_bytes,
        decoded_bytes=4 * STRIP * products.steps,
        direct=lambda decoder, rows: avx512.emit_direct(products, decoder, rows),
        decode=lambda decoder: avx512.emit_decode(products, decoder),
        decoded=lambda rows: avx512.emit_decoded(products, rows),
        direct_up_to=direct_up_to,
    )


BF16 = _avx512(AVX512_BF16, avx512.BF16, {4: 24, 6: 12, 8: 6})
VNNI = _avx512(AVX512_VNNI, avx512.VNNI, {4: 24, 6: 12, 8: AT_ONCE})


def kernels_of(path: Path, kind: int) -> Kernels:
    """What a path consists of, for hidden states of a dtype."""
    if path is AVX512_BF16:
        return BF16
    return VNNI if path is AVX512_VNNI else _float32(path, kind)


@lru_cache
def _float32(path: Path, kind: int) -> Kernels:
    emit = Float32(lanes=8 if path is AVX2 else 4, kind=kind, fused=path is AVX2)
    return Kernels(
        name=path.name,
        careful=True,
        kind=kind,
        rows=4,
        block_bytes=float32.BLOCK_BYTES,
        decoded_bytes=4 * STRIP * BLOCK,
        direct=None,
        decode=emit.decode,
        decoded=emit.decoded,
        direct_up_to={},
    )


@lru_cache
def multiply_strip(kernels: Kernels, fmt: BlockFormat) -> Any:
    """The native function that multiplies one strip of a weight with rows of an input.

    Its arguments: address of the strip's first tile; blocks of a row; address of a table of the rows' addresses; number
    of rows, at most ``AT_ONCE``; address of the sums float32 [rows, 64], which need not be set before; addresses of
    ``values_bytes`` and ``SCALES_BYTES`` of memory. Addresses but those of rows are multiples of 64.
    """
    direct, decode, decoded = _intrinsics(kernels, fmt)
    most, block_bytes, tile_bytes = kernels.rows, kernels.block_bytes, STRIP + STRIP * fmt.block_bytes
    direct_up_to = kernels.direct_up_to.get(fmt.element.bits, 0)

    @native(7, f"{kernels.name} {kernels.kind} {fmt}")
    def multiply(tiles: int, blocks: int, table: int, rows: int, sums: int, values: int, scales: int) -> None:
        groups = (rows + most - 1) // most
        if rows <= direct_up_to:
            for group in range(groups):
                first, after = rows * group // groups, rows * (group + 1) // groups
                direct(after - first, tiles, blocks, table + 8 * first, sums + 4 * STRIP * first)
            return
        zeros = carray(float_pointer(sums), rows * STRIP)
        zeros[:] = np.float32(0)
        for start in range(0, blocks, CHUNK):
            count = min(CHUNK, blocks - start)
            decode(tiles + start * tile_bytes, count, values, scales)
            for group in range(groups):
                first, after = rows * group // groups, rows * (group + 1) // groups
                decoded(
                    after - first,
                    values,
                    scales,
                    count,
                    table + 8 * first,
                    start * block_bytes,
                    sums + 4 * STRIP * first,
                )

    return multiply


SCALES_BYTES = CHUNK * 4 * STRIP
"""Memory that ``multiply_strip`` needs for decoded scales."""


def values_bytes(kernels: Kernels) -> int:
    """Memory that ``multiply_strip`` needs for decoded codes."""
    return CHUNK * kernels.decoded_bytes


def _intrinsics(kernels: Kernels, fmt: BlockFormat) -> tuple[Any, Any, Any]:
    """``kernels`` for one format as Numba functions of 64-bit integers."""
    decoder, names = Decoder(fmt), f"mx_{kernels.name}_{kernels.kind}"
    i = types.int64

    def by_rows(b: Any, name: str, emit: Callable[[int], Any], rows: Any, rest: Sequence[Any]) -> None:
        def case(m: int) -> None:
            b.call(simd.define(b.module, f"{name}_{m}", len(rest), emit(m)), rest)

        simd.switch(b, rows, range(1, kernels.rows + 1), case)

    @intrinsic  # type: ignore[untyped-decorator]
    def direct(typing: Any, rows: Any, tiles: Any, blocks: Any, table: Any, sums: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
            emit = kernels.direct
            if emit is not None:
                by_rows(b, f"{names}_direct_{fmt}", lambda m: emit(decoder, m), values[0], values[1:])
            return context.get_dummy_value()

        return types.void(i, i, i, i, i), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def decode(typing: Any, tiles: Any, blocks: Any, values: Any, scales: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            b.call(simd.define(b.module, f"{names}_decode_{fmt}", 4, kernels.decode(decoder)), arguments)
            return context.get_dummy_value()

        return types.void(i, i, i, i), codegen

    @intrinsic  # type: ignore[untyped-decorator]
    def decoded(
        typing: Any, rows: Any, values: Any, scales: Any, blocks: Any, table: Any, offset: Any, sums: Any
    ) -> Any:
        def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            by_rows(b, f"{names}_decoded", kernels.decoded, arguments[0], arguments[1:])
            return context.get_dummy_value()

        return types.void(i, i, i, i, i, i, i), codegen

    return direct, decode, decoded
