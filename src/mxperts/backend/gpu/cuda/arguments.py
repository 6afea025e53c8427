"""What kernels are given of a call: addresses, sizes and choices, as their ``Args`` name them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mxperts.backend.gpu.cuda.layout import STEP
from mxperts.backend.gpu.cuda.macros import DTYPES
from mxperts.ops.experts import ExpertsCall

_ALIGNMENT = 256


class CallArguments(ctypes.Structure):
    """``Call`` of common.cuh; kernels add fields of their own."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "ids", "routing", "map", "w1", "w2", "bias1", "bias2")),
        *((name, ctypes.c_void_p) for name in ("scale1", "scale2", "out")),
        *((name, ctypes.c_int64) for name in ("x_stride", "T", "k", "E", "H", "I", "map_size")),
        *((name, ctypes.c_int64) for name in ("ids64", "map64", "routing_dtype", "bias1_dtype", "bias2_dtype")),
        *((name, ctypes.c_int64) for name in ("direct", "on_input", "per_expert1", "per_expert2")),
        *((name, ctypes.c_float) for name in ("limit", "alpha", "beta", "linear_beta")),
    )


class Given:
    """The tensors of a call, kept alive until it is launched.

    Attributes:
        x: hidden states with rows in one piece.
        direct: whether the first projection can read them as they are.
        per_expert1, per_expert2: whether static scales differ from expert to expert.
        fields: of ``CallArguments``.
    """

    def __init__(self, call: ExpertsCall, out: Tensor) -> None:
        x, layout = call.hidden_states, call.layout
        self.x = x if x.stride(-1) == 1 else x.contiguous()
        tokens, k = call.top_k_index.shape
        scale1, scale2 = call.input_scales or (None, None)
        self.per_expert1, self.per_expert2 = (s is not None and s.numel() > 1 for s in (scale1, scale2))
        self.direct = (
            call.activation_format is None
            and x.dtype is torch.bfloat16
            and not call.router_weight_on_input
            and layout.hidden % STEP == 0
            and self.x.stride(0) % 8 == 0
            and self.x.data_ptr() % 16 == 0
        )
        ids, routing = call.top_k_index.contiguous(), _numbers(call.top_k_weights)
        bias1, bias2 = (None if t is None else _numbers(t) for t in (call.gate_up_bias, call.down_bias))
        expert_map = None if call.expert_map is None else call.expert_map.contiguous()
        self._kept = (ids, routing, bias1, bias2, expert_map, scale1, scale2)
        a = call.activation
        limit, alpha, beta, linear_beta = (
            math.nan if c is None else c for c in (a.limit, a.alpha, a.beta, a.linear_beta)
        )
        self.fields: dict[str, Any] = {
            "x": self.x.data_ptr(),
            "ids": ids.data_ptr(),
            "routing": routing.data_ptr(),
            "map": _address(expert_map),
            "w1": call.weights[0].data_ptr(),
            "w2": call.weights[1].data_ptr(),
            "bias1": _address(bias1),
            "bias2": _address(bias2),
            "scale1": _address(scale1),
            "scale2": _address(scale2),
            "out": out.data_ptr(),
            "x_stride": self.x.stride(0),
            "T": tokens,
            "k": k,
            "E": layout.experts,
            "H": layout.hidden,
            "I": layout.intermediate,
            "map_size": 0 if expert_map is None else expert_map.numel(),
            "ids64": ids.dtype is torch.int64,
            "map64": expert_map is not None and expert_map.dtype is torch.int64,
            "routing_dtype": DTYPES[routing.dtype],
            "bias1_dtype": 0 if bias1 is None else DTYPES[bias1.dtype],
            "bias2_dtype": 0 if bias2 is None else DTYPES[bias2.dtype],
            "direct": self.direct,
            "on_input": call.router_weight_on_input,
            "per_expert1": self.per_expert1,
            "per_expert2": self.per_expert2,
            "limit": limit,
            "alpha": alpha,
            "beta": beta,
            "linear_beta": linear_beta,
        }


def current(device: torch.device) -> tuple[int, int]:
    """The index of a device and the handle of its current stream."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    return index, torch.cuda.current_stream(index).cuda_stream


def active_experts(pairs: int, experts: int) -> float:
    """How many experts at least one of so many pairs is for, on average, if each is drawn from all alike."""
    return experts * (1 - (1 - 1 / experts) ** pairs)


def workspace(device: torch.device, **sizes: int) -> tuple[Tensor, dict[str, int]]:
    """Memory for intermediate results of so many bytes, and where in it each of them begins."""
    starts: Sequence[int] = [0]
    for size in sizes.values():
        starts = [*starts, starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT]
    memory = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    base = memory.data_ptr()
    return memory, {name: base + start for name, start in zip(sizes, starts, strict=False)}


def _numbers(tensor: Tensor) -> Tensor:
    """In one piece, in a dtype that kernels read."""
    return (tensor if tensor.dtype in DTYPES else tensor.to(torch.float32)).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
