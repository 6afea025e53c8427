"""A block format: 32 elements that share one power-of-two scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mxperts.formats.element import ElementFormat

SCALE_BIAS = 127
"""A scale byte ``s`` stands for 2^(s - 127) (E8M0)."""
SCALE_MAX = 254
"""Largest scale byte that is a number."""
SCALE_NAN = 255
"""The scale byte that makes every value of its block NaN."""


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """One MX format of OCP MX v1.0, table 1: an element format, a block size and an E8M0 scale.

    Attributes:
        name: lower-case name, such as ``mxfp6_e2m3``.
        element: format of the elements.
        block_size: elements that share one scale, consecutive along the last dimension.

    Codes are packed as a little-endian bit stream: code ``j`` of a row takes the bits ``[j*b, (j+1)*b)``. That is
    low nibble first for 4 bits and four codes in three bytes for 6 bits, as AMD Quark and compressed-tensors store
    them.
    """

    name: str
    element: ElementFormat
    block_size: int = 32

    def __hash__(self) -> int:
        return hash(self.name)  # formats are keys of what is looked up for every call

    @property
    def bits_per_value(self) -> float:
        """Stored bits per value, the scale's share included."""
        return self.element.bits + 8 / self.block_size

    @property
    def pack_elements(self) -> int:
        """Fewest codes that fill whole bytes."""
        return 8 // math.gcd(self.element.bits, 8)

    @property
    def pack_bytes(self) -> int:
        """Bytes that ``pack_elements`` codes take."""
        return self.element.bits // math.gcd(self.element.bits, 8)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's packed codes, without its scale."""
        return self.block_size * self.element.bits // 8

    def blocks(self, k: int) -> int:
        """Blocks, and so scales, in a row of ``k`` values; the last block may be partly padding."""
        return -(-k // self.block_size)

    def packed_size(self, k: int) -> int:
        """Bytes of packed codes in a row of ``k`` values, padded with zero codes to whole blocks."""
        return self.blocks(k) * self.block_bytes

    def stored_size(self, k: int) -> int:
        """Bytes of packed codes in a row of ``k`` values as checkpoints store them: without padding to whole blocks."""
        return -(-k * self.element.bits // 8)

    def nbytes(self, *shape: int) -> int:
        """Bytes that a tensor of this shape takes, blocked along its last dimension, scales included."""
        *rows, k = shape
        return math.prod(rows) * (self.packed_size(k) + self.blocks(k))

    def __str__(self) -> str:
        return self.name
