"""fused_experts for few tokens: one launch of ``decode.cu`` for a whole layer."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache

import torch
from torch import Tensor

from mxperts.backend.gpu.cuda.compiler import Kernel
from mxperts.backend.gpu.cuda.layout import STEP, UNIT_ROWS, Tiles
from mxperts.backend.gpu.cuda.macros import DTYPES, hidden_macros, quantised, weight_macros
from mxperts.formats import FP8_DYNAMIC, Activation
from mxperts.ops.activation import BoundActivation
from mxperts.ops.experts import ExpertsCall
from mxperts.ops.prepare import ExpertsLayout

MOST_PAIRS = 512
"""Pairs (token, slot) of a call: every block sorts all of them for itself."""
MOST_PARTS = 16
ITEM_COST = 2.0
"""What an item costs besides its steps, in steps."""
_MOST_DEPTH = 16
_WALK_BYTES = 16
_NAN = math.nan


class _Arguments(ctypes.Structure):
    """``Args`` of decode.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "ids", "routing", "map", "w1", "w2", "bias1", "bias2")),
        *((name, ctypes.c_void_p) for name in ("scale1", "scale2", "xq", "a", "af", "h", "y", "out")),
        *((name, ctypes.c_int64) for name in ("x_stride", "T", "k", "E", "H", "I", "map_size", "parts1", "parts2")),
        *((name, ctypes.c_int64) for name in ("ids64", "map64", "routing_dtype", "bias1_dtype", "bias2_dtype")),
        *((name, ctypes.c_int64) for name in ("direct", "on_input", "per_expert1", "per_expert2")),
        *((name, ctypes.c_float) for name in ("limit", "alpha", "beta", "linear_beta")),
    )


def fused_experts(call: ExpertsCall, out: Tensor, first: Tiles, second: Tiles) -> None:
    """Write the sum over each token's experts into ``out`` [T, H]; at most ``MOST_PAIRS`` pairs."""
    x, layout = call.hidden_states, call.layout
    tokens, k = call.top_k_index.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    activation = call.activation_format
    scale1, scale2 = call.input_scales or (None, None)
    per_expert1 = scale1 is not None and scale1.numel() > 1
    width1, width2 = first.steps * STEP, second.steps * STEP
    planes = hidden_macros(x.dtype, activation).planes
    direct = (
        activation is None
        and x.dtype is torch.bfloat16
        and not call.router_weight_on_input
        and layout.hidden % STEP == 0
        and x.stride(0) % 8 == 0
        and x.data_ptr() % 16 == 0
    )
    pairs = tokens * k
    device = x.device
    index = device.index if device.index is not None else torch.cuda.current_device()
    kernel, blocks = _kernel(layout, x.dtype, activation, call.activation.name, _room(pairs), index)
    groups, workers = expected_groups(pairs, layout.experts), blocks * kernel.threads // 32
    parts1, parts2 = (parts(groups * t.units, t.steps, workers) for t in (first, second))
    sizes = (
        0 if direct else 2 * planes * (pairs if per_expert1 else tokens) * width1,
        2 * planes * pairs * width2,
        4 * pairs * width2 if activation == FP8_DYNAMIC else 0,
        4 * parts1 * pairs * first.units * UNIT_ROWS,
        4 * parts2 * pairs * second.units * UNIT_ROWS,
    )
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + (size + 255) // 256 * 256)
    workspace = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    base = workspace.data_ptr()
    ids, routing = call.top_k_index.contiguous(), call.top_k_weights.contiguous()
    biases = [b if b is None or b.is_contiguous() else b.contiguous() for b in (call.gate_up_bias, call.down_bias)]
    expert_map = None if call.expert_map is None else call.expert_map.contiguous()
    constants = [_NAN if c is None else c for c in _constants(call.activation)]
    arguments = _Arguments(
        x.data_ptr(),
        ids.data_ptr(),
        routing.data_ptr(),
        _address(expert_map),
        call.weights[0].data_ptr(),
        call.weights[1].data_ptr(),
        _address(biases[0]),
        _address(biases[1]),
        _address(scale1),
        _address(scale2),
        *(base + start for start in starts[:-1]),
        out.data_ptr(),
        x.stride(0),
        tokens,
        k,
        layout.experts,
        layout.hidden,
        layout.intermediate,
        0 if expert_map is None else expert_map.numel(),
        parts1,
        parts2,
        ids.dtype is torch.int64,
        expert_map is not None and expert_map.dtype is torch.int64,
        DTYPES[routing.dtype],
        0 if biases[0] is None else DTYPES[biases[0].dtype],
        0 if biases[1] is None else DTYPES[biases[1].dtype],
        direct,
        call.router_weight_on_input,
        per_expert1,
        scale2 is not None and scale2.numel() > 1,
        *constants,
    )
    kernel(blocks, arguments, torch.cuda.current_stream(index).cuda_stream)


def _room(pairs: int) -> int:
    """Pairs that a kernel has room for: few variants, and no more shared memory than serves."""
    return 64 if pairs <= 64 else MOST_PAIRS


@lru_cache(maxsize=256)
def _kernel(
    layout: ExpertsLayout, dtype: torch.dtype, activation: Activation, function: str, pairs: int, device: int
) -> tuple[Kernel, int]:
    assert layout.weight is not None
    properties = torch.cuda.get_device_properties(device)
    experts = -(-layout.experts // 64) * 64
    slice_bytes = Tiles(format=layout.weight, rows=32, k=STEP).slice_bytes
    routing_bytes = pairs * (4 * 2 + 1 + 16) + 4 * experts + 64
    all_warps = warps_of_block(layout)
    free = properties.shared_memory_per_block_optin - routing_bytes
    depth = min(_MOST_DEPTH, (free // all_warps - _WALK_BYTES) // slice_bytes)
    macros = {
        **weight_macros(layout.weight),
        **hidden_macros(dtype, activation).macros(),
        **quantised(activation),
        **_function_macros(function, layout.interleaved),
        "PAIRS": str(pairs),
        "EXPERTS": str(experts),
        "ALL_WARPS": str(all_warps),
        "DEPTH": str(depth),
    }
    shared = all_warps * (_WALK_BYTES + depth * slice_bytes) + routing_bytes
    kernel = Kernel("decode", macros, device, threads=32 * all_warps, shared_bytes=shared, cooperative=True)
    return kernel, properties.multi_processor_count


def warps_of_block(layout: ExpertsLayout) -> int:
    """Warps on a multiprocessor."""
    return 32


@lru_cache(maxsize=1024)
def expected_groups(pairs: int, experts: int) -> int:
    """Groups that so many pairs are likely to form: experts that at least one of them is drawn for, and full groups."""
    active = round(experts * (1 - (1 - 1 / experts) ** pairs)) if experts > 1 else 1
    return max(1, active, -(-pairs // 8))


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


FUNCTIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swigluoai", "situ", "swiglustep")


def _function_macros(name: str, interleaved: bool) -> dict[str, str]:
    return {
        "FUNCTION": str(FUNCTIONS.index(name.removesuffix("_no_mul"))),
        "GATED": str(int(not name.endswith("_no_mul"))),
        "INTERLEAVED": str(int(interleaved)),
    }


def _constants(a: BoundActivation) -> tuple[float | None, ...]:
    return a.limit, a.alpha, a.beta, a.linear_beta


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
