"""GPTQ's loops over the columns of one block, with a row's block in registers.

Rounding is the GPU backend's own. Sums are taken in another order than on a CPU, so that now and then a code differs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxperts.backend.gpu.elements import inverse_scale_factors, scale_factors
from mxperts.backend.gpu.qdq import at_most, round_magnitudes
from mxperts.backend.gpu.quantize import on_device
from mxperts.backend.gpu.rule import BLOCK, block_rule
from mxperts.formats import BlockFormat, Recipe

ROWS = 32
"""Rows of a program."""
WARPS = 4
_BLOCK = tl.constexpr(BLOCK)
_BIAS = tl.constexpr(127)


def round_block(
    target: Tensor, factor: Tensor, exponents: Tensor, fmt: BlockFormat, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, errors and exponents as ``round_block`` of ``mxperts.quantization.methods`` gives them.

    Args:
        target: float32 [E, N, 32], possibly a part of larger rows.
        factor: float32 [E, 32, 32], upper triangular.
        exponents: int64 [C, E, N].
        fmt, recipe: what to round to.

    Returns:
        float32 [E, N, 32] twice, and int64 [E, N].
    """
    experts, rows, _ = target.shape
    values, errors = (torch.empty(target.shape, dtype=torch.float32, device=target.device) for _ in range(2))
    chosen = torch.empty((experts, rows), dtype=torch.int64, device=target.device)
    with on_device(target):
        _round_block[(triton.cdiv(rows, ROWS), experts)](
            target, factor.contiguous(), exponents.contiguous(), values, errors, chosen,
            rows, target.stride(0), target.stride(1), block_rule(fmt, recipe), len(exponents), ROWS, num_warps=WARPS,
        )  # fmt: skip
    return values, errors, chosen


