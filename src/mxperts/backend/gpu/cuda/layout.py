"""The layout of prepared weights: what one lane of a warp needs for its share of a matrix product stands together.

A *cell* is 16 rows times 64 values of K, the A operand of four ``mma.m16n8k16``. Lane ``4 g + t`` of a warp holds rows
g and g + 8 and, of each of the cell's two blocks of 32, the values k = 8 t ... 8 t + 7: the order of K within a product
is free as long as both operands have the same. A *slice* is two cells one below the other, their codes first and then
their scales; a *unit* is 32 rows, all its slices along K in a row, so that a warp streams contiguous memory.

In ``gate_up_proj`` a cell's first 8 rows are gate rows and its last 8 the up rows of the same 8 intermediate values,
which thus meet in one thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mxperts.formats import BlockFormat
from mxperts.packing import pack, unpack

CELL_ROWS, UNIT_ROWS, STEP = 16, 32, 64
LANES = 32
PADDING_SCALE = 64
"""Of blocks of zeros beyond the end of a row: whatever it is multiplied by, 2^(64 - 127) times that is a number."""
_NIBBLES = ((15, 8, 7, 6), (12, 5, 4, 3), (13, 2, 1, 0), (14, 11, 10, 9))
"""Where the sign and the three bits next to it stand, of the four registers of an mma's A: see ``patterns`` in CUDA."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """One projection in this layout.

    Attributes:
        format: of the weights.
        rows, k: of the projection.
        gated: whether the rows are those of a gate and an up projection.
        interleaved: whether gate and up rows alternate.
    """

    format: BlockFormat
    rows: int
    k: int
    gated: bool = False
    interleaved: bool = False

    @property
    def units(self) -> int:
        """Units of an expert."""
        return -(-self.rows // UNIT_ROWS) if not self.gated else -(-self.rows // 2 // (UNIT_ROWS // 2))

    @property
    def steps(self) -> int:
        """Slices of a unit."""
        return -(-self.k // STEP)

    @property
    def cell_bytes(self) -> int:
        """Bytes of a cell's codes."""
        return CELL_ROWS * STEP * self.format.element.bits // 8

    @property
    def slice_bytes(self) -> int:
        """Bytes of a slice."""
        return 2 * self.cell_bytes + UNIT_ROWS * STEP // self.format.block_size

    @property
    def expert_bytes(self) -> int:
        """Bytes of an expert."""
        return self.units * self.steps * self.slice_bytes

    @cached_property
    def row_order(self) -> Tensor:
        """int64 [units * 32]: the row that stands at each place; ``rows`` where there is none."""
        if not self.gated:
            place = torch.arange(self.units * UNIT_ROWS)
            return torch.where(place < self.rows, place, self.rows)
        width = self.rows // 2
        value = torch.arange(self.units * (UNIT_ROWS // 2)).view(-1, 1, 8)  # [2 units, 1, 8]
        up = torch.tensor([0, 1]).view(1, 2, 1)
        row = 2 * value + up if self.interleaved else value + up * width
        return torch.where(value < width, row, self.rows).flatten()

    def to_tiles(self, packed: Tensor, scales: Tensor) -> Tensor:
        """uint8 [E, units, steps, slice_bytes] from packed codes [E, N, P] and scales [E, N, blocks]."""
        shape = (packed.shape[0], self.units, self.steps, self.slice_bytes)
        out = torch.empty(shape, dtype=torch.uint8, device=packed.device)
        for e in range(packed.shape[0]):
            self._fill(out[e], packed[e], scales[e])
        return out

    def from_tiles(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """The packed codes [E, N, P] and scales [E, N, blocks] that ``to_tiles`` was given."""
        experts, blocks = tiles.shape[0], self.format.blocks(self.k)
        packed = tiles.new_empty(experts, self.rows, self.format.packed_size(self.k))
        scales = tiles.new_empty(experts, self.rows, blocks)
        order = self.row_order.to(tiles.device)
        place = torch.empty(self.rows, dtype=torch.int64, device=tiles.device)
        there = order < self.rows
        place[order[there]] = torch.arange(len(order), device=tiles.device)[there]
        for e in range(experts):
            codes = tiles[e, :, :, : 2 * self.cell_bytes]
            rows = self._from_cells(codes.unflatten(-1, (2, self.cell_bytes)))  # [units * 32, steps * 64]
            packed[e] = pack(rows[place, : blocks * self.format.block_size], self.format)
            lanes = tiles[e, :, :, 2 * self.cell_bytes :].unflatten(
                -1, (8, 2, 2, 2)
            )  # unit, step, g, cell, block, half
            by_row = lanes.permute(0, 3, 5, 2, 1, 4).reshape(-1, self.steps * 2)
            scales[e] = by_row[place, :blocks]
        return packed, scales

    def _fill(self, out: Tensor, packed: Tensor, scales: Tensor) -> None:
        order = self.row_order.to(packed.device)
        codes = _padded(unpack(packed, self.format), self.steps * STEP, 0)[order]
        blocks = _padded(scales, self.steps * 2, PADDING_SCALE)[order]
        out[:, :, : 2 * self.cell_bytes] = self._to_cells(codes).flatten(-2)
        cells = blocks.view(self.units, 2, 2, 8, self.steps, 2)  # unit, cell, half, g, step, block
        out[:, :, 2 * self.cell_bytes :] = cells.permute(0, 4, 3, 1, 5, 2).flatten(2)

    def _to_cells(self, rows: Tensor) -> Tensor:
        """Codes [units * 32, steps * 64] as the bytes of cells [units, steps, 2, cell_bytes]."""
        # unit, cell, half, g, step, block, t, i  ->  unit, step, cell, block, g, t, half, i
        codes = rows.view(self.units, 2, 2, 8, self.steps, 2, 4, 8).permute(0, 4, 1, 5, 3, 6, 2, 7)
        if self.format.element.bits == 8:  # the byte of row g above that of row g + 8, k = 8 t + i one after the other
            return codes.flip(-2).transpose(-1, -2).flatten(3)
        codes = codes.to(torch.int32)
        nibbles, rest = codes >> self._rest_bits, codes & ((1 << self._rest_bits) - 1)
        if self._rest_high:
            nibbles, rest = self._exchange(codes)
        words = []
        for m in range(2):
            word = torch.zeros_like(codes[..., 0, 0])
            for a, h in _registers():
                for bit, to in zip((3, 2, 1, 0), _NIBBLES[a], strict=True):
                    word |= ((nibbles[..., a & 1, 4 * m + (a & 2) + h] >> bit) & 1) << (to + 16 * h)
            words.append(word)
        main = torch.stack(words, -1).permute(0, 1, 2, 4, 5, 3, 6)  # unit, step, cell, g, t, block, m
        regions = [_bytes(main.flatten(-2)).flatten(3)]
        if self._rest_bits:
            word = torch.zeros_like(codes[..., 0, 0])
            for m in range(2):
                for a, h in _registers():
                    for bit, to in enumerate(self._rest_places(4 * m + a)):
                        word |= ((rest[..., a & 1, 4 * m + (a & 2) + h] >> bit) & 1) << (to + 16 * h)
            regions.append(_bytes(word.permute(0, 1, 2, 4, 5, 3)).flatten(3))
        return torch.cat(regions, -1)

    def _from_cells(self, cells: Tensor) -> Tensor:
        """The inverse of ``_to_cells``."""
        lead = cells.shape[:3]
        if self.format.element.bits == 8:
            codes = cells.reshape(*lead, 2, 8, 4, 8, 2).transpose(-1, -2).flip(-2)
        else:
            main = _words(cells[..., : LANES * 16].reshape(*lead, 8, 4, 16)).unflatten(-1, (2, 2))
            codes = torch.zeros(*lead, 2, 8, 4, 2, 8, dtype=torch.int32, device=cells.device)
            rest = torch.zeros_like(codes)
            low = _words(cells[..., LANES * 16 :].reshape(*lead, 8, 4, -1)) if self._rest_bits else main[..., 0]
            for m in range(2):
                for a, h in _registers():
                    at = (..., a & 1, 4 * m + (a & 2) + h)
                    for bit, to in zip((3, 2, 1, 0), _NIBBLES[a], strict=True):
                        codes[at] |= ((main[..., m] >> (to + 16 * h)) & 1).permute(0, 1, 2, 5, 3, 4) << bit
                    for bit, to in enumerate(self._rest_places(4 * m + a) if self._rest_bits else ()):
                        rest[at] |= ((low >> (to + 16 * h)) & 1).permute(0, 1, 2, 5, 3, 4) << bit
            codes = self._join(codes, rest).to(torch.uint8)
        # unit, step, cell, block, g, t, half, i  ->  unit, cell, half, g, step, block, t, i
        return codes.permute(0, 2, 6, 4, 1, 3, 5, 7).reshape(self.units * UNIT_ROWS, self.steps * STEP)

    # Six bits are a nibble that a four-bit format would have, in the same place, and two more. Of E2M3 those are the
    # last two of the mantissa; of E3M2 the first of the exponent and the last of the mantissa, four places apart.

    @property
    def _rest_bits(self) -> int:
        return self.format.element.bits - 4 if self.format.element.bits < 8 else 0

    @property
    def _rest_high(self) -> bool:
        return self._rest_bits == 2 and self.format.element.exponent_bits == 3

    def _exchange(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        return (codes >> 2) & 8 | (codes >> 1) & 7, (codes >> 3) & 2 | codes & 1

    def _join(self, nibbles: Tensor, rest: Tensor) -> Tensor:
        if self._rest_high:
            return (nibbles & 8) << 2 | (rest & 2) << 3 | (nibbles & 7) << 1 | rest & 1
        return nibbles << self._rest_bits | rest

    def _rest_places(self, register: int) -> tuple[int, int]:
        """Where the lower and the higher of the two bits stand, of a block's 8 registers."""
        if self._rest_high:
            low = register if register < 4 else register + 4
            return low, low + 4
        return 2 * register, 2 * register + 1


def _registers() -> list[tuple[int, int]]:
    """A register of an mma's A and the half of it; row g + 8 in odd registers, k two further in the last two."""
    return [(a, h) for a in range(4) for h in range(2)]


def _padded(rows: Tensor, width: int, value: int) -> Tensor:
    """[N + 1, width]: wider, and with one more row, of ``value``."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[-1], 0, 1), value=value)


def _bytes(words: Tensor) -> Tensor:
    """Little-endian bytes of int32 words, [..., n] to [..., 4 n]."""
    return words.contiguous().view(torch.uint8)


def _words(data: Tensor) -> Tensor:
    """The inverse of ``_bytes``."""
    return data.contiguous().view(torch.int32)
