"""The layout of prepared weights: there and back, and what CUDA's lanes make of it, in integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxperts.backend.gpu.cuda.element import bf16_rule
from mxperts.backend.gpu.cuda.layout import Tiles
from mxperts.formats import BLOCK_FORMATS, BlockFormat
from mxperts.packing import unpack

formats = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)


def weights(fmt: BlockFormat, experts: int, rows: int, k: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows + k)
    packed = torch.randint(0, 256, (experts, rows, fmt.packed_size(k)), dtype=torch.uint8, generator=g)
    return packed, torch.randint(0, 256, (experts, rows, fmt.blocks(k)), dtype=torch.uint8, generator=g)


@formats
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rows", "k"), [(2, 1), (32, 64), (70, 100), (96, 640)])
def test_there_and_back(fmt: BlockFormat, gated: bool, interleaved: bool, rows: int, k: int) -> None:
    tiles = Tiles(format=fmt, rows=rows, k=k, gated=gated, interleaved=gated and interleaved)
    packed, scales = weights(fmt, 2, rows, k)
    laid = tiles.to_tiles(packed, scales)
    assert laid.shape == (2, tiles.units, tiles.steps, tiles.slice_bytes)
    again = tiles.from_tiles(laid)
    assert torch.equal(again[0], packed)
    assert torch.equal(again[1], scales)


def registers(fmt: BlockFormat, cell: list[int], lane: int, j: int, m: int) -> list[int]:
    """``patterns`` of common.cuh: the four registers of a lane for one mma."""
    rule = bf16_rule(fmt)

    def word(at: int) -> int:
        return sum(b << (8 * i) for i, b in enumerate(cell[at : at + 4]))

    if fmt.element.bits == 8:
        regs = []
        for i in range(2):
            v = word(512 * j + lane * 16 + 8 * m + 4 * i)
            for h in range(2):
                if rule.integer:
                    low = v if h else v >> 8
                    both = []
                    for half in (0, 16):
                        c = low >> half & 0xFF
                        both.append(bf16(128 + (c & 0x7F) + (-256 if c & 0x80 else -128)) << half)
                    regs.append(sum(both))
                else:
                    w = v << 8 & 0xFFFFFFFF if h else v
                    regs.append(w & 0x80008000 | w >> rule.shift & rule.mask)
        return regs
    w, nibble = word(lane * 16 + 8 * j + 4 * m), 0x81C081C0
    regs = [w & nibble, w << 3 & nibble]
    regs.append(w << 6 & 0x01C001C0 | w << 2 & 0x80008000)
    regs.append(w >> 3 & 0x01C001C0 | w << 1 & 0x80008000)
    if fmt.element.bits == 6:
        r = word(512 + lane * 8 + 4 * j)
        for i in range(4):
            left = rule.rest_left(4 * m + i)
            regs[i] |= (r << left if left >= 0 else r >> -left) & rule.low
    return regs


def bf16(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16)) & 0xFFFF


def of_bf16(bits: int) -> float:
    return float(torch.tensor(bits << 16, dtype=torch.int64).to(torch.int32).view(torch.float32))


@formats
def test_every_code_is_where_an_mma_wants_it(fmt: BlockFormat) -> None:
    """All codes in a cell of 16 rows times 64; NaN and Inf are never in tiles that kernels read."""
    tiles, rule = Tiles(format=fmt, rows=32, k=64), bf16_rule(fmt)
    packed, scales = weights(fmt, 1, 32, 64)
    codes = unpack(packed[0], fmt)
    laid = tiles.to_tiles(packed, scales)[0, 0, 0].tolist()
    for c in range(2):
        cell = laid[c * tiles.cell_bytes : (c + 1) * tiles.cell_bytes]
        for lane in range(32):
            g, t = divmod(lane, 4)
            at = 2 * tiles.cell_bytes + g * 8 + c * 4
            assert laid[at : at + 4] == [int(scales[0, 16 * c + g + 8 * half, j]) for j in (0, 1) for half in (0, 1)]
            for j in range(2):
                for m in range(2):
                    for a, register in enumerate(registers(fmt, cell, lane, j, m)):
                        for h in range(2):
                            row, k = 16 * c + g + 8 * (a & 1), 32 * j + 8 * t + 4 * m + (a & 2) + h
                            value = fmt.element.values[int(codes[row, k])]
                            if abs(value) < float("inf"):
                                found = of_bf16(register >> (16 * h) & 0xFFFF) * 2.0**rule.offset
                                assert found == value, (c, lane, j, m, a, h)