def descend(
    values: Tensor, target: Tensor, hessian: Tensor, exponents: Tensor, fmt: BlockFormat, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Values and exponents as ``descend`` of ``mxperts.quantization.methods`` gives them.

    Args:
        values: float32 [C, E, N, 32].
        target: float32 [E, N, 32].
        hessian: float32 [E, 32, 32].
        exponents: int64 [C, E, N].
        fmt, recipe: what to round to.

    Returns:
        float32 [E, N, 32] and int64 [E, N].
    """
    _, experts, rows, _ = values.shape
    out = torch.empty(target.shape, dtype=torch.float32, device=target.device)
    chosen = torch.empty((experts, rows), dtype=torch.int64, device=target.device)
    with on_device(target):
        _descend[(triton.cdiv(rows, ROWS), experts)](
            values.contiguous(), target.contiguous(), hessian.contiguous(), exponents.contiguous(), out, chosen,
            rows, block_rule(fmt, recipe), len(values), ROWS, num_warps=WARPS,
        )  # fmt: skip
    return out, chosen


@triton.jit
def _nearest(x, exponents, RULE: tl.constexpr):
    """``x``, float32 [ROWS], rounded to elements at the scales 2^exponents, int32 [ROWS]."""
    scaled = x * inverse_scale_factors(exponents + _BIAS)
    limit = tl.where(x < 0, RULE.least, RULE.largest)
    rounded = round_magnitudes(at_most(tl.abs(scaled), limit), RULE)
    return tl.where(x < 0, -rounded, rounded) * scale_factors(exponents + _BIAS)


@triton.jit
def _column(x, j):
    """Column ``j`` of ``x`` [ROWS, 32]."""
    return tl.sum(tl.where(tl.arange(0, _BLOCK)[None, :] == j, x, 0.0), axis=1)


@triton.jit
def _round_block(
    target_ptr, factor_ptr, exponents_ptr, values_ptr, errors_ptr, chosen_ptr,
    rows, expert_stride, row_stride, RULE: tl.constexpr, CANDIDATES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert, experts = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, _BLOCK)
    exists = row < rows
    at = expert * expert_stride + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    target = tl.load(target_ptr + at, mask=exists[:, None], other=0.0)
    factor_ptr += expert * (_BLOCK * _BLOCK)
    place = expert * rows + row  # in tensors of one number a row

    least = tl.full([ROWS], float("inf"), tl.float32)
    best_values, best_errors = tl.zeros([ROWS, _BLOCK], tl.float32), tl.zeros([ROWS, _BLOCK], tl.float32)
    best_exponents = tl.load(exponents_ptr + place, mask=exists, other=0).to(tl.int32)
    for c in range(CANDIDATES):
        index = experts.to(tl.int64) * rows * c + place
        exponents = tl.load(exponents_ptr + index, mask=exists, other=0).to(tl.int32)
        rest = target
        values, errors = tl.zeros([ROWS, _BLOCK], tl.float32), tl.zeros([ROWS, _BLOCK], tl.float32)
        loss = tl.zeros([ROWS], tl.float32)
        for j in range(_BLOCK):
            wanted = _column(rest, j)
            value = _nearest(wanted, exponents, RULE)
            error = (wanted - value) / tl.load(factor_ptr + j * (_BLOCK + 1))
            rest -= error[:, None] * tl.load(factor_ptr + j * _BLOCK + column)[None, :]
            here = (column == j)[None, :]
            values = tl.where(here, value[:, None], values)
            errors = tl.where(here, error[:, None], errors)
            loss += error * error
        better = loss < least
        least = tl.where(better, loss, least)
        first_or_better = (better | (c == 0))[:, None]
        best_values = tl.where(first_or_better, values, best_values)
        best_errors = tl.where(first_or_better, errors, best_errors)
        best_exponents = tl.where(better, exponents, best_exponents)
    at = place[:, None] * _BLOCK + column[None, :]
    tl.store(values_ptr + at, best_values, mask=exists[:, None])
    tl.store(errors_ptr + at, best_errors, mask=exists[:, None])
    tl.store(chosen_ptr + place, best_exponents.to(tl.int64), mask=exists)


@triton.jit
def _descend(
    values_ptr, target_ptr, hessian_ptr, exponents_ptr, out_ptr, chosen_ptr,
    rows, RULE: tl.constexpr, CANDIDATES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert, experts = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, _BLOCK)
    exists = row < rows
    place = expert * rows + row
    at = place[:, None] * _BLOCK + column[None, :]
    target = tl.load(target_ptr + at, mask=exists[:, None], other=0.0)
    hessian_ptr += expert * (_BLOCK * _BLOCK)

    least = tl.full([ROWS], float("inf"), tl.float32)
    best_values = tl.zeros([ROWS, _BLOCK], tl.float32)
    best_exponents = tl.zeros([ROWS], tl.int32)
    for c in range(CANDIDATES):
        before = experts.to(tl.int64) * rows * c
        exponents = tl.load(exponents_ptr + before + place, mask=exists, other=0).to(tl.int32)
        values = tl.load(values_ptr + before * _BLOCK + at, mask=exists[:, None], other=0.0)
        slope = tl.zeros([ROWS, _BLOCK], tl.float32)
        for j in range(_BLOCK):
            slope += _column(target - values, j)[:, None] * tl.load(hessian_ptr + j * _BLOCK + column)[None, :]
        for j in range(_BLOCK):
            old = _column(values, j)
            value = _nearest(old + _column(slope, j) / tl.load(hessian_ptr + j * (_BLOCK + 1)), exponents, RULE)
            slope -= (value - old)[:, None] * tl.load(hessian_ptr + j * _BLOCK + column)[None, :]
            values = tl.where((column == j)[None, :], value[:, None], values)
        left = tl.sum(slope * (target - values), axis=1)
        better = (left < least) | (c == 0)
        least = tl.where(better, left, least)
        best_values = tl.where(better[:, None], values, best_values)
        best_exponents = tl.where(better, exponents, best_exponents)
    tl.store(out_ptr + at, best_values, mask=exists[:, None])
    tl.store(chosen_ptr + place, best_exponents.to(tl.int64), mask=exists)
