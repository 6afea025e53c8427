"""The numbers that quantising is tested on: bit patterns by integer arithmetic, the same everywhere, for ever."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mxperts.formats import BlockFormat, ElementFormat
from mxperts.verification.definition import BFLOAT16, BLOCK, FLOAT16, FLOAT32, Bits, Float, floor_log2, magnitudes

_TAILS = ((BFLOAT16, 1), (BFLOAT16, 33), (BFLOAT16, 95), (FLOAT32, 33))
"""Dtypes and lengths of rows whose last block is not full."""
_TAIL_ROWS = 16
_EXACT = 24
"""Lanes that lie whole binades below their block's largest value; the others take odd distances."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One tensor of inputs.

    Attributes:
        name: what it covers.
        dtype: of its numbers.
        patterns: their bits, [rows, K].
    """

    name: str
    dtype: Float
    patterns: Bits


def families(fmt: BlockFormat) -> Iterator[Family]:
    """Everything that a format's quantisers are tested on."""
    for dtype in (BFLOAT16, FLOAT16):
        yield Family(name=f"every.{dtype.name}", dtype=dtype, patterns=_every(fmt.element, dtype))
    yield Family(name=f"ties.{FLOAT32.name}", dtype=FLOAT32, patterns=_ties(fmt.element))
    for dtype, k in _TAILS:
        yield Family(name=f"tail{k}.{dtype.name}", dtype=dtype, patterns=_tail(dtype, k))


def _every(element: ElementFormat, dtype: Float) -> Bits:
    """Blocks [32768, 32] of a 16-bit dtype: each magnitude, NaN and Inf too, is the largest of one, with both signs.

    The other 30 lanes lie at fixed distances below it, so that each of the 65536 patterns meets every scale that can
    bring it to a code: 24 lanes lie whole binades below, down to where everything becomes zero, and six anywhere in the
    uppermost ones. The largest is in each lane in turn.
    """
    table = magnitudes(element)
    reach = floor_log2(table[-1]) - floor_log2(table[1]) + 2
    binades = range(max(1, reach - _EXACT + 1), max(1, reach - _EXACT + 1) + _EXACT)
    odd = [1, 3, 11, 45, 77, 115] if dtype.mantissa_bits == 7 else [1, 5, 77, 333, 611, 1019]
    below = np.array([0, 0, *(b << dtype.mantissa_bits for b in binades), *odd])  # [32]
    largest = np.arange(1 << 15)[:, None]
    magnitude = np.maximum(largest - below, 0)
    signed = magnitude | np.where((np.arange(BLOCK) + (largest >> 3)) % 2, dtype.sign, 0)
    lane = (np.arange(BLOCK) + largest) % BLOCK
    return np.take_along_axis(signed, lane, axis=1).astype(dtype.bits)


def _ties(element: ElementFormat) -> Bits:
    """Float32 blocks [N, 32] whose largest lies at, or one unit beside, where a scale rule steps, in every binade.

    The other lanes are elements, midpoints of neighbouring elements, and one unit beside both, of a scale that is the
    block's or next to it, in turn.
    """
    table = magnitudes(element)
    emax = floor_log2(table[-1])
    steps = {Fraction(1), table[-1] / 2**emax, *(2 - Fraction(1, 2 << bits) for bits in range(10))}
    points = [*table[1:], *((a + b) / 2 for a, b in itertools.pairwise(table))]
    around = [FLOAT32.pattern(v) + unit for v in sorted(points) for unit in (-1, 0, 1)]
    tops = [FLOAT32.pattern(step) + unit for step in sorted(steps) for unit in (-1, 0, 1)]
    blocks = []
    for exponent, (index, top) in itertools.product(range(-149, 128), enumerate(tops)):
        start = (exponent + 149) * len(tops) + index
        lanes = [around[(start * (BLOCK - 1) + i) % len(around)] for i in range(BLOCK - 1)]
        blocks.append([_moved(top, exponent), *(_moved(p, exponent - emax) for p in lanes)])
    patterns = np.array(blocks, dtype=np.int64)
    patterns = np.minimum(patterns, FLOAT32.inf - 1)
    signs = (np.arange(BLOCK) + np.arange(len(patterns))[:, None] // 2) % 2
    return (patterns | np.where(signs, FLOAT32.sign, 0)).astype(FLOAT32.bits)


def _moved(pattern: int, exponent: int) -> int:
    """A float32 near 1 times a power of two; below the normal numbers the units that are lost are cut off."""
    moved = pattern + (exponent << FLOAT32.mantissa_bits)
    if moved >= 1 << FLOAT32.mantissa_bits:
        return moved
    fraction = (pattern & ((1 << FLOAT32.mantissa_bits) - 1)) | 1 << FLOAT32.mantissa_bits
    return fraction >> min(1 - (moved >> FLOAT32.mantissa_bits), 31)


def _tail(dtype: Float, k: int) -> Bits:
    """Rows [16, k] of scattered finite patterns."""
    places = np.arange(_TAIL_ROWS * k, dtype=np.uint64)
    scattered = (places + 1) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)  # multiples of 2^64 over the golden ratio
    one = 1 << (dtype.exponent_bits - 1)
    field = one - 6 + (scattered >> np.uint64(8)) % np.uint64(9)
    fraction = scattered & np.uint64((1 << dtype.mantissa_bits) - 1)
    sign = (scattered >> np.uint64(31)) & np.uint64(1)
    patterns = sign * np.uint64(dtype.sign) | field << np.uint64(dtype.mantissa_bits) | fraction
    rows: Bits = patterns.reshape(_TAIL_ROWS, k).astype(dtype.bits)
    return rows
