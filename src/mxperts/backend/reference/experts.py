"""The experts of a mixture-of-experts layer, one expert at a time, exactly as ``mxperts.ops.experts`` defines them.

Everything between two roundings of the contract is float64: see ``mxperts.backend.reference.linear`` for why that makes
the result independent of batch, threads and BLAS. Kernels, which accumulate in float32, are held against it by a bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxperts.backend.reference.activation import activate
from mxperts.backend.reference.linear import project, quantize_input, round_once
from mxperts.ops.experts import ExpertsCall
from mxperts.ops.prepare import ExpertsLayout


def fused_experts(call: ExpertsCall, out: Tensor) -> None:
    """Write the sum over each token's experts into ``out`` [T, H]. Weights of experts without tokens are not read."""
    x = call.hidden_states  # [T, H]
    routing = call.top_k_weights.to(torch.float32)  # [T, k]
    if call.router_weight_on_input:
        x = (x.to(torch.float32) * routing).to(x.dtype)
        routing = torch.ones_like(routing)
    rotation = call.layout.rotation
    gate_up_scale, down_scale = call.input_scales or (None, None)
    scale_per_expert = gate_up_scale is not None and gate_up_scale.numel() > 1
    if not scale_per_expert:
        x = quantize_input(x, call.activation_format, gate_up_scale, rotation)

    local = local_experts(call.top_k_index, call.expert_map, call.layout.experts)  # [T, k]
    total = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
    for expert in local[local >= 0].unique().tolist():
        token, slot = torch.nonzero(local == expert, as_tuple=True)
        rows = x[token]
        if scale_per_expert:
            rows = quantize_input(rows, call.activation_format, _scale_of(gate_up_scale, expert), rotation)
        gate_up, down = expert_weights(call.weights, expert)
        h = round_once(project(rows, gate_up, call.layout.weight, _row(call.gate_up_bias, expert)), x.dtype)
        a = activate(h, call.activation, interleaved=call.layout.interleaved)
        a = quantize_input(a, call.activation_format, _scale_of(down_scale, expert), rotation)
        y = project(a, down, call.layout.weight, _row(call.down_bias, expert))
        total.index_add_(0, token, y * routing[token, slot].unsqueeze(-1))
    out.copy_(total if out.dtype is torch.float64 else round_once(total, out.dtype))


def sum_slots(rows: Tensor, position: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
    """The sum of ``fused_experts`` alone, in its order, that of experts; see ``mxperts.distributed.exchange.Sum``."""
    order = torch.sort(ids, dim=1, stable=True).indices  # [T, k]
    total = torch.zeros(out.shape, dtype=rows.dtype, device=out.device)
    for slot in order.unbind(1):
        row, weight = (t.gather(1, slot.unsqueeze(1)).squeeze(1) for t in (position, weights))
        (token,) = torch.nonzero(row >= 0, as_tuple=True)
        total.index_add_(0, token, rows[row[token]] * weight[token].unsqueeze(-1))
    out.copy_(round_once(total, out.dtype))


def local_experts(top_k_index: Tensor, expert_map: Tensor | None, experts: int) -> Tensor:
    """Local expert ids, int64 [T, k]; -1 for slots that contribute nothing, ids out of range included."""
    local = top_k_index.to(torch.int64)
    if expert_map is not None:
        known = (local >= 0) & (local < expert_map.shape[0])
        local = torch.where(known, expert_map.to(torch.int64)[torch.where(known, local, 0)], -1)
    return torch.where((local >= 0) & (local < experts), local, -1)


def expert_weights(weights: Sequence[Tensor], expert: int) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of one expert's two projections."""
    of_expert = [t[expert] for t in weights]
    half = len(of_expert) // 2
    return of_expert[:half], of_expert[half:]


def prepare(weights: Sequence[Tensor], layout: ExpertsLayout) -> Sequence[Tensor]:
    """The reference has no layout of its own: the canonical tensors themselves."""
    return weights


def unprepare(weights: Sequence[Tensor], layout: ExpertsLayout) -> Sequence[Tensor]:
    """The canonical tensors that ``prepare`` was given."""
    return weights


def _row(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]


def _scale_of(scale: Tensor | None, expert: int) -> Tensor | None:
    return scale if scale is None or scale.numel() == 1 else scale[expert]
