"""The two projections of experts in Triton: grouped products of rows with packed weights, decoded in registers.

A program computes one block of rows, all of one expert, by some columns. All programs sum along K in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxperts.backend.gpu.activation import activate
from mxperts.backend.gpu.convert import INTERPRET, from_float32, to_float32
from mxperts.backend.gpu.elements import decode_weight_tile
from mxperts.backend.gpu.qdq import fake_quantize_fp8, qdq_blocks
from mxperts.backend.gpu.rotation import rotate_rows

_TOGETHER = tl.constexpr(8)


@triton.jit
def _tile(blocks, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's block of rows and its first column.

    Programs that run at the same time share weights and rows: eight blocks of rows take turns at each tile of weights.
    """
    programs_n: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first = program // (_TOGETHER * programs_n) * _TOGETHER
    together = tl.minimum(blocks - first, _TOGETHER)
    within = program % (_TOGETHER * programs_n)
    return first + within % together, within // together * BLOCK_N


@triton.jit
def _load_x(x_ptr, rows_at, row_mask, k0, K: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr):
    """Columns ``k0 : k0 + BLOCK_K`` of some rows: [BLOCK_M, BLOCK_K] in ``DTYPE``, which holds them exactly."""
    k = k0 + tl.arange(0, BLOCK_K)
    at = x_ptr + rows_at[:, None] + k[None, :]
    if K % BLOCK_K == 0:
        x = tl.load(at, mask=row_mask[:, None], other=0.0)
    else:
        x = tl.load(at, mask=row_mask[:, None] & (k < K)[None, :], other=0.0)
    if x.dtype == DTYPE:
        return x
    else:
        return from_float32(to_float32(x), DTYPE)


