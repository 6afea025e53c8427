"""fused_experts in fp8: block scales folded into the exponents of E4M3 numbers, what does not fit them in bf16."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mxperts.backend.gpu.cuda import fold
from mxperts.backend.gpu.cuda.arguments import Given, active_experts, current, workspace
from mxperts.backend.gpu.cuda.compiler import Kernel
from mxperts.backend.gpu.cuda.grouped import (
    TILE_BYTES,
    Arguments,
    Device,
    Product,
    device_of,
    even_tile,
    most_tiles,
    parts,
    sort_kernel,
    sorting,
    stages,
)
from mxperts.backend.gpu.cuda.layout import STEP, UNIT_ROWS, Tiles
from mxperts.backend.gpu.cuda.macros import problem_macros
from mxperts.formats import Activation, BlockFormat
from mxperts.ops.dispatch import Problem
from mxperts.ops.experts import ExpertsCall
from mxperts.ops.prepare import ExpertsLayout

LEAST_PAIRS = 48
"""Pairs of an expert from which on fp8 was measured to be the faster."""
_MOST, _LEAST = 160, 16
"""Tokens of a tile."""
_OWN_UNITS, _CLUSTER = 4, 2
"""Units of 32 rows of a block, and blocks of a cluster, which share a tile's tokens."""
_STEP, _ALIGNED = 128, 8
"""Of K, and of the positions of an expert."""
_WARPS = 4
"""Of a block that folds, each with a row."""
_SORTING = 8
"""Blocks that sort."""
_MOST_STAGES = 8
_PITCH = 144
"""Bytes of a token's results on their way to the activation function, of half of a block."""
_EXACT = 64
"""Most tokens of a tile that is computed in bf16."""
_RESERVED = 4096
"""Shared memory of a block besides its stages."""


def suits(problem: Problem) -> bool:
    """Whether fp8 has the products of a problem, on its device."""
    return (
        problem.weight is not None
        and problem.dtype is torch.bfloat16
        and fold.can_fold(problem.weight, problem.activation)
        and device_of(current(problem.device)[0]).wgmma
    )


def summary() -> str:
    """One line for people."""
    return f"from {LEAST_PAIRS} tokens an expert on in fp8 matrix units, scales folded into exponents"


def takes(call: ExpertsCall) -> bool:
    """Whether a call is one for fp8: products it has, weights prepared for it, and enough tokens."""
    layout, static = call.layout, call.input_scales or ()
    problem = Problem(
        op="fused_experts",
        device=call.hidden_states.device,
        dtype=call.hidden_states.dtype,
        weight=layout.weight,
        activation=call.activation_format,
    )
    return (
        len(call.weights) == 3
        and call.accumulation != "exact"
        and _each(call.top_k_index.numel(), layout.experts) >= LEAST_PAIRS
        and all(scale is None or scale.numel() == 1 for scale in static)
        and suits(problem)
    )


def fused_experts(call: ExpertsCall, out: Tensor, first: Tiles, second: Tiles) -> None:
    """Write the sum over each token's experts into ``out`` [T, H]."""
    for part, result in parts(call, out):
        _fused_experts(part, result, first, second)


