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
from mxperts.formats import FP8_DYNAMIC, Activation, BlockFormat
from mxperts.ops.experts import ExpertsCall
from mxperts.ops.prepare import ExpertsLayout

MOST_PAIRS = 16
MOST_SHARING = 1.1
"""Pairs for each of the experts that they are likely to be drawn from, beyond which it pays to group them."""
_FEW_SLICES = 8
"""Slices of a warp of the second projection up to which it loads two at a time."""


class _Arguments(CallArguments):
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


def choose(k: int, second: Tiles) -> Shape:
    """What to launch: more warps than slices would leave some idle, fewer would leave memory waiting.

    Args:
        k: slots of a token.
        second: the second projection.
    """
    return Shape(8, 1, 16, 2 if k * second.steps <= 16 * _FEW_SLICES else 1)


@dataclass(frozen=True)
class _Kernels:
    inputs: Kernel
    first: Kernel
    first_after_inputs: Kernel
    middle: Kernel
    second: Kernel


def takes(call: ExpertsCall) -> bool:
    """Whether a call has so few pairs that hardly two share an expert."""
    pairs, tokens = call.top_k_index.numel(), call.top_k_index.shape[0]
    few = pairs <= MOST_PAIRS and pairs <= MOST_SHARING * active_experts(pairs, call.layout.experts)
    return tokens == 1 or few


def fused_experts(call: ExpertsCall, out: Tensor, first: Tiles, second: Tiles) -> None:
    """Write the sum over each token's experts into ``out`` [T, H]."""
    given, layout = Given(call, out), call.layout
    tokens, k = call.top_k_index.shape
    pairs, dtype, activation, device = tokens * k, out.dtype, call.activation_format, out.device
    index, stream = current(device)
    shape = choose(k, second)
    kernels = _kernels(layout, dtype, activation, call.activation.name, k, shape, index)
    rows1 = pairs if given.per_expert1 else tokens
    width1, width2 = first.steps * STEP, second.steps * STEP
    planes = hidden_macros(dtype, activation).planes
    _memory, addresses = workspace(
        device,
        xq=0 if given.direct else 2 * planes * rows1 * width1,
        a=2 * planes * pairs * width2,
        af=4 * pairs * width2 if activation == FP8_DYNAMIC else 0,
    )
    arguments = _Arguments(**given.fields, **addresses)
    if not given.direct:
        warps = rows1 if activation == FP8_DYNAMIC else rows1 * width1 // 32
        kernels.inputs(-(-warps // 8), arguments, stream)
    units = first.units if not isinstance(activation, BlockFormat) or not layout.gated else -(-first.units // 2)
    (kernels.first if given.direct else kernels.first_after_inputs)((units, pairs), arguments, stream)
    if activation == FP8_DYNAMIC:
        kernels.middle(-(-pairs // 8), arguments, stream)
    kernels.second((2 * second.units, tokens), arguments, stream)


@lru_cache(maxsize=256)
def _kernels(
    layout: ExpertsLayout,
    dtype: torch.dtype,
    activation: Activation,
    function: str,
    k: int,
    shape: Shape,
    device: int,
) -> _Kernels:
    macros = {
        **problem_macros(layout, dtype, activation, function),
        "SLOTS": str(-(-k // 8) * 8),
        "WARPS1": str(shape.warps1),
        "DEEP1": str(shape.deep1),
        "WARPS2": str(shape.warps2),
        "DEEP2": str(shape.deep2),
    }

    def kernel(name: str, threads: int, *, overlaps: bool) -> Kernel:
        return Kernel("single", macros, device, threads=threads, overlaps=overlaps, name=name)

    return _Kernels(
        inputs=kernel("inputs", 256, overlaps=False),
        first=kernel("first", 32 * shape.warps1, overlaps=False),
        first_after_inputs=kernel("first", 32 * shape.warps1, overlaps=True),
        middle=kernel("middle", 256, overlaps=True),
        second=kernel("second", 32 * shape.warps2, overlaps=True),
    )
