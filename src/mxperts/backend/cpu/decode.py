"""From packed codes to vectors of values: the instructions that decode one format, derived from its record.

A tile holds 64 rows of one block of 32 values (``layout``). Its codes lie in vectors of 16-bit words, one row a 32-bit
lane: a word holds ``codes_per_word`` codes, but for 6 bits three words in three vectors hold eight. One group of words
of the two halves of a lane gives ``2 * G`` codes of a row: those of the lower half, then those of the upper.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mxperts.backend.cpu import simd
from mxperts.formats import BlockFormat, ElementFormat


@dataclass(frozen=True)
class Words:
    """How the codes of a row's block lie in 16-bit words.

    Attributes:
        words: words that hold whole codes together, W.
        codes: codes in them, G.
    """

    words: int
    codes: int

    @staticmethod
    @lru_cache
    def of(element: ElementFormat) -> Words:
        """The fewest words that hold whole codes."""
        common = math.lcm(16, element.bits)
        return Words(common // 16, common // element.bits)

    def groups(self, block_size: int) -> int:
        """Groups of two halves in a block."""
        return block_size // (2 * self.codes)

    def order(self, block_size: int) -> list[int]:
        """The position in its block of each value in decoded order: pairs that meet in one 32-bit lane."""
        g = self.codes
        return [2 * g * q + half * g + j for q in range(self.groups(block_size)) for j in range(g) for half in (0, 1)]


def bf16_bits(value: float) -> int:
    """The bf16 bits of a number that bf16 holds exactly; NaN too."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    if math.isnan(value):
        return 0x7FC0
    assert bits & 0xFFFF == 0, f"{value} is no bf16 number"
    return int(bits >> 16)


@dataclass(frozen=True)
class Integers:
    """Elements as integers: ``value = (byte - offset) / 2^fraction_bits``.

    Attributes:
        fraction_bits: of the elements.
        offset: what makes them unsigned.
    """

    fraction_bits: int
    offset: int

    @staticmethod
    @lru_cache
    def of(element: ElementFormat) -> Integers | None:
        """None for elements that are no integers of 8 bits times a power of two."""
        if any(not math.isfinite(v) for v in element.values):
            return None
        fraction_bits = -round(math.log2(element.smallest))
        low, high = (round(math.ldexp(v, fraction_bits)) for v in (element.min, element.max))
        return Integers(fraction_bits, -low) if low >= -128 and high <= 127 else None


@dataclass(frozen=True)
class Decoder:
    """Emits the decoding of one format to bf16 or to unsigned bytes (x86 AVX-512 with VBMI)."""

    format: BlockFormat

    @property
    def words(self) -> Words:
        """How the codes lie in words."""
        return Words.of(self.format.element)

    @property
    def groups(self) -> int:
        """Groups of vectors of a block."""
        return self.words.groups(self.format.block_size)

    def table(self) -> list[Any]:
        """What ``bf16`` looks codes up in: constants that stay in registers."""
        bits = [bf16_bits(v) for v in self.format.element.values]
        if self.format.element.bits == 8:
            low, high = [b & 0xFF for b in bits], [b >> 8 for b in bits]
            return [simd.constant(simd.I8S, part[i : i + 64]) for part in (low, high) for i in range(0, 256, 64)]
        bits = bits * max(1, 32 // len(bits))
        return [simd.constant(simd.I16S, bits[i : i + 32]) for i in range(0, len(bits), 32)]

    def bf16(self, b: Any, address: Any, table: list[Any], group: int) -> list[Any]:
        """The bf16 pairs of one group: G vectors of 16 rows, in ``Words.order``."""
        vectors = self._load(b, address, group)
        if self.format.element.bits == 8:
            return self._bf16_of_bytes(b, b.bitcast(vectors[0], simd.I8S), table)
        return [simd.lookup16(b, table, index) for index in self._indices(b, vectors)]

    def byte_table(self) -> list[Any]:
        """What ``bytes`` looks codes up in; empty if flipping the sign bit is enough."""
        integers = Integers.of(self.format.element)
        assert integers is not None, self.format
        values = [round(math.ldexp(v, integers.fraction_bits)) + integers.offset for v in self.format.element.values]
        if values == [code ^ 0x80 for code in range(256)]:
            return []
        return [simd.constant(simd.I8S, values * (64 // len(values)))]

    def bytes(self, b: Any, address: Any, table: list[Any], group: int) -> list[Any]:
        """The elements of one group as unsigned bytes: G / 2 vectors of 16 rows, four values a lane."""
        vectors = self._load(b, address, group)
        bits = self.format.element.bits
        if bits == 8:
            found = vectors
        elif bits == 4:
            found = [vectors[0], simd.shift_right(b, vectors[0], 4)]
        else:
            codes = self._indices(b, vectors)
            found = [
                simd.select_bits(b, codes[j], simd.shift_right(b, codes[j + 1], -8), 0xFF00)
                for j in range(0, self.words.codes, 2)
            ]
        indices = [b.bitcast(v, simd.I8S) for v in found]
        if not table:
            return [b.xor(i, simd.constant(simd.I8S, 0x80)) for i in indices]
        return [simd.lookup8(b, table, i) for i in indices]

    def byte_order(self) -> list[int]:
        """The position in its block of each value in the order of ``bytes``."""
        g, bits = self.words.codes, self.format.element.bits
        order = []
        for q in range(self.groups):
            for i in range(g // 2):
                first, second = (i, i + 2) if bits == 4 else (2 * i, 2 * i + 1)
                order += [2 * g * q + half * g + j for half in (0, 1) for j in (first, second)]
        return order

    def _load(self, b: Any, address: Any, group: int) -> list[Any]:
        words = self.words.words
        offsets = [64 * (group * words + w) for w in range(words)]
        return [simd.load(b, address, simd.I16S, offset=offset, align=64) for offset in offsets]

    def _bf16_of_bytes(self, b: Any, codes: Any, table: list[Any]) -> list[Any]:
        low, high = (b.bitcast(simd.lookup8(b, half, codes), simd.I16S) for half in (table[:4], table[4:]))
        even = simd.select_bits(b, low, simd.shift_right(b, high, -8), 0xFF00)
        odd = simd.select_bits(b, simd.shift_right(b, low, 8), high, 0xFF00)
        return [even, odd]

    def _indices(self, b: Any, words: list[Any]) -> list[Any]:
        """Vectors with one code in the low bits of each 16-bit lane; the bits above it are anything."""
        bits, found = self.format.element.bits, []
        for j in range(self.words.codes):
            word, shift = divmod(j * bits, 16)
            index = simd.shift_right(b, words[word], shift)
            here = 16 - shift
            if here < bits:
                rest = simd.shift_right(b, words[word + 1], -here)
                index = simd.select_bits(b, index, rest, ((1 << bits) - 1) & ~((1 << here) - 1))
            found.append(index)
        return found
