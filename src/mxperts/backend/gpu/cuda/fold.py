"""Which numbers E4M3 has with their shared scales folded into the exponents, and the exponents of weights' rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mxperts.backend.gpu.cuda.element import bf16_rule
from mxperts.backend.gpu.cuda.layout import PADDING_SCALE, UNIT_ROWS, Tiles
from mxperts.formats import (
    E4M3,
    E5M2,
    FP8_DYNAMIC,
    FP8_STATIC,
    SCALE_BIAS,
    Activation,
    BlockFormat,
    ElementFormat,
)
from mxperts.packing import magnitudes

LOWEST, HIGHEST = 40, 214
"""Exponents of rows, as scale bytes, that float32 has room for together with those of tokens: see fold.cu."""
SPREAD = 7
"""Binades that the largest scale of a row may be above the mean. Matrix units keep 13 bits of a sum below its largest
product, so that what is much smaller loses its last bits."""
_COUNTERS = 16
_SLACK = 128


@lru_cache
def window(fmt: BlockFormat, operand: ElementFormat = E4M3) -> tuple[int, int] | None:
    """The smallest and the largest r such that fp8 has every element times 2^r; None where no binade is to spare."""
    if fmt.element.bits > 6:
        return None
    there = set(operand.magnitudes)
    fitting = [r for r in range(-32, 32) if all(m * 2.0**r in there for m in fmt.element.magnitudes)]
    return min(fitting), max(fitting)


@dataclass(frozen=True, kw_only=True)
class WeightRule:
    """How a format's weights become fp8 numbers: through bf16 or float16 numbers that have the same exponents.

    Attributes:
        e5m2: whether they become E5M2 numbers rather than E4M3.
        least, most: powers of two that an element may be multiplied by.
        pattern: codes, as they stand in such a number, are elements times 2^-pattern.
        exponent: the exponent field of what they are multiplied by is the power of two and this.
        fields: the largest such field.
    """

    e5m2: bool
    least: int
    most: int
    pattern: int
    exponent: int
    fields: int


@lru_cache
def weight_rule(fmt: BlockFormat) -> WeightRule:
    """The rule of a format of at most six bits: E5M2 has two bits of mantissa, and five of exponent as float16 has."""
    element = fmt.element
    e5m2 = element.mantissa_bits <= E5M2.mantissa_bits
    found = window(fmt, E5M2 if e5m2 else E4M3)
    assert found is not None, fmt
    if not e5m2:
        pattern = bf16_rule(fmt).offset
        return WeightRule(
            e5m2=False, least=found[0], most=found[1], pattern=pattern, exponent=pattern + E4M3.bias, fields=254
        )
    pattern = E5M2.bias - element.bias
    exponent = pattern + E5M2.bias
    return WeightRule(
        e5m2=True, least=found[0], most=min(found[1], 30 - exponent), pattern=pattern, exponent=exponent, fields=30
    )


def weight_macros(fmt: BlockFormat) -> dict[str, str]:
    """What folded.cu calls it."""
    rule = weight_rule(fmt)
    return {"WEIGHTS_E5M2": str(int(rule.e5m2)), "FLOAT16_OFFSET": str(rule.pattern)}


def can_fold(weight: BlockFormat, activation: Activation) -> bool:
    """Whether fp8 has the products of a scheme: both formats have binades to spare, or rows have one scale anyway."""
    inputs = activation in (FP8_STATIC, FP8_DYNAMIC) or (
        isinstance(activation, BlockFormat) and window(activation) is not None
    )
    return inputs and window(weight) is not None


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where a layer's ``exponents`` hold what: see ``Args`` of grouped.cuh."""

    counted: int
    rows1: int
    rows2: int
    unfit: int


def exponents(weights: Sequence[Tensor], projections: tuple[Tiles, Tiles]) -> Tensor:
    """What products in fp8 must know of a layer's weights, in one tensor, uint8.

    Two counters of calls, int64: positions computed, and those computed in bf16 as fp8 had not all of their inputs; the
    exponent that each row of both projections is relative to; whether an expert has a row that is too wide for fp8.

    Args:
        weights: packed codes and scales of both projections.
        projections: their shapes.
    """
    rows, unfit = [], []
    for tiles, packed, scales in zip(projections, weights[::2], weights[1::2], strict=True):
        found = [_row_exponents(tiles.format, p, s) for p, s in zip(packed, scales, strict=True)]
        order = tiles.row_order.to(packed.device)
        none = torch.full((1,), SCALE_BIAS, dtype=torch.uint8, device=packed.device)
        rows.append(torch.stack([torch.cat([row, none])[order] for row, _ in found]).flatten())
        unfit.append(torch.stack([bad for _, bad in found]))
    zeros = torch.zeros(_COUNTERS + _SLACK, dtype=torch.uint8, device=weights[0].device)
    return torch.cat([zeros[:_COUNTERS], *rows, (unfit[0] | unfit[1]).to(torch.uint8), zeros[_COUNTERS:]])


def addresses(exponents: Tensor, projections: tuple[Tiles, Tiles], experts: int) -> Addresses:
    """Where they are in memory."""
    at = exponents.data_ptr()
    rows1 = at + _COUNTERS
    rows2 = rows1 + experts * projections[0].units * UNIT_ROWS
    return Addresses(counted=at, rows1=rows1, rows2=rows2, unfit=rows2 + experts * projections[1].units * UNIT_ROWS)


def counted(exponents: Tensor) -> tuple[int, int]:
    """Positions computed so far, of both projections, and those of them computed in bf16."""
    computed, outside = exponents[:_COUNTERS].view(torch.int64).tolist()
    return computed, outside


def _row_exponents(fmt: BlockFormat, packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The exponent of each row [N] of an expert, uint8, and whether one of them is too wide, bool []."""
    rule = weight_rule(fmt)
    s = scales.to(torch.int32)  # [N, blocks]
    there = (magnitudes(packed, fmt).unflatten(-1, (-1, fmt.block_size)) != 0).any(-1)[:, : s.shape[1]]
    highest = torch.where(there, s, 0).amax(-1)
    lowest = torch.where(there, s, 255).amin(-1)
    empty = ~there.any(-1)
    row = torch.where(empty, SCALE_BIAS, highest - rule.most)
    mean = torch.where(there, s, 0).sum(-1) / there.sum(-1).clamp(min=1)
    bad = ~empty & ((lowest - row < rule.least) | (row < LOWEST) | (row > HIGHEST) | (highest - SPREAD > mean))
    field = s - row[:, None] + rule.exponent  # blocks of zeros too must not have an Inf there
    bad |= (field > rule.fields).any(-1) | (PADDING_SCALE - row + rule.exponent > rule.fields)
    if not rule.e5m2:
        bad |= (field < 1).any(-1)
    return row.clamp(0, 255).to(torch.uint8), bad.any()