@triton.jit
def _add_product(
    sums,
    x,
    packed_ptr,
    scales_ptr,
    rows,
    row_mask,
    k0,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ELEMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``sums`` plus ``x`` [BLOCK_M, BLOCK_K] times the weights ``[rows, k0 : k0 + BLOCK_K]`` transposed."""
    blocks: tl.constexpr = (K + 31) // 32
    w = decode_weight_tile(packed_ptr, scales_ptr, rows, row_mask, k0, blocks, BLOCK_K, ELEMENT, DTYPE)
    if K % 32 != 0:  # what pads a row need not be zeros
        w = tl.where((k0 + tl.arange(0, BLOCK_K) < K)[None, :], w, tl.zeros([1, BLOCK_K], DTYPE))
    if INTERPRET:  # whose bfloat16 is not multiplied as such
        x, w = to_float32(x), to_float32(w)
    return tl.dot(x, tl.trans(w), sums, input_precision="ieee")


@triton.jit
def _add_bias(sums, bias_ptr, expert, columns, mask, COLUMNS: tl.constexpr):
    """``sums`` [BLOCK_M, BLOCK_N] plus the bias [E, COLUMNS] of an expert."""
    bias = tl.load(bias_ptr + expert * COLUMNS + columns, mask=mask, other=0.0)
    return sums + to_float32(bias)[None, :]


@triton.jit
def gate_up(
    x_ptr,
    x_stride,
    packed_ptr,
    scales_ptr,
    bias_ptr,
    input_scale_ptr,
    a_ptr,
    order_ptr,
    block_expert_ptr,
    block_first_ptr,
    block_end_ptr,
    blocks,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS_OF_X: tl.constexpr,
    ELEMENT: tl.constexpr,
    DTYPE: tl.constexpr,
    HIDDEN_DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROTATED: tl.constexpr,
    RULE: tl.constexpr,
    STATIC: tl.constexpr,
    SCALE_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The first projection, the activation function and the quantisation of its result: rows of ``a`` [pairs, I].

    Args:
        x_ptr: quantised rows [.., K], ``x_stride`` apart.
        packed_ptr, scales_ptr: of ``gate_up_proj`` [E, 2I or I, K].
        bias_ptr: [E, 2I or I], if HAS_BIAS.
        input_scale_ptr: float32, the scale of the second projection's input, if STATIC; SCALE_STEP apart.
        order_ptr, block_expert_ptr, block_first_ptr, block_end_ptr: as in ``routing.Grouping``.
        blocks: most blocks that there may be.
        COLUMNS: I.
        ROWS_OF_X: pairs that share a row of ``x``.
        DTYPE: of the operands; holds those of HIDDEN_DTYPE, quantised, exactly.
        ROTATED: whether the result is rotated before it is quantised.
        RULE: quantisation in blocks, or None.
        STATIC: quantisation to E4M3 with a fixed scale.
    """
    block, n0 = _tile(blocks, COLUMNS, BLOCK_N)
    expert = tl.load(block_expert_ptr + block).to(tl.int64)
    if expert < 0:
        return
    place = tl.load(block_first_ptr + block) + tl.arange(0, BLOCK_M)
    there = place < tl.load(block_end_ptr + block)
    pair = tl.load(order_ptr + place, mask=there, other=0).to(tl.int64)
    columns = n0 + tl.arange(0, BLOCK_N)
    mask = columns < COLUMNS
    rows_at = pair // ROWS_OF_X * x_stride

    GATED: tl.constexpr = ACTIVATION.gated
    ROWS: tl.constexpr = COLUMNS * (2 if GATED else 1)
    gate_rows = columns * (2 if INTERLEAVED else 1)
    up_rows = gate_rows + (1 if INTERLEAVED else COLUMNS)
    first_row = expert * ROWS
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x = _load_x(x_ptr, rows_at, there, k0, K, BLOCK_K, DTYPE)
        rows = first_row + gate_rows
        gate = _add_product(gate, x, packed_ptr, scales_ptr, rows, mask, k0, K, BLOCK_K, ELEMENT, DTYPE)
        if GATED:
            rows = first_row + up_rows
            up = _add_product(up, x, packed_ptr, scales_ptr, rows, mask, k0, K, BLOCK_K, ELEMENT, DTYPE)
    if HAS_BIAS:
        gate = _add_bias(gate, bias_ptr, expert, gate_rows, mask, ROWS)
        if GATED:
            up = _add_bias(up, bias_ptr, expert, up_rows, mask, ROWS)

    gate = to_float32(from_float32(gate, HIDDEN_DTYPE))
    up = to_float32(from_float32(up, HIDDEN_DTYPE))
    a = to_float32(from_float32(activate(gate, up, ACTIVATION), HIDDEN_DTYPE))  # 0 beyond the last column
    if ROTATED:
        a = rotate_rows(a)
        if RULE is None and not STATIC:
            a = to_float32(from_float32(a, HIDDEN_DTYPE))
    if RULE is not None:
        a = tl.reshape(qdq_blocks(tl.reshape(a, [BLOCK_M, BLOCK_N // 32, 32]), RULE), [BLOCK_M, BLOCK_N])
        a = to_float32(from_float32(a, HIDDEN_DTYPE))
    if STATIC:
        scale = tl.load(input_scale_ptr + expert * SCALE_STEP)
        a = to_float32(from_float32(fake_quantize_fp8(a, scale), HIDDEN_DTYPE))
    at = a_ptr + (pair * COLUMNS)[:, None] + columns[None, :]
    tl.store(at, from_float32(a, a_ptr.dtype.element_ty), mask=there[:, None] & mask[None, :])


@triton.jit(do_not_specialize=["rows"])
def project(
    x_ptr,
    x_stride,
    packed_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    order_ptr,
    block_expert_ptr,
    block_first_ptr,
    block_end_ptr,
    blocks,
    rows,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ELEMENT: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The second projection, or a linear layer: rows of ``y`` [pairs, COLUMNS] in its dtype.

    Args:
        x_ptr: quantised rows [pairs, K], ``x_stride`` apart.
        packed_ptr, scales_ptr: [E, COLUMNS, K].
        bias_ptr: [E, COLUMNS], if HAS_BIAS.
        order_ptr, block_expert_ptr, block_first_ptr, block_end_ptr: as in ``routing.Grouping``, if GROUPED; otherwise
            there is one expert and it takes all rows.
        blocks: most blocks that there may be.
        rows: pairs, if not GROUPED.
        DTYPE: of the operands.
    """
    block, n0 = _tile(blocks, COLUMNS, BLOCK_N)
    if GROUPED:
        expert = tl.load(block_expert_ptr + block).to(tl.int64)
        if expert < 0:
            return
        place = tl.load(block_first_ptr + block) + tl.arange(0, BLOCK_M)
        there = place < tl.load(block_end_ptr + block)
        pair = tl.load(order_ptr + place, mask=there, other=0).to(tl.int64)
    else:
        expert = tl.zeros([], tl.int64)
        pair = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        there = pair < rows
    columns = n0 + tl.arange(0, BLOCK_N)
    mask = columns < COLUMNS

    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x = _load_x(x_ptr, pair * x_stride, there, k0, K, BLOCK_K, DTYPE)
        rows_of_w = expert * COLUMNS + columns
        y = _add_product(y, x, packed_ptr, scales_ptr, rows_of_w, mask, k0, K, BLOCK_K, ELEMENT, DTYPE)
    if HAS_BIAS:
        y = _add_bias(y, bias_ptr, expert, columns, mask, COLUMNS)
    at = y_ptr + (pair * COLUMNS)[:, None] + columns[None, :]
    tl.store(at, from_float32(y, y_ptr.dtype.element_ty), mask=there[:, None] & mask[None, :])


@triton.jit
def sum_slots(
    y_ptr,
    row_ptr,
    router_ptr,
    out_ptr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The weighted sum of each token's rows of ``y`` float32 [R, COLUMNS], in the order of its slots.

    Args:
        row_ptr: [T * SLOTS], the row of each pair; below 0 for one that contributes nothing.
        router_ptr: float32 [T * SLOTS], what rows are multiplied by, if WEIGHTED.
        IN_PLACE: whether the row of each pair that contributes is the pair's own number, whatever ``row_ptr`` says.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < COLUMNS
    total = tl.zeros([BLOCK_N], tl.float32)
    for slot in range(0, SLOTS):
        pair = token * SLOTS + slot
        row = tl.load(row_ptr + pair).to(tl.int64)
        there = row >= 0
        y = tl.load(y_ptr + (pair if IN_PLACE else row) * COLUMNS + columns, mask=mask & there, other=0.0)
        weight = tl.load(router_ptr + pair, mask=there, other=0.0) if WEIGHTED else 1.0
        total = tl.fma(y, tl.zeros_like(y) + weight, total)  # as combine.cu
    tl.store(out_ptr + token * COLUMNS + columns, from_float32(total, out_ptr.dtype.element_ty), mask=mask)
