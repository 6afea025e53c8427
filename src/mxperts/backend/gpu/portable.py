"""fused_experts and mx_linear in Triton alone, on canonical weights: the path that runs everything on any GPU.

Nothing here waits for the device, and what is allocated depends on shapes only. What a kernel is launched with is a
function of the problem's sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxperts.backend.gpu import grouped
from mxperts.backend.gpu.paths import is_batch_invariant
from mxperts.backend.gpu.quantize import fake_quantize_fp8_dynamic, fake_quantize_fp8_static, on_device, qdq_input
from mxperts.backend.gpu.routing import group
from mxperts.backend.gpu.rule import block_rule, element_rule
from mxperts.formats import FP8_DYNAMIC, FP8_STATIC, Activation, BlockFormat, Role, recipe
from mxperts.ops.experts import ExpertsCall

WORKSPACE = 1 << 30
"""Bytes that intermediate results may take: more tokens go in turns."""
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_SUM_COLUMNS = 1024
_INVARIANT_ROWS = 64
"""Rows of an expert that tiles are chosen for where results must not depend on how many there are."""


class Tiles(NamedTuple):
    """What a program computes, and with what.

    Attributes:
        block_m, block_n, block_k: rows, columns (of the gate and as many of the up projection), and steps along K.
        warps: of a program.
        stages: of loads that are under way while others are computed with.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def choose_tiles(rows: int, experts: int, operand: torch.dtype, *, gated: bool) -> Tiles:
    """What to launch a projection with.

    Args:
        rows: all rows, spread over the experts in a way that is not known.
        experts: that they may be spread over.
        operand: dtype that is multiplied.
        gated: whether two projections are computed at once; makes no difference to the rows of a program.
    """
    each = rows / min(rows, experts) if not is_batch_invariant() else _INVARIANT_ROWS
    if operand is torch.float32:  # no matrix units
        return Tiles(16, 32, 32, 4, 2) if each <= 16 else Tiles(64, 32, 32, 4, 2)
    if each <= 16:
        return Tiles(16, 32 if gated else 64, 128, 4, 3)
    if each <= 48:
        return Tiles(32, 64, 64, 4, 3)
    if each <= 96:
        return Tiles(64, 64 if gated else 128, 64, 4, 3)
    return Tiles(128, 64 if gated else 128, 64, 8, 3)


def operand_dtype(dtype: torch.dtype, weight: BlockFormat, activation: Activation) -> torch.dtype:
    """The dtype to multiply in, which holds both operands, as ``dtype`` has them, exactly.

    bfloat16 has the elements of a block format with any scale, as float32 has them, unless the smallest are below
    2^-133, which is as far as it goes.
    """
    formats = (weight, activation)
    small = all(isinstance(f, BlockFormat) and f.element.smallest >= 2.0**-6 for f in formats)
    return torch.bfloat16 if dtype is torch.float32 and small else dtype


def fused_experts(call: ExpertsCall, out: Tensor) -> None:
    """Write the sum over each token's experts into ``out`` [T, H]; the weights are canonical."""
    tokens = out.shape[0]
    if tokens == 0:
        return
    turns = triton.cdiv(tokens * _bytes_of_token(call), WORKSPACE)
    step = triton.cdiv(tokens, turns)
    router = call.top_k_weights.to(torch.float32).contiguous()
    with on_device(out):
        for first in range(0, tokens, step):
            part = slice(first, first + step)
            _run(call, call.hidden_states[part], call.top_k_index[part], router[part], out[part])


def _bytes_of_token(call: ExpertsCall) -> int:
    """Bytes that the intermediate results of one token take: of its pairs, and of its input, quantised."""
    layout, k, size = call.layout, call.top_k_index.shape[1], call.hidden_states.element_size()
    rows = 2 * k if call.input_scales is not None and call.input_scales[0].numel() > 1 else 1
    copies = 2 if call.activation_format == FP8_DYNAMIC else 1
    return k * (4 * layout.hidden + copies * size * layout.intermediate) + rows * size * layout.hidden


