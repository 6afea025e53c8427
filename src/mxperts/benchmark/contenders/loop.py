"""The experts of a layer as a loop over dense bf16 products: what plain PyTorch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mxperts.formats import FP8_DYNAMIC, FP8_STATIC, Activation
from mxperts.ops.quantize import fake_quantize

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
"""Of swigluoai, as in gpt-oss."""
FP8_MAX = 448.0

Quantize = Callable[[Tensor, int], Tensor]
"""Fake-quantises the input of projection 0 or 1."""
Project = Callable[[Tensor, int], Tensor]
"""Multiplies rows by a projection of an expert."""


def loop_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Project,
    down: Project,
    activate: Callable[[Tensor], Tensor],
    quantize: Quantize,
) -> Tensor:
    """The weighted sum of each token's experts, one expert at a time: [T, H].

    Args:
        x: states [T, H].
        top_k_index, top_k_weights: [T, k]; negative ids contribute nothing.
        gate_up, down: the projections of an expert.
        activate: the activation function.
        quantize: applied to the inputs of both projections.
    """
    top_k = top_k_index.shape[1]
    x = quantize(x, 0)
    ids = top_k_index.flatten()
    order = ids.argsort()
    token, weight = order // top_k, top_k_weights.flatten()[order].unsqueeze(-1)
    total = torch.zeros(x.shape, dtype=torch.float32)
    start = 0
    for expert, count in zip(*(t.tolist() for t in ids.unique(return_counts=True)), strict=True):
        rows = slice(start, start + count)
        start += count
        if expert >= 0:
            y = down(quantize(activate(gate_up(x[token[rows]], expert)), 1), expert)
            total.index_add_(0, token[rows], y.float() * weight[rows])
    return total.to(x.dtype)


def projection(weight: Tensor, bias: Tensor | None = None) -> Project:
    """Multiplies by dense weights [E, N, K], in the dtype of the rows."""
    if bias is None:
        return lambda x, expert: F.linear(x, weight[expert])
    return lambda x, expert: F.linear(x, weight[expert], bias[expert].to(x.dtype))


def gated(h: Tensor, activation: str) -> Tensor:
    """The gated activation of [..., 2I], gate columns first, rounded once: [..., I]."""
    gate, up = h.float().chunk(2, dim=-1)
    if activation == "silu":
        return (F.silu(gate) * up).to(h.dtype)
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)).to(h.dtype)


def quantizer(
    activation: Activation, input_scales: tuple[float, float] | None, *, backend: str = "reference"
) -> Quantize:
    """What fake-quantises inputs to an activation format; a backend of mxperts does it for block formats."""
    if activation is None:
        return lambda x, projection: x
    if activation == FP8_DYNAMIC:
        return lambda x, projection: _fp8(x, x.float().abs().amax(dim=-1, keepdim=True) / FP8_MAX)
    if activation == FP8_STATIC:
        scales = cast(tuple[float, float], input_scales)
        return lambda x, projection: _fp8(x, torch.tensor(scales[projection]))
    return lambda x, projection: fake_quantize(x, activation, backend=backend)


def _fp8(x: Tensor, scale: Tensor) -> Tensor:
    codes = (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)