def _fused_experts(call: ExpertsCall, out: Tensor, first: Tiles, second: Tiles) -> None:
    given, layout = Given(call, out), call.layout
    tokens, k = call.top_k_index.shape
    pairs, device = tokens * k, out.device
    index, stream = current(device)
    tile = tile_of(pairs, layout.experts)
    kernels = _kernels(layout, out.dtype, call.activation_format, call.activation.name, tile, index)
    positions = pairs + (_ALIGNED - 1) * min(layout.experts, pairs)
    room = -(-(positions + tile) // _ALIGNED) * _ALIGNED  # a tile reads its most, whatever it has
    _memory, addresses = workspace(
        device,
        totals=32,
        tiles=TILE_BYTES * most_tiles(pairs, layout.experts, tile),
        exact=TILE_BYTES * most_tiles(pairs, layout.experts, _EXACT),
        position=4 * pairs,
        source=4 * room,
        expert=2 * room,
        local=2 * pairs,
        folded=room * _STEP * -(-max(layout.hidden, layout.intermediate) // _STEP),
        base=4 * room,
        outside=room,
        picked=4 * room,
        a=2 * room * second.steps * STEP,
        y=4 * room * second.units * UNIT_ROWS,
    )
    known = fold.addresses(call.weights[2], (first, second), layout.experts)
    arguments = Arguments(
        **{**given.fields, **addresses, "direct": False},
        xq=addresses["y"],  # which is written later
        aligned=given.x.stride(0) * 2 % 16 == 0 and given.x.data_ptr() % 16 == 0,
        second=False,
        rows1=known.rows1,
        rows2=known.rows2,
        unfit=known.unfit,
        counted=known.counted,
        positions=room,
    )
    kernels.sort(_SORTING, arguments, stream)
    for second_one in (False, True):
        arguments.second = second_one
        kernels.fold[second_one](-(-(positions if second_one else tokens) // _WARPS), arguments, stream)
        kernels.folded(kernels.blocks, arguments, stream)
        kernels.exact(kernels.blocks, arguments, stream)
    kernels.combine(tokens, arguments, stream)


def _each(pairs: int, experts: int) -> float:
    return pairs / active_experts(pairs, experts)


def tile_of(pairs: int, experts: int) -> int:
    """Most tokens of a tile, for so many pairs of all experts."""
    each = _each(pairs, experts)
    return max(_LEAST, even_tile(each + 2 * math.sqrt(each), _MOST))


def promoted(weight: BlockFormat, activation: Activation) -> int:
    """After how much of K sums in fp8 are added up in float32: products that span more binades lose more bits."""
    wide = [f for f in (weight, activation) if isinstance(f, BlockFormat) and f.element.exponent_bits > 2]
    return 64 if len(wide) == 2 else 128


def ring(tile: int, slice_bytes: int, device: Device) -> tuple[int, int]:
    """Stages of ``folded`` and the shared memory that they take."""
    stage = -(-(tile * _STEP + _OWN_UNITS * 2 * slice_bytes) // 1024) * 1024
    staged = 2 * tile * _PITCH
    number = min(_MOST_STAGES, (device.shared_bytes - _RESERVED - staged) // stage)
    return number, number * stage + staged + 1024


@dataclass(frozen=True, eq=False)
class _Kernels:
    sort: Kernel
    fold: tuple[Kernel, Kernel]
    folded: Kernel
    exact: Kernel
    combine: Kernel
    blocks: int


@lru_cache(maxsize=256)
def _kernels(
    layout: ExpertsLayout, out_dtype: torch.dtype, activation: Activation, function: str, tile: int, index: int
) -> _Kernels:
    assert layout.weight is not None
    device, weight = device_of(index), layout.weight
    experts, _ = sorting(layout.experts)
    window = fold.window(activation) if isinstance(activation, BlockFormat) else (0, 0)
    assert window is not None
    macros = {
        **problem_macros(layout, torch.bfloat16, out_dtype, activation, function),
        "WGMMA": "1",
        "FOLDED": "1",
        "MOST_N": str(tile),
        "STEP_N": "16",
        "LEAST_N": str(_LEAST),
        "FOLD_LEAST": str(window[0]),
        "FOLD_MOST": str(window[1]),
        "SPREAD": str(fold.SPREAD),
        **fold.weight_macros(weight),
    }

    def kernel(name: str, threads: int, shared_bytes: int = 0, cluster: int = 1, **more: int) -> Kernel:
        every = {**macros, **{k: str(int(v)) for k, v in more.items()}}
        return Kernel(name, every, index, threads=threads, shared_bytes=shared_bytes, cluster=cluster)

    slice_bytes = Tiles(format=weight, rows=UNIT_ROWS, k=STEP).slice_bytes
    number, shared = ring(tile, slice_bytes, device)
    exact_number, exact_shared = stages(Product(_EXACT), slice_bytes, 1, device.shared_bytes)
    return _Kernels(
        sort_kernel(layout.experts, _SORTING, macros, index),
        (kernel("fold", 32 * _WARPS, SECOND=0), kernel("fold", 32 * _WARPS, SECOND=1)),
        kernel(
            "folded",
            384,
            shared,
            cluster=_CLUSTER,
            STAGES=number,
            CLUSTER=_CLUSTER,
            UNITS=_OWN_UNITS * _CLUSTER,
            PROMOTE=promoted(weight, activation),
        ),
        kernel("wide", 32 * (8 + 4), exact_shared, STAGES=exact_number, UNITS=8, EXPERTS=experts, MOST_N=_EXACT),
        kernel("combine", 128),
        device.multiprocessors // _CLUSTER * _CLUSTER,
    )