def _run(call: ExpertsCall, x: Tensor, ids: Tensor, router: Tensor, out: Tensor) -> None:
    """``fused_experts`` of some tokens.

    Args:
        x, ids, router, out: of these tokens; ``router`` is float32 and contiguous.
    """
    layout, hidden_dtype, activation_format = call.layout, x.dtype, call.activation_format
    assert layout.weight is not None, "dense weights"
    gate_up_packed, gate_up_scales, down_packed, down_scales = (t.contiguous() for t in call.weights)
    gate_up_bias, down_bias = _as_bias(call.gate_up_bias), _as_bias(call.down_bias)
    gate_up_scale, down_scale = call.input_scales or (None, None)
    rotated = layout.rotation is not None
    tokens, k = ids.shape
    pairs, device = tokens * k, x.device
    operand = operand_dtype(hidden_dtype, layout.weight, activation_format)
    if call.accumulation == "exact":
        operand = torch.float32  # sums within matrix units may be truncated
    tiles1 = choose_tiles(pairs, layout.experts, operand, gated=layout.gated)
    tiles2 = choose_tiles(pairs, layout.experts, operand, gated=False)
    expert_map = None if call.expert_map is None else call.expert_map.contiguous()
    groups = group(ids, expert_map, layout.experts, tiles1.block_m)
    table = (groups.order, groups.block_expert, groups.block_first, groups.block_end, groups.blocks)

    if call.router_weight_on_input:
        x = (x.to(torch.float32) * router).to(hidden_dtype)
    scale_per_expert = gate_up_scale is not None and gate_up_scale.numel() > 1
    if scale_per_expert:
        assert gate_up_scale is not None
        of_pair = gate_up_scale[groups.local.clamp(min=0)].view(pairs, 1)
        x = x.unsqueeze(1).expand(tokens, k, layout.hidden).reshape(pairs, layout.hidden)
        x = fake_quantize_fp8_static(x, of_pair, rotated=rotated)
    else:
        x = _quantize_input(_rows(x), activation_format, gate_up_scale, rotated=rotated)

    rule = None
    if isinstance(activation_format, BlockFormat):
        rule = block_rule(activation_format, recipe(activation_format, Role.ACTIVATION))
    a = torch.empty(pairs, layout.intermediate, dtype=operand, device=device)
    grouped.gate_up[(groups.blocks * triton.cdiv(layout.intermediate, tiles1.block_n),)](
        x,
        x.stride(0),
        gate_up_packed,
        gate_up_scales,
        x if gate_up_bias is None else gate_up_bias,
        x if down_scale is None else down_scale,
        a,
        *table,
        K=layout.hidden,
        COLUMNS=layout.intermediate,
        ROWS_OF_X=1 if scale_per_expert else k,
        ELEMENT=element_rule(layout.weight),
        DTYPE=_DTYPES[operand],
        HIDDEN_DTYPE=_DTYPES[hidden_dtype],
        ACTIVATION=call.activation,
        INTERLEAVED=layout.interleaved,
        HAS_BIAS=gate_up_bias is not None,
        # a token's fp8 scale is known only when all of it is there: then it is rotated once more from what is stored
        ROTATED=rotated and activation_format != FP8_DYNAMIC,
        RULE=rule,
        STATIC=activation_format == FP8_STATIC,
        SCALE_STEP=int(down_scale is not None and down_scale.numel() > 1),
        BLOCK_M=tiles1.block_m,
        BLOCK_N=tiles1.block_n,
        BLOCK_K=tiles1.block_k,
        num_warps=tiles1.warps,
        num_stages=tiles1.stages,
    )
    if activation_format == FP8_DYNAMIC:
        a = fake_quantize_fp8_dynamic(a, rotated=rotated)

    y = torch.empty(pairs, layout.hidden, dtype=torch.float32, device=device)
    grouped.project[(groups.blocks * triton.cdiv(layout.hidden, tiles2.block_n),)](
        a,
        a.stride(0),
        down_packed,
        down_scales,
        a if down_bias is None else down_bias,
        y,
        *table,
        pairs,
        K=layout.intermediate,
        COLUMNS=layout.hidden,
        ELEMENT=element_rule(layout.weight),
        DTYPE=_DTYPES[operand],
        HAS_BIAS=down_bias is not None,
        GROUPED=True,
        BLOCK_M=tiles2.block_m,
        BLOCK_N=tiles2.block_n,
        BLOCK_K=tiles2.block_k,
        num_warps=tiles2.warps,
        num_stages=tiles2.stages,
    )
    _sum_slots(y, groups.local, None if call.router_weight_on_input else router, out, k, in_place=True)


