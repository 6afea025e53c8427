"""The dequantise-first baseline as a backend, for whole models: every forward pass dequantises all weights it meets.

A backend like any other, but one that only benchmarks register.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mxperts.backend.reference import dequantize, fake_quantize, prepare, quantize, unprepare
from mxperts.backend.reference.activation import activate
from mxperts.backend.reference.experts import local_experts
from mxperts.benchmark.contenders.dequantize_first import dequantize_all, lookup_table
from mxperts.benchmark.contenders.loop import Quantize, loop_experts, projection, quantizer
from mxperts.formats import Activation, BlockFormat
from mxperts.ops import dispatch
from mxperts.ops.experts import ExpertsCall
from mxperts.tensor import MXTensor

__all__ = ["dequantize", "describe", "fake_quantize", "fused_experts", "mx_linear", "prepare", "quantize", "unprepare"]

NAME = "dequantise-first"


@contextmanager
def registered() -> Iterator[str]:
    """While it lasts, there is a backend of this name; "auto" does not take it."""
    before: tuple[dispatch.Backend, ...] = dispatch.BACKENDS
    backend = dispatch.Backend(name=NAME, module=__name__, refuses=_refuses, summary=describe(None))
    dispatch.BACKENDS = (*before, backend)  # type: ignore[assignment]
    try:
        yield NAME
    finally:
        dispatch.BACKENDS = before  # type: ignore[assignment]


def _refuses(problem: dispatch.Problem) -> str | None:
    return None if problem.rotation is None else f"it does not rotate inputs, as {problem.rotation!r} asks"


def describe(problem: dispatch.Problem | None) -> str:
    """How it runs a problem."""
    return "plain PyTorch; dequantises in every call"


def fused_experts(call: ExpertsCall, out: Tensor) -> None:
    """Write the sum over each token's experts into ``out`` [T, H]."""
    x, weights, layout = call.hidden_states, call.top_k_weights.float(), call.layout
    if call.router_weight_on_input:
        x, weights = (x.float() * weights).to(x.dtype), weights.new_ones(weights.shape)
    middle = len(call.weights) // 2
    gate_up, down = (
        projection(_dense(tensors, layout.weight, k, x), bias)
        for tensors, k, bias in (
            (call.weights[:middle], layout.hidden, call.gate_up_bias),
            (call.weights[middle:], layout.intermediate, call.down_bias),
        )
    )
    out.copy_(
        loop_experts(
            x,
            local_experts(call.top_k_index, call.expert_map, layout.experts),
            weights,
            gate_up,
            down,
            partial(activate, activation=call.activation, interleaved=layout.interleaved),
            _quantizer(call.activation_format, call.input_scales),
        )
    )


def mx_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    fmt: BlockFormat | None,
    bias: Tensor | None,
    activation: Activation,
    input_scale: Tensor | None,
    rotation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``x`` [..., K] times ``weight`` [N, K] transposed, plus ``bias`` [N]; ``rotation`` is refused before."""
    quantize_input = _quantizer(activation, None if input_scale is None else (input_scale, input_scale))
    dense = _dense([t.unsqueeze(0) for t in weight], fmt, x.shape[-1], x)[0]
    return F.linear(quantize_input(x, 0), dense, None if bias is None else bias.to(x.dtype)).to(out_dtype)


def _dense(tensors: Sequence[Tensor], fmt: BlockFormat | None, k: int, like: Tensor) -> Tensor:
    """Weights [E, N, K] in the dtype of ``like``."""
    if fmt is None:
        return tensors[0].to(like.dtype)
    return dequantize_all(MXTensor(tensors[0], tensors[1], fmt, k), lookup_table(fmt, like.dtype))


def _quantizer(activation: Activation, scales: tuple[Tensor, Tensor] | None) -> Quantize:
    return quantizer(activation, None if scales is None else (float(scales[0].max()), float(scales[1].max())))
