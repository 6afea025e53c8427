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
from torch import Tensor

from mxperts.backend.cpu.decode import Words
from mxperts.formats import SCALE_BIAS, BlockFormat

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
        """Tiles uint8 [E, strips, blocks, tile_bytes] of codes [E, N, P] and scales [E, N, blocks]."""
        experts = packed.shape[0]
        tiles = big_empty(experts * self.strips * self.blocks * self.tile_bytes)
        tiles = tiles.view(experts, self.strips, self.blocks, self.tile_bytes)
        for e in range(experts):
            tile_scales, tile_codes = self._views(tiles[e])
            tile_scales.copy_(self._in_strips(scales[e], SCALE_BIAS).permute(0, 2, 1))
            words = self._in_strips(packed[e], 0)  # [strips, 64, bytes]
            tile_codes.copy_(self._as_words(words))
        return tiles

    def from_tiles(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """The codes and scales that ``to_tiles`` was given."""
        experts = tiles.shape[0]
        packed = torch.empty(experts, self.rows, self.format.packed_size(self.k), dtype=torch.uint8)
        scales = torch.empty(experts, self.rows, self.blocks, dtype=torch.uint8)
        for e in range(experts):
            tile_scales, tile_codes = self._views(tiles[e])
            scales[e] = self._in_rows(tile_scales.permute(0, 2, 1))
            words = torch.empty(
                self.strips, STRIP, self.blocks * self.format.block_bytes, dtype=torch.uint8
            )
            self._as_words(words).copy_(tile_codes)
            packed[e] = self._in_rows(words)[:, : packed.shape[2]]
        return packed, scales

    def _views(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Scales [strips, blocks, 64] and codes as 16-bit words [strips, blocks, quarter, group, word, row, half]."""
        words = Words.of(self.format.element)
        groups = words.groups(self.format.block_size)
        codes = tiles[:, :, STRIP:].view(torch.int16)
        return tiles[:, :, :STRIP], codes.unflatten(-1, (QUARTERS, groups, words.words, 16, 2))

    def _as_words(self, rows: Tensor) -> Tensor:
        """Rows of codes [strips, 64, bytes] as the same words as in ``_views``."""
        words = Words.of(self.format.element)
        groups = words.groups(self.format.block_size)
        split = rows.view(torch.int16).view(self.strips, QUARTERS, 16, self.blocks, groups, 2, words.words)
        return split.permute(0, 3, 1, 4, 6, 2, 5)

    def _in_strips(self, rows: Tensor, fill: int) -> Tensor:
        """Rows [N, ...] of one expert, padded, in the order of strips: [strips, 64, bytes of whole blocks]."""
        width = rows.shape[1]
        if width != self.blocks:
            width = self.blocks * self.format.block_bytes
        padded = rows.new_full((self.strips * STRIP, width), fill)
        for there, here in self._halves():
            block = rows[here]
            padded.view(self.strips, STRIP, width)[:, there].flatten(0, 1)
            target = padded.view(self.strips, STRIP, width)[:, there]
            full = block.new_full((target.shape[0] * target.shape[1], width), fill)
            full[: block.shape[0], : block.shape[1]] = block
            target.copy_(full.view(target.shape))
        return padded.view(self.strips, STRIP, width)

    def _in_rows(self, strips: Tensor) -> Tensor:
        """The inverse of ``_in_strips``."""
        rows = strips.new_empty(self.rows, strips.shape[2])
        for there, here in self._halves():
            target = rows[here]
            target.copy_(strips[:, there].flatten(0, 1)[: target.shape[0]])
        return rows

    def _halves(self) -> list[tuple[slice, slice]]:
        """Which rows of a strip hold which rows of the weight."""
        if not self.gated:
            return [(slice(None), slice(None))]
        half = self.rows // 2
        gate, up = slice(0, STRIP // 2), slice(STRIP // 2, STRIP)
        if self.interleaved:
            return [(gate, slice(0, None, 2)), (up, slice(1, None, 2))]
        return [(gate, slice(0, half)), (up, slice(half, None))]


def big_empty(nbytes: int) -> Tensor:
    """Unset memory uint8 [nbytes], in huge pages where the system has them: kernels walk through all of it."""
    if nbytes < 2 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + nbytes]
