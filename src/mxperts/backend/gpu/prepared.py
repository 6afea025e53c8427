"""Weights as the backend wants them, and what has to be known of their numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mxperts.backend.gpu.cuda.element import bf16_rule
from mxperts.backend.gpu.cuda.layout import Tiles
from mxperts.backend.gpu.paths import CUDA, choose, forced
from mxperts.errors import BackendUnavailable
from mxperts.formats import BlockFormat
from mxperts.ops.prepare import ExpertsLayout
from mxperts.packing import magnitudes

SMALLEST_SCALE = 16
"""Below this scale byte bf16 has not every product of element and scale."""


def prepare(weights: Sequence[Tensor], layout: ExpertsLayout) -> Sequence[Tensor]:
    """Tiles of both projections, or, for the Triton path, the canonical tensors themselves.

    The latter also where weights are rotated, or hold NaN, Inf or a scale at the ends of the range, which tiles are not
    made for.
    """
    if choose(weights[0].device, layout.rotation) is not CUDA:
        return weights
    up, down = projections(layout)
    gate_up_packed, gate_up_scales, down_packed, down_scales = weights
    fit = _fit(gate_up_packed, gate_up_scales, up.format) & _fit(down_packed, down_scales, down.format)
    if not bool(fit):
        if forced() is CUDA:
            raise BackendUnavailable(
                "path 'cuda' cannot hold these weights: they have NaN, Inf or a scale at the ends of the range"
            )
        return weights
    return up.to_tiles(gate_up_packed, gate_up_scales), down.to_tiles(down_packed, down_scales)


def unprepare(weights: Sequence[Tensor], layout: ExpertsLayout) -> list[Tensor]:
    """The codes and scales that ``prepare`` was given."""
    if not are_tiles(weights):
        return list(weights)
    up, down = projections(layout)
    return [*up.from_tiles(weights[0]), *down.from_tiles(weights[1])]


def are_tiles(weights: Sequence[Tensor]) -> bool:
    """Whether these are prepared for the CUDA path."""
    return len(weights) == 2


@lru_cache
def projections(layout: ExpertsLayout) -> tuple[Tiles, Tiles]:
    """The shapes of both projections."""
    return layout.projections(Tiles)


def _fit(packed: Tensor, scales: Tensor, fmt: BlockFormat) -> Tensor:
    """bool []: whether bf16 has all these numbers, and the way to them never leaves its range."""
    fit = torch.ones((), dtype=torch.bool, device=packed.device)
    special = [code for code, value in enumerate(fmt.element.values) if not math.isfinite(value)]
    for e in range(packed.shape[0]):
        fit &= (scales[e] <= bf16_rule(fmt).largest_scale).all()
        for code in special:  # codes of these formats are bytes
            fit &= (packed[e] != code).all()
        small = scales[e] < SMALLEST_SCALE
        sizes = magnitudes(packed[e], fmt).unflatten(-1, (-1, fmt.block_size))
        fit &= ~(small & (sizes != 0).any(-1)).any()
    return fit
