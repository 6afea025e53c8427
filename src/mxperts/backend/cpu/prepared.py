"""Weights in the backend's own layout, with what has to be known of their numbers."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mxperts.backend.cpu.layout import Projection
from mxperts.formats import SCALE_BIAS, SCALE_NAN, BlockFormat
from mxperts.ops.prepare import ExpertsLayout
from mxperts.packing import magnitudes

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""In the order of ``call.BF16``, ``FP16``, ``FP32``."""
LARGEST_SCALE = SCALE_BIAS + 33
"""Beyond this scale byte what bf16 products lose below 2^-126 could be seen in results of common size."""


def prepare(weights: Sequence[Tensor], layout: ExpertsLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of both projections and, uint8 [3, E], which experts need care with bf16, fp16 and fp32 hidden states."""
    up, down = projections(layout)
    gate_up_packed, gate_up_scales, down_packed, down_scales = weights
    careful = need_care(gate_up_packed, gate_up_scales, up.format) | need_care(down_packed, down_scales, down.format)
    return up.to_tiles(gate_up_packed, gate_up_scales), down.to_tiles(down_packed, down_scales), careful


def unprepare(weights: Sequence[Tensor], layout: ExpertsLayout) -> list[Tensor]:
    """The codes and scales that ``prepare`` was given."""
    up, down = projections(layout)
    return [*up.from_tiles(weights[0]), *down.from_tiles(weights[1])]


@lru_cache
def projections(layout: ExpertsLayout) -> tuple[Projection, Projection]:
    """The shapes of both projections."""
    return layout.projections(Projection)


def need_care(packed: Tensor, scales: Tensor, fmt: BlockFormat) -> Tensor:
    """uint8 [3, E]: experts with an Inf, a value that a dtype rounds, or a scale beyond ``LARGEST_SCALE``.

    An Inf, because bf16 products take a subnormal number for zero, and zero times Inf is NaN.

    Args:
        packed, scales: [E, N, P] and [E, N, K / 32].
    """
    careful = torch.zeros(len(_DTYPES), packed.shape[0], dtype=torch.uint8)
    infinite = [code for code, value in enumerate(fmt.element.values) if math.isinf(value)]
    for e in range(packed.shape[0]):
        s = scales[e]
        if any(bool((packed[e] == code).any()) for code in infinite):  # codes of these formats are bytes
            careful[:, e] = 1
            continue
        present = torch.zeros(256, dtype=torch.bool)
        present[s.flatten().to(torch.int64)] = True
        for i, dtype in enumerate(_DTYPES):
            suspect = present & _inexact_scales(fmt, dtype)
            if not bool(suspect.any()):
                continue
            blocks = suspect[s.to(torch.int64)]  # [N, K / 32]
            codes = packed[e].unflatten(-1, (-1, fmt.block_bytes))[blocks]
            careful[i, e] = bool((magnitudes(codes, fmt) != 0).any())
    return careful


@lru_cache
def _inexact_scales(fmt: BlockFormat, dtype: torch.dtype) -> Tensor:
    """bool [256]: scale bytes with which an element other than zero is not what it should be in a dtype."""
    values = torch.tensor([v for v in fmt.element.values if v and abs(v) < float("inf")], dtype=torch.float64)
    exponents = torch.arange(256, dtype=torch.float64) - SCALE_BIAS
    exact = values * torch.exp2(exponents).unsqueeze(-1)  # [256, values]
    inexact = (exact.to(torch.float32).to(dtype).to(torch.float64) != exact).any(-1)
    inexact[LARGEST_SCALE + 1 :] = True
    inexact[SCALE_NAN] = False
    return inexact


@dataclass(frozen=True)
class _Kept:
    """The prepared form of tensors that are alive."""

    storages: tuple[weakref.ref[torch.UntypedStorage], ...]
    versions: tuple[int, ...]
    tensors: tuple[Tensor, ...]


_kept: dict[tuple[object, ...], _Kept] = {}


def of_experts(weights: Sequence[Tensor], layout: ExpertsLayout) -> tuple[Tensor, ...]:
    """``prepare``, done once for the same tensors and kept as long as they live."""
    return _once(weights, layout, lambda: prepare(weights, layout))


def of_linear(weight: Sequence[Tensor], shape: Projection) -> tuple[Tensor, ...]:
    """Tiles of one weight [N, K] and whether it needs care, uint8 [3, 1]; once, as ``of_experts``."""
    packed, scales = (t.unsqueeze(0) for t in weight)
    return _once(weight, shape, lambda: (shape.to_tiles(packed, scales), need_care(packed, scales, shape.format)))


def _once(tensors: Sequence[Tensor], shape: object, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    if any(t.is_inference() for t in tensors):
        return make()  # nothing tells that such a tensor was changed
    key = (shape, *((t.data_ptr(), t.shape, t.stride()) for t in tensors))
    versions = tuple(t._version for t in tensors)
    found = _kept.get(key)
    if found is not None and found.versions == versions:
        storages = [storage() for storage in found.storages]
        # A storage can outlive its memory, which may then hold another tensor.
        if all(
            s is not None and s.data_ptr() == t.untyped_storage().data_ptr()
            for s, t in zip(storages, tensors, strict=True)
        ):
            return found.tensors
    made = make()
    _kept[key] = _Kept(
        tuple(weakref.ref(t.untyped_storage(), lambda _: _kept.pop(key, None)) for t in tensors), versions, made
    )
    return made
