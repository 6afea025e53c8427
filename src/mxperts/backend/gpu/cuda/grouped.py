"""fused_experts for many tokens: pairs (token, slot) sorted by expert, and each projection as one grouped product."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mxperts.backend.gpu.cuda.arguments import CallArguments, Given, current, workspace
from mxperts.backend.gpu.cuda.compiler import Kernel
from mxperts.backend.gpu.cuda.layout import STEP, UNIT_ROWS, Tiles
from mxperts.backend.gpu.cuda.macros import hidden_macros, problem_macros
from mxperts.formats import Activation
from mxperts.ops.experts import ExpertsCall
from mxperts.ops.prepare import ExpertsLayout

MOST_PAIRS = 1 << 17
"""Pairs that are computed together; it bounds the workspace. More are computed one part after the other."""
_UNITS = 8
"""Units of 32 rows that a block computes."""
_MOST_STAGES = 8
_TILE_BYTES = 32
_RESERVED = 1024
"""Shared memory that every block has besides its own; as much again is left for what is not sized here."""


class _Arguments(CallArguments):
    """``Args`` of grouped.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("totals", "tiles", "position", "source", "expert", "local")),
        *((name, ctypes.c_void_p) for name in ("xq", "a", "h", "y")),
        *((name, ctypes.c_int64) for name in ("aligned", "second")),
    )


@dataclass(frozen=True, eq=False)
class _Kernels:
    sort: Kernel
    first_inputs: Kernel
    second_inputs: Kernel
    grouped: Kernel
    combine: Kernel
    blocks: int


def fused_experts(call: ExpertsCall, out: Tensor, first: Tiles, second: Tiles) -> None:
    """Write the sum over each token's experts into ``out`` [T, H]."""
    tokens, k = call.top_k_index.shape
    together = max(1, MOST_PAIRS // k)
    if tokens <= together:
        _fused_experts(call, out, first, second)
        return
    for start in range(0, tokens, together):
        turn = slice(start, start + together)
        part = replace(
            call,
            hidden_states=call.hidden_states[turn],
            top_k_index=call.top_k_index[turn],
            top_k_weights=call.top_k_weights[turn],
        )
        _fused_experts(part, out[turn], first, second)


def _fused_experts(call: ExpertsCall, out: Tensor, first: Tiles, second: Tiles) -> None:
    given, layout = Given(call, out), call.layout
    tokens, k = call.top_k_index.shape
    pairs, dtype, activation, device = tokens * k, out.dtype, call.activation_format, out.device
    index, stream = current(device)
    planes = hidden_macros(dtype, activation).planes
    tile = choose_tile(planes)
    kernels = _kernels(layout, dtype, activation, call.activation.name, tile, index)
    rows = pairs if given.per_expert1 else tokens
    # One projection's inputs, and its results, are done with when the other's are written.
    _memory, addresses = workspace(
        device,
        totals=8,
        tiles=_TILE_BYTES * most_tiles(pairs, layout.experts, tile),
        position=4 * pairs,
        source=4 * pairs,
        expert=2 * pairs,
        local=2 * pairs,
        a=2 * planes * max(rows * first.steps, pairs * second.steps) * STEP,
        h=pairs * UNIT_ROWS * max(first.units * dtype.itemsize, second.units * 4),
    )
    arguments = _Arguments(
        **given.fields,
        **addresses,
        xq=addresses["a"],
        y=addresses["h"],
        aligned=given.x.stride(0) * dtype.itemsize % 16 == 0 and given.x.data_ptr() % 16 == 0,
        second=False,
    )
    kernels.sort(1, arguments, stream)
    kernels.first_inputs(rows, arguments, stream)
    kernels.grouped(kernels.blocks, arguments, stream)
    arguments.second = True
    kernels.second_inputs(pairs, arguments, stream)
    kernels.grouped(kernels.blocks, arguments, stream)
    kernels.combine(tokens, arguments, stream)


def choose_tile(planes: int) -> int:
    """Most tokens that are computed together.

    Args:
        planes: bf16 numbers of an input: they share the shared memory with the weights' codes.
    """
    return 128 if planes == 1 else 64


def most_tiles(pairs: int, experts: int, tokens: int) -> int:
    """Most tiles that ``pairs`` fall into, however they are spread over the experts."""
    return (pairs + min(pairs, experts) * (tokens - 1)) // tokens


def stages(slice_bytes: int, planes: int, tile: int, shared_bytes: int) -> tuple[int, int]:
    """Steps that a block of so much shared memory keeps there, and the bytes that they take."""
    stage = -(-(planes * tile * STEP * 2 + _UNITS * slice_bytes) // 1024) * 1024
    number = min(_MOST_STAGES, (shared_bytes - 2 * _RESERVED) // stage)
    return number, number * stage + 1024  # from where an address is a multiple of 1024


def has_wgmma(device: int) -> bool:
    """Whether a device has Hopper's instructions; others have ``mma.sync``."""
    return torch.cuda.get_device_capability(device) == (9, 0)


@lru_cache(maxsize=256)
def _kernels(
    layout: ExpertsLayout, dtype: torch.dtype, activation: Activation, function: str, tile: int, device: int
) -> _Kernels:
    assert layout.weight is not None
    properties: Any = torch.cuda.get_device_properties(device)
    wgmma = has_wgmma(device)
    planes = hidden_macros(dtype, activation).planes
    experts = -(-layout.experts // 64) * 64
    segments = 32 if experts <= 512 else 16
    slice_bytes = Tiles(format=layout.weight, rows=UNIT_ROWS, k=STEP).slice_bytes
    number, shared = stages(slice_bytes, planes, tile, properties.shared_memory_per_block_optin)
    macros = {
        **problem_macros(layout, dtype, activation, function),
        "WGMMA": str(int(wgmma)),
        "MOST_N": str(tile),
    }

    def kernel(name: str, threads: int, shared_bytes: int = 0, **more: int) -> Kernel:
        every = {**macros, **{k: str(v) for k, v in more.items()}}
        return Kernel(name, every, device, threads=threads, shared_bytes=shared_bytes, cooperative=False)

    return _Kernels(
        kernel("sort", 32 * segments, 4 * experts * (segments + 3), SEGMENTS=segments, EXPERTS=experts),
        kernel("inputs", 128, SECOND=0),
        kernel("inputs", 128, SECOND=1),
        kernel("grouped", 384 if wgmma else 256, shared, STAGES=number),
        kernel("combine", 128),
        properties.multi_processor_count,
    )
