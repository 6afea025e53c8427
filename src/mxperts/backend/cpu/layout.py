"""The backend's own layout of weights: tiles of 64 rows by one block, scales and codes together, in reading order.

[E, strip, block] tiles; a strip is 64 rows. A tile starts with its 64 scales; its codes follow as vectors of 64 bytes,
[quarter of 16 rows, group, word of the group, row, half] 16-bit words: see ``decode``. Where there are gate and up rows
the first half of a strip holds 32 gate rows and the second half the up rows that belong to them, so that what one
strip gives is all that 32 activations need, one block of the next projection. Rows beyond the weight's are zero codes
with scale 1.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch
from numba import carray, prange
from torch import Tensor

from mxperts.backend.cpu.decode import Words
from mxperts.backend.cpu.jit import exclusive, jit, kernel, threads
from mxperts.backend.cpu.memory import byte_pointer, double_byte_pointer
from mxperts.formats import SCALE_BIAS, BlockFormat
from mxperts.packing import pack, unpack

STRIP = 64
"""Rows of a strip."""
QUARTERS = 4
"""Vectors of 16 rows in a strip."""
HUGE_PAGE = 1 << 21
"""Bytes of a huge page on the systems that have a way to ask for them."""


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The shape of one projection's weight.

    Attributes:
        format: of the weight.
        rows, k: N and K.
        gated: whether the rows are those of a gate and of an up projection, to be laid side by side.
        interleaved: whether they alternate.
    """

    format: BlockFormat
    rows: int
    k: int
    gated: bool = False
    interleaved: bool = False

    @property
    def columns(self) -> int:
        """Results of one strip: 32 activations of gate and up rows, or 64."""
        return STRIP // 2 if self.gated else STRIP

    @property
    def strips(self) -> int:
        """Strips of one expert."""
        return -(-self.rows // STRIP) if not self.gated else -(-self.rows // 2 // self.columns)

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return self.format.blocks(self.k)

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile."""
        return STRIP + STRIP * self.format.block_bytes

    def to_tiles(self, packed: Tensor, scales: Tensor) -> Tensor:
        """Tiles uint8 [E, strips, blocks, tile_bytes] of codes [E, N, P] and scales [E, N, blocks].

        What lies beyond the last value of a row becomes zero codes, if it is not.
        """
        experts = packed.shape[0]
        past = self.k % self.format.block_size
        if past:
            packed = packed.clone()
            last = packed[..., -self.format.block_bytes :]
            codes = unpack(last, self.format)
            codes[..., past:] = 0
            last.copy_(pack(codes, self.format))
        tiles = big_empty(experts * self.strips * self.blocks * self.tile_bytes)
        self._move(packed.contiguous(), scales.contiguous(), tiles, back=False)
        return tiles.view(experts, self.strips, self.blocks, self.tile_bytes)

    def from_tiles(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """The codes and scales that ``to_tiles`` was given."""
        experts = tiles.shape[0]
        packed = torch.empty(experts, self.rows, self.format.packed_size(self.k), dtype=torch.uint8)
        scales = torch.empty(experts, self.rows, self.blocks, dtype=torch.uint8)
        self._move(packed, scales, tiles, back=True)
        return packed, scales

    def _move(self, packed: Tensor, scales: Tensor, tiles: Tensor, *, back: bool) -> None:
        words = Words.of(self.format.element)
        addresses = packed.data_ptr(), scales.data_ptr(), tiles.data_ptr()
        shape = packed.shape[0] * self.strips, self.strips, self.rows, self.blocks
        order = int(self.gated), int(self.interleaved)
        with exclusive():
            _move_strips(*addresses, *shape, *order, words.groups(self.format.block_size), words.words, back, threads())


@jit
def _row_of(strip: int, lane: int, rows: int, gated: int, interleaved: int) -> int:
    """The weight's row in one of a strip's 64 places; -1 for none."""
    if gated == 0:
        row = strip * STRIP + lane
        return row if row < rows else -1
    half, place = lane // (STRIP // 2), strip * (STRIP // 2) + lane % (STRIP // 2)
    if place >= rows // 2:
        return -1
    return 2 * place + half if interleaved else half * (rows // 2) + place


@kernel()
def _move_strips(
    packed_at: int,
    scales_at: int,
    tiles_at: int,
    all_strips: int,
    strips: int,
    rows: int,
    blocks: int,
    gated: int,
    interleaved: int,
    groups: int,
    words: int,
    back: bool,
    threads: int,
) -> None:
    """Between rows of codes and scales and tiles, in either direction."""
    row_words, tile_words = blocks * groups * 2 * words, STRIP // 2 + STRIP * groups * 2 * words
    for thread in prange(threads):
        for item in range(all_strips * thread // threads, all_strips * (thread + 1) // threads):
            expert, strip = item // strips, item % strips
            codes = carray(double_byte_pointer(packed_at + 2 * expert * rows * row_words), rows * row_words)
            scales = carray(byte_pointer(scales_at + expert * rows * blocks), rows * blocks)
            size = blocks * tile_words
            tiles = carray(double_byte_pointer(tiles_at + 2 * item * size), size)
            tile_scales = carray(byte_pointer(tiles_at + 2 * item * size), 2 * size)
            for lane in range(STRIP):
                row = _row_of(strip, lane, rows, gated, interleaved)
                for block in range(blocks):
                    scale_at = 2 * block * tile_words + lane
                    if row < 0:
                        if not back:
                            tile_scales[scale_at] = SCALE_BIAS
                    elif back:
                        scales[row * blocks + block] = tile_scales[scale_at]
                    else:
                        tile_scales[scale_at] = scales[row * blocks + block]
                    first = block * tile_words + STRIP // 2 + lane // 16 * 16 * groups * 2 * words + lane % 16 * 2
                    source = row * row_words + block * groups * 2 * words
                    for group in range(groups):
                        for half in range(2):
                            for word in range(words):
                                there = first + (group * words + word) * 32 + half
                                here = source + (group * 2 + half) * words + word
                                if row < 0:
                                    if not back:
                                        tiles[there] = 0
                                elif back:
                                    codes[here] = tiles[there]
                                else:
                                    tiles[there] = codes[here]


def big_empty(nbytes: int) -> Tensor:
    """Unset memory uint8 [nbytes], in huge pages where the system has them: kernels walk through all of it."""
    if nbytes < 2 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + nbytes]
