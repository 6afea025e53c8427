"""fused_experts for a few pairs (token, slot), each by itself: ``single.cu``."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mxperts.backend.gpu.cuda.arguments import CallArguments, Given, active_experts, current, workspace
from mxperts.backend.gpu.cuda.compiler import Kernel
from mxperts.backend.gpu.cuda.layout import STEP, Tiles
from mxperts.backend.gpu.cuda.macros import hidden_macros, problem_macros
from mxperts.backend.gpu.prepared import projections
from mxperts.formats import FP8_DYNAMIC, Activation, BlockFormat
from mxperts.ops.experts import ExpertsCall
from mxperts.ops.prepare import ExpertsLayout

MOST_PAIRS = 64
MOST_SHARING = 1.5
"""Pairs for each of the experts that they are likely to be drawn from, beyond which it pays to group them."""
MOST_SHARED_BYTES = 98 << 10
"""Of a block: every GPU that the kernels are for has as much."""
_SOURCE_BYTES = 8
_WARPS2 = 16
_BITS_AT_ONCE = 24
"""Slices of one cell that a warp has registers for, times the bits of a code."""


class Arguments(CallArguments):
    """``Args`` of single.cu."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("xq", "a", "af"))


@dataclass(frozen=True)
class Shape:
    """What blocks are made of.

    Attributes:
        warps1, warps2: of a block of the first and of the second projection.
        deep1, deep2: slices that a warp loads at a time.
    """

    warps1: int
    deep1: int
    warps2: int
    deep2: int


def choose(call: ExpertsCall, second: Tiles) -> Shape:
    """What to launch: with one token blocks are few, and their warps are to be many."""
    tokens, k = call.top_k_index.shape
    if tokens > 1:
        return Shape(4 * _units_of_block(call), 1, 8, 4)
    run = -(-k * second.steps // _WARPS2)
    return Shape(8, 1, _WARPS2, run if run * second.format.element.bits <= _BITS_AT_ONCE else 2)


def shared_bytes(shape: Shape, call: ExpertsCall, first: Tiles, second: Tiles) -> tuple[int, int]:
    """Of a block of each projection: a run of inputs for every warp, in the second with where its weights are."""
    k, run = call.top_k_index.shape[1], _planes(call) * 2 * STEP
    runs1 = -(-first.steps // (shape.warps1 // _units_of_block(call)))
    runs2 = -(-k * second.steps // shape.warps2 // 2) * 2
    return shape.warps1 * runs1 * run, shape.warps2 * runs2 * (run + _SOURCE_BYTES)


def _planes(call: ExpertsCall) -> int:
    return hidden_macros(call.hidden_states.dtype, call.activation_format).planes


def _units_of_block(call: ExpertsCall) -> int:
    """Of the first projection: together they have whole blocks of what is quantised next."""
    return 2 if isinstance(call.activation_format, BlockFormat) and call.layout.gated else 1


@dataclass(frozen=True)
class _Kernels:
    inputs: Kernel
    first: Kernel
    middle: Kernel
    second: Kernel


def takes(call: ExpertsCall) -> bool:
    """Whether a call has so few pairs that hardly two share an expert, and their inputs fit shared memory."""
    tokens, pairs = call.top_k_index.shape[0], call.top_k_index.numel()
    few = pairs <= MOST_PAIRS and pairs <= MOST_SHARING * active_experts(pairs, call.layout.experts)
    if not (few or tokens == 1):
        return False
    first, second = projections(call.layout)
    return max(shared_bytes(choose(call, second), call, first, second)) <= MOST_SHARED_BYTES


def fused_experts(call: ExpertsCall, out: Tensor, first: Tiles, second: Tiles) -> None:
    """Write the sum over each token's experts into ``out`` [T, H]."""
    given, layout = Given(call, out), call.layout
    tokens, k = call.top_k_index.shape
    pairs, dtype, activation, device = tokens * k, call.hidden_states.dtype, call.activation_format, out.device
    index, stream = current(device)
    shape = choose(call, second)
    shared = shared_bytes(shape, call, first, second)
    kernels = _kernels(layout, dtype, out.dtype, activation, call.activation.name, shape, shared, index)
    rows1 = pairs if given.per_expert1 else tokens
    width1, width2 = first.steps * STEP, second.steps * STEP
    planes, units = _planes(call), -(-first.units // _units_of_block(call))
    _memory, addresses = workspace(
        device,
        xq=0 if given.direct else 2 * planes * rows1 * width1,
        a=2 * planes * pairs * width2,
        af=4 * pairs * width2 if activation == FP8_DYNAMIC else 0,
    )
    arguments = Arguments(**given.fields, **addresses)
    if not given.direct:
        warps = rows1 if activation == FP8_DYNAMIC else rows1 * width1 // 32
        kernels.inputs(-(-warps // 8), arguments, stream)
    kernels.first((units, pairs), arguments, stream)
    if activation == FP8_DYNAMIC:
        kernels.middle(-(-pairs // 8), arguments, stream)
    kernels.second((2 * second.units, tokens), arguments, stream)


@lru_cache(maxsize=256)
def _kernels(
    layout: ExpertsLayout,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    activation: Activation,
    function: str,
    shape: Shape,
    shared: tuple[int, int],
    device: int,
) -> _Kernels:
    macros = {
        **problem_macros(layout, dtype, out_dtype, activation, function),
        "WARPS1": str(shape.warps1),
        "DEEP1": str(shape.deep1),
        "WARPS2": str(shape.warps2),
        "DEEP2": str(shape.deep2),
    }

    def kernel(name: str, threads: int, shared_bytes: int = 0) -> Kernel:
        return Kernel("single", macros, device, threads=threads, shared_bytes=shared_bytes, name=name)

    return _Kernels(
        inputs=kernel("inputs", 256),
        first=kernel("first", 32 * shape.warps1, shared[0]),
        middle=kernel("middle", 256),
        second=kernel("second", 32 * shape.warps2, shared[1]),
    )