def sum_slots(rows: Tensor, position: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
    """The last step of a layer, for rows that come from elsewhere; see ``mxperts.distributed.exchange.Sum``."""
    if out.numel():
        with on_device(out):
            _sum_slots(rows, position.contiguous(), weights.contiguous(), out, position.shape[1], in_place=False)


def _sum_slots(y: Tensor, row: Tensor, router: Tensor | None, out: Tensor, k: int, *, in_place: bool) -> None:
    tokens, hidden = out.shape
    block_n = min(_SUM_COLUMNS, triton.next_power_of_2(hidden))
    grouped.sum_slots[(tokens, triton.cdiv(hidden, block_n))](
        y,
        row,
        y if router is None else router,
        out,
        COLUMNS=hidden,
        SLOTS=k,
        WEIGHTED=router is not None,
        IN_PLACE=in_place,
        BLOCK_N=block_n,
    )


def mx_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    fmt: BlockFormat,
    bias: Tensor | None,
    activation: Activation,
    input_scale: Tensor | None,
    rotation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``x`` [..., K] times ``weight`` [N, K] transposed, plus ``bias`` [N]: [..., N] in ``out_dtype``."""
    packed, scales = (t.contiguous() for t in weight)
    columns, k = packed.shape[0], x.shape[-1]
    out = torch.empty(*x.shape[:-1], columns, dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    bias, dtype = _as_bias(bias), operand_dtype(x.dtype, fmt, activation)
    with on_device(x):
        rows = _quantize_input(_rows(x.reshape(-1, k)), activation, input_scale, rotated=rotation is not None)
        tiles = choose_tiles(rows.shape[0], 1, dtype, gated=False)
        blocks = triton.cdiv(rows.shape[0], tiles.block_m)
        grouped.project[(blocks * triton.cdiv(columns, tiles.block_n),)](
            rows,
            rows.stride(0),
            packed,
            scales,
            rows if bias is None else bias,
            out,
            *[rows] * 4,
            blocks,
            rows.shape[0],
            K=k,
            COLUMNS=columns,
            ELEMENT=element_rule(fmt),
            DTYPE=_DTYPES[dtype],
            HAS_BIAS=bias is not None,
            GROUPED=False,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return out


def _quantize_input(x: Tensor, activation: Activation, scale: Tensor | None, *, rotated: bool) -> Tensor:
    """``x`` [R, K], rotated first if it is to be, as the activation format holds it, in its own dtype.

    ``scale`` [1] is for static fp8 only.
    """
    if activation is None:
        return qdq_input(x, None, rotated=True) if rotated else x
    if activation == FP8_DYNAMIC:
        return fake_quantize_fp8_dynamic(x, rotated=rotated)
    if activation == FP8_STATIC:
        assert scale is not None, "static fp8 without a scale"
        return fake_quantize_fp8_static(x, scale, rotated=rotated)
    assert isinstance(activation, BlockFormat), activation
    return qdq_input(x, block_rule(activation, recipe(activation, Role.ACTIVATION)), rotated=rotated)


def _rows(x: Tensor) -> Tensor:
    """``x`` [R, K] with the numbers of a row one after the other."""
    x = x.detach()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _as_bias(bias: Tensor | None) -> Tensor | None:
    """A contiguous bias in a dtype that kernels read."""
    if bias is None:
        return None
    return (bias if bias.dtype in _DTYPES else bias.to(torch.float32)).detach().contiguous()
