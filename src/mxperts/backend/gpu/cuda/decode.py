"""fused_experts for few tokens: one launch of ``decode.cu`` for a whole layer."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mxperts.backend.gpu.cuda.arguments import CallArguments, Given, active_experts, current, workspace
from mxperts.backend.gpu.cuda.compiler import Kernel
from mxperts.backend.gpu.cuda.layout import STEP, UNIT_ROWS, Tiles
from mxperts.backend.gpu.cuda.macros import hidden_macros, problem_macros
from mxperts.errors import BackendUnavailable
from mxperts.formats import FP8_DYNAMIC, Activation
from mxperts.ops.experts import ExpertsCall
from mxperts.ops.prepare import ExpertsLayout

MOST_PAIRS = 512
"""Pairs (token, slot) of a call: every block sorts all of them for itself."""
GROUP = 8
"""Pairs of an expert that are computed together: the N of an mma."""
_WARPS = (24, 16, 12, 8)
"""On a multiprocessor; fewer where its shared memory does not hold the slices of so many."""
MOST_PARTS = 16
ITEM_COST = 2.0
"""What an item costs besides its steps, in steps."""
_DEPTHS = (3, 4)
"""Fewest and most slices that a warp has room for: deeper rings were measured to be no faster."""
_WALK_BYTES = 16


class _Arguments(CallArguments):
    """``Args`` of decode.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("xq", "a", "af", "h", "y")),
        *((name, ctypes.c_int64) for name in ("parts1", "parts2")),
    )


def takes(call: ExpertsCall) -> bool:
    """Whether a call has few enough pairs, and few enough for each expert: more than a group read weights again."""
    pairs = call.top_k_index.numel()
    return pairs <= MOST_PAIRS and pairs <= GROUP * active_experts(pairs, call.layout.experts)


def fused_experts(call: ExpertsCall, out: Tensor, first: Tiles, second: Tiles) -> None:
    """Write the sum over each token's experts into ``out`` [T, H]; at most ``MOST_PAIRS`` pairs."""
    given, layout = Given(call, out), call.layout
    tokens, k = call.top_k_index.shape
    pairs, dtype, activation, device = tokens * k, out.dtype, call.activation_format, out.device
    index, stream = current(device)
    kernel, blocks = _kernel(layout, dtype, activation, call.activation.name, _room(pairs), index)
    groups, workers = expected_groups(pairs, layout.experts), blocks * kernel.threads // 32
    parts1, parts2 = (parts(groups * t.units, t.steps, workers) for t in (first, second))
    width1, width2 = first.steps * STEP, second.steps * STEP
    planes = hidden_macros(dtype, activation).planes
    _memory, addresses = workspace(
        device,
        xq=0 if given.direct else 2 * planes * (pairs if given.per_expert1 else tokens) * width1,
        a=2 * planes * pairs * width2,
        af=4 * pairs * width2 if activation == FP8_DYNAMIC else 0,
        h=4 * parts1 * pairs * first.units * UNIT_ROWS,
        y=4 * parts2 * pairs * second.units * UNIT_ROWS,
    )
    arguments = _Arguments(**given.fields, **addresses, parts1=parts1, parts2=parts2)
    kernel(blocks, arguments, stream)


def _room(pairs: int) -> int:
    """Pairs that a kernel has room for: few variants, and no more shared memory than serves."""
    return 64 if pairs <= 64 else MOST_PAIRS


@lru_cache(maxsize=256)
def _kernel(
    layout: ExpertsLayout, dtype: torch.dtype, activation: Activation, function: str, pairs: int, device: int
) -> tuple[Kernel, int]:
    assert layout.weight is not None
    properties: Any = torch.cuda.get_device_properties(device)
    experts = -(-layout.experts // 64) * 64
    slice_bytes = Tiles(format=layout.weight, rows=32, k=STEP).slice_bytes
    routing_bytes = pairs * (4 * 2 + 1 + 16) + 4 * experts + 64
    warps, depth = ring(slice_bytes, properties.shared_memory_per_block_optin - routing_bytes)
    macros = {
        **problem_macros(layout, dtype, activation, function),
        "PAIRS": str(pairs),
        "EXPERTS": str(experts),
        "ALL_WARPS": str(warps),
        "DEPTH": str(depth),
    }
    shared = warps * (_WALK_BYTES + depth * slice_bytes) + routing_bytes
    kernel = Kernel("decode", macros, device, threads=32 * warps, shared_bytes=shared, cooperative=True)
    return kernel, properties.multi_processor_count


def ring(slice_bytes: int, shared_bytes: int) -> tuple[int, int]:
    """Warps of a block, and slices that each has room for, in so much shared memory."""
    least, most = _DEPTHS
    for warps in _WARPS:
        depth = min(most, (shared_bytes // warps - _WALK_BYTES) // slice_bytes)
        if depth >= least:
            return warps, depth
    raise BackendUnavailable(
        f"{shared_bytes} bytes of shared memory are too few for {_WARPS[-1]} warps; use path 'triton'"
    )


@lru_cache(maxsize=1024)
def expected_groups(pairs: int, experts: int) -> int:
    """Groups that so many pairs are likely to form."""
    return max(round(active_experts(pairs, experts)), -(-pairs // GROUP))


@lru_cache(maxsize=1024)
def parts(units: int, steps: int, workers: int) -> int:
    """Items that a unit is best split into along K, so that all warps have about the same number of steps.

    Args:
        units: of all groups.
        steps: of a unit.
        workers: warps of the grid.
    """

    def cost(n: int) -> float:
        return -(-units * n // workers) * (-(-steps // n) + ITEM_COST)

    return min(range(1, min(steps, MOST_PARTS) + 1), key=cost)
