"""fused_experts for many tokens: pairs (token, slot) sorted by expert, and each projection as one grouped product."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mxperts.backend.gpu.cuda.compiler import Kernel
from mxperts.backend.gpu.cuda.layout import STEP, UNIT_ROWS, Tiles
from mxperts.backend.gpu.cuda.macros import DTYPES, function_macros, hidden_macros, quantised, weight_macros
from mxperts.formats import Activation
from mxperts.ops.experts import ExpertsCall
from mxperts.ops.prepare import ExpertsLayout

MOST_PAIRS = 1 << 17
"""Pairs that are computed together; it bounds the workspace. More are computed one part after the other."""
_UNITS = 8
_MOST_STAGES = 8
_TILE_BYTES = 32
_NAN = math.nan


class _Arguments(ctypes.Structure):
    """``Args`` of grouped.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "ids", "routing", "map", "w1", "w2", "bias1", "bias2")),
        *((name, ctypes.c_void_p) for name in ("scale1", "scale2", "totals", "tiles", "position", "source")),
        *((name, ctypes.c_void_p) for name in ("expert", "local", "xq", "a", "h", "y", "out")),
        *((name, ctypes.c_int64) for name in ("x_stride", "T", "k", "E", "H", "I", "map_size")),
        *((name, ctypes.c_int64) for name in ("ids64", "map64", "routing_dtype", "bias1_dtype", "bias2_dtype")),
        *((name, ctypes.c_int64) for name in ("aligned", "on_input", "per_expert1", "per_expert2", "second")),
        *((name, ctypes.c_float) for name in ("limit", "alpha", "beta", "linear_beta")),
    )


@dataclass(frozen=True, eq=False)
class _Kernels:
    sort: Kernel
    first_inputs: Kernel
    second_inputs: Kernel
    grouped: Kernel
    combine: Kernel
    multiprocessors: int


def fused_experts(call: ExpertsCall, out: Tensor, first: Tiles, second: Tiles) -> None:
    """Write the sum over each token's experts into ``out`` [T, H]."""
    tokens, k = call.top_k_index.shape
    together = max(1, MOST_PAIRS // k)
    for start in range(0, tokens, together):
        _fused_experts(call, out, first, second, slice(start, start + together))


def _fused_experts(call: ExpertsCall, out: Tensor, first: Tiles, second: Tiles, part: slice) -> None:
    x, layout, out = call.hidden_states[part], call.layout, out[part]
    ids, routing = call.top_k_index[part].contiguous(), call.top_k_weights[part].contiguous()
    tokens, k = ids.shape
    pairs = tokens * k
    x = x if x.stride(-1) == 1 else x.contiguous()
    scale1, scale2 = call.input_scales or (None, None)
    per_expert1 = scale1 is not None and scale1.numel() > 1
    device = x.device
    index = device.index if device.index is not None else torch.cuda.current_device()
    kernels = _kernels(layout, x.dtype, call.activation_format, call.activation.name, index)
    planes = hidden_macros(x.dtype, call.activation_format).planes
    rows = pairs if per_expert1 else tokens
    sizes = (
        8,
        _TILE_BYTES * most_tiles(pairs, layout.experts, tokens_of_tile(planes)),
        *(4 * pairs, 4 * pairs, 2 * pairs, 2 * pairs),
        2 * planes * max(rows * first.steps, pairs * second.steps) * STEP,
        pairs * UNIT_ROWS * max(first.units * x.element_size(), second.units * 4),
    )
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + (size + 255) // 256 * 256)
    workspace = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    *small, inputs, results = (workspace.data_ptr() + start for start in starts[:-1])
    biases = [b if b is None or b.is_contiguous() else b.contiguous() for b in (call.gate_up_bias, call.down_bias)]
    expert_map = None if call.expert_map is None else call.expert_map.contiguous()
    a = call.activation
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
        *small,
        *(inputs, inputs),  # each projection's are done with when the other's are written
        *(results, results),
        out.data_ptr(),
        x.stride(0),
        tokens,
        k,
        layout.experts,
        layout.hidden,
        layout.intermediate,
        0 if expert_map is None else expert_map.numel(),
        ids.dtype is torch.int64,
        expert_map is not None and expert_map.dtype is torch.int64,
        DTYPES[routing.dtype],
        0 if biases[0] is None else DTYPES[biases[0].dtype],
        0 if biases[1] is None else DTYPES[biases[1].dtype],
        x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0,
        call.router_weight_on_input,
        per_expert1,
        scale2 is not None and scale2.numel() > 1,
        False,
        *(_NAN if c is None else c for c in (a.limit, a.alpha, a.beta, a.linear_beta)),
    )
    stream = torch.cuda.current_stream(index).cuda_stream
    kernels.sort(1, arguments, stream)
    kernels.first_inputs(rows, arguments, stream)
    kernels.grouped(kernels.multiprocessors, arguments, stream)
    arguments.second = True
    kernels.second_inputs(pairs, arguments, stream)
    kernels.grouped(kernels.multiprocessors, arguments, stream)
    kernels.combine(tokens, arguments, stream)


def tokens_of_tile(planes: int) -> int:
    """Most tokens that are computed together: their inputs share the shared memory with the weights' codes."""
    return 128 if planes == 1 else 64


def most_tiles(pairs: int, experts: int, tokens: int) -> int:
    """Most tiles that ``pairs`` fall into, however they are spread over the experts."""
    return (pairs + min(pairs, experts) * (tokens - 1)) // tokens


def stages(slice_bytes: int, planes: int, shared_bytes: int) -> tuple[int, int]:
    """Steps that a block of so much shared memory keeps there, and the bytes that they take."""
    stage = -(-(planes * tokens_of_tile(planes) * STEP * 2 + _UNITS * slice_bytes) // 1024) * 1024
    number = min(_MOST_STAGES, (shared_bytes - 2048) // stage)
    return number, number * stage + 1024


def has_wgmma(device: int) -> bool:
    """Whether a device has Hopper's instructions; others have ``mma.sync``."""
    return torch.cuda.get_device_capability(device) == (9, 0)


@lru_cache(maxsize=256)
def _kernels(layout: ExpertsLayout, dtype: torch.dtype, activation: Activation, function: str, device: int) -> _Kernels:
    assert layout.weight is not None
    properties: Any = torch.cuda.get_device_properties(device)
    wgmma = has_wgmma(device)
    hidden = hidden_macros(dtype, activation)
    experts = -(-layout.experts // 64) * 64
    segments = 32 if experts <= 512 else 16
    slice_bytes = Tiles(format=layout.weight, rows=UNIT_ROWS, k=STEP).slice_bytes
    number, shared = stages(slice_bytes, hidden.planes, properties.shared_memory_per_block_optin)
    macros = {
        **weight_macros(layout.weight),
        **hidden.macros(),
        **quantised(activation),
        **function_macros(function, layout.interleaved),
        "WGMMA": str(int(wgmma)),
        "MOST_N": str(tokens_of_tile(hidden.planes)),
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


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
