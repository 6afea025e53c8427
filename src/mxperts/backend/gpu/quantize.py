"""quantize, dequantize and fake_quantize in Triton; results equal the reference's bit for bit."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxperts.backend import reference
from mxperts.backend.gpu.convert import INTERPRET, from_float32, to_float32
from mxperts.backend.gpu.elements import decode_codes, scale_factors
from mxperts.backend.gpu.packing import load_codes, store_codes
from mxperts.backend.gpu.qdq import fake_quantize_fp8, fp8_scale_of, qdq_blocks, quantize_blocks
from mxperts.backend.gpu.rotation import rotate_blocks, rotate_rows
from mxperts.backend.gpu.rule import BLOCK, BlockRule, block_rule, element_rule
from mxperts.backend.reference import fp8
from mxperts.errors import ArgumentError
from mxperts.formats import BlockFormat, NonFinite, Recipe, Rounding

WARPS = 4
"""Warps of a program."""
LOADS = 4
"""16-byte loads that a thread has in flight."""
PIECES = 4
"""Of a block that is quantised: a thread then has it whole, or half, and does little twice."""
MOST_COLUMNS = 8192
"""Of a token that a program keeps in registers; more are read twice."""

_BLOCK = tl.constexpr(BLOCK)


def quantize(
    x: Tensor, fmt: BlockFormat, recipe: Recipe, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 [..., P] and scales uint8 [..., ceil(K / 32)] of ``x`` [..., K].

    Stochastic rounding is the reference's: its stream of random numbers is part of the result. Nothing waits for the
    GPU unless the recipe refuses NaN or Inf.
    """
    if recipe.rounding is Rounding.STOCHASTIC:
        return reference.quantize(x, fmt, recipe, generator)
    _refuse(x, recipe)
    *shape, k = x.shape
    packed = torch.empty((*shape, fmt.packed_size(k)), dtype=torch.uint8, device=x.device)
    scales = torch.empty((*shape, fmt.blocks(k)), dtype=torch.uint8, device=x.device)
    blocks = scales.numel()
    if blocks:
        rows, count = _rows(x), blocks_per_program(blocks, 2)
        with on_device(x):
            _quantize[(triton.cdiv(blocks, count),)](
                rows, packed, scales, blocks, k, rows.stride(0), block_rule(fmt, recipe), _whole(rows), count, PIECES,
                num_warps=WARPS,
            )  # fmt: skip
    return packed, scales


def dequantize(packed: Tensor, scales: Tensor, fmt: BlockFormat, k: int, dtype: torch.dtype) -> Tensor:
    """Values [..., K]: element times 2^(scale - 127), in float32 and then rounded once to ``dtype``.

    In float64, which is for checks and not for speed, it is the reference's.
    """
    if dtype is torch.float64:
        return reference.dequantize(packed, scales, fmt, k, dtype)
    out = torch.empty((*packed.shape[:-1], k), dtype=dtype, device=packed.device)
    blocks = scales.numel()
    if blocks:
        count = blocks_per_program(blocks, out.element_size())
        with on_device(out):
            _dequantize[(triton.cdiv(blocks, count),)](
                packed.contiguous(), scales.contiguous(), out, blocks, k, element_rule(fmt), k % BLOCK == 0, count,
                num_warps=WARPS,
            )  # fmt: skip
    return out


def fake_quantize(x: Tensor, fmt: BlockFormat, recipe: Recipe, generator: torch.Generator | None = None) -> Tensor:
    """``dequantize(quantize(x))`` in the dtype of ``x``. Stochastic rounding is the reference's."""
    if recipe.rounding is Rounding.STOCHASTIC:
        return reference.fake_quantize(x, fmt, recipe, generator)
    _refuse(x, recipe)
    return qdq_input(x, block_rule(fmt, recipe), rotated=False)


def qdq_input(x: Tensor, rule: BlockRule | None, *, rotated: bool) -> Tensor:
    """``x`` [..., K] in its dtype, rotated first if it is to be, then quantised and dequantised by a rule, if any."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        rows, k = _rows(x), x.shape[-1]
        blocks = rows.shape[0] * triton.cdiv(k, BLOCK)
        count = blocks_per_program(blocks, x.element_size())
        with on_device(x):
            _fake_quantize[(triton.cdiv(blocks, count),)](
                rows, out, blocks, k, rows.stride(0), rule, _whole(rows), count, rotated,
                num_warps=WARPS,
            )  # fmt: skip
    return out


def fake_quantize_fp8_static(x: Tensor, scale: Tensor, *, rotated: bool = False) -> Tensor:
    """``q * scale`` with ``q`` the E4M3 number nearest to ``x / scale``, ties to even, in the dtype of ``x``.

    Args:
        x: [..., K].
        scale: float32, above 0, broadcast against ``x``. One that differs along the last dimension is left to the
            reference.
        rotated: whether ``x`` is to be rotated first; K is then a multiple of 32.

    Returns:
        Beyond ±448 * scale, Inf included, values saturate; NaN stays NaN; zeros keep their sign.
    """
    if scale.numel() != 1 and scale.shape[-1] != 1:
        return fp8.fake_quantize_static(x, scale)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x = x.contiguous()
    if scale.numel() == 1:
        scale, run = scale.reshape(1), x.numel()
    else:
        scale, run = scale.expand(*x.shape[:-1], 1).reshape(-1), x.shape[-1]
    count = min(triton.next_power_of_2(run), BLOCK * blocks_per_program(-(-x.numel() // BLOCK), x.element_size()))
    chunks = triton.cdiv(run, count)
    with on_device(x):
        _fake_quantize_fp8_static[(scale.numel() * chunks,)](
            x, scale, out, run, chunks, count, rotated, num_warps=WARPS
        )
    return out


def fake_quantize_fp8_dynamic(x: Tensor, *, rotated: bool = False) -> Tensor:
    """As ``fake_quantize_fp8_static``, with one scale a token: amax / 448 over the last dimension, in float32.

    A scale of 0, that of zeros or of a token within 2^-141 of them, counts as 1 and gives zeros. A NaN or an Inf makes
    the whole token NaN: there is no scale for it.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        tokens, k = _rows(x), x.shape[-1]
        few = BLOCK * blocks_per_program(-(-x.numel() // BLOCK), x.element_size())
        columns = min(triton.next_power_of_2(k), MOST_COLUMNS)
        rows = min(max(few // columns, 1), triton.next_power_of_2(tokens.shape[0]))
        with on_device(x):
            _fake_quantize_fp8_dynamic[(triton.cdiv(tokens.shape[0], rows),)](
                tokens, out, tokens.shape[0], k, tokens.stride(0), rows, columns, triton.cdiv(k, columns), rotated,
                num_warps=WARPS if columns <= few else 2 * WARPS,
            )  # fmt: skip
    return out


def blocks_per_program(blocks: int, element_size: int) -> int:
    """Blocks of 32 that one program takes: a power of two.

    Args:
        blocks: of the whole tensor.
        element_size: bytes of one of its unpacked values.
    """
    if INTERPRET.value:  # where a program costs more than what it computes
        return min(4096, int(triton.next_power_of_2(blocks)))
    return WARPS * 32 * LOADS * 16 // (BLOCK * element_size)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the device of ``x``, whichever is current."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def _refuse(x: Tensor, recipe: Recipe) -> None:
    for what, policy, found in (("NaN", recipe.nan, torch.isnan), ("Inf", recipe.inf, torch.isinf)):
        if policy is NonFinite.RAISE and bool(found(x).any()):
            raise ArgumentError(f"x holds {what}, which this recipe refuses")


def _rows(x: Tensor) -> Tensor:
    """``x`` as [rows, K], each row contiguous; copied only if that needs a copy."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _whole(rows: Tensor) -> bool:
    """Whether a tensor is nothing but whole blocks, one after the other."""
    return rows.shape[1] % BLOCK == 0 and rows.is_contiguous()


@triton.jit
def _place(blocks, k, row_stride, WHOLE: tl.constexpr, COUNT: tl.constexpr, PIECES: tl.constexpr):
    """Which blocks a program has, and where their numbers are.

    Triton gives a thread 16 bytes of a block's piece, and those of all its pieces: with four, all or half of the block.

    Returns:
        The first block, int64; [COUNT] which of those from there on exist; what is to be added to the address of the
        tensor for the first of them; from there, the offsets [COUNT, PIECES, 32 / PIECES] of their numbers; and which
        numbers exist.
    """
    width: tl.constexpr = _BLOCK // PIECES
    first = tl.program_id(0).to(tl.int64) * COUNT
    block = tl.arange(0, COUNT)
    exists = block < blocks - first
    within = (tl.arange(0, PIECES) * width)[None, :, None] + tl.arange(0, width)[None, None, :]
    if WHOLE:
        return first, exists, first * _BLOCK, block[:, None, None] * _BLOCK + within, exists[:, None, None]
    else:
        in_row = (k + _BLOCK - 1) // _BLOCK
        row = (first + block) // in_row
        column = ((first + block) - row * in_row) * _BLOCK
        mask = exists[:, None, None] & (column[:, None, None] + within < k)
        return first, exists, 0, (row * row_stride + column)[:, None, None] + within, mask


@triton.jit
def _quantize(
    x_ptr, packed_ptr, scales_ptr, blocks, k, row_stride,
    RULE: tl.constexpr, WHOLE: tl.constexpr, COUNT: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    ELEMENT: tl.constexpr = RULE.element
    first, exists, start, offsets, mask = _place(blocks, k, row_stride, WHOLE, COUNT, PIECES)
    x = tl.load(x_ptr + start + offsets, mask=mask, other=0.0)
    x = to_float32(tl.reshape(x, [COUNT, _BLOCK]))
    codes, scales = quantize_blocks(x, RULE)
    block = tl.arange(0, COUNT)
    store_codes(packed_ptr + first * (_BLOCK * ELEMENT.bits // 8), codes, block, exists, ELEMENT)
    tl.store(scales_ptr + first + block, scales.to(tl.uint8), mask=exists)


@triton.jit
def _dequantize(
    packed_ptr, scales_ptr, out_ptr, blocks, k, ELEMENT: tl.constexpr, WHOLE: tl.constexpr, COUNT: tl.constexpr
):
    first, exists, start, offsets, mask = _place(blocks, k, k, WHOLE, COUNT, 1)
    block = tl.arange(0, COUNT)
    packed_ptr += first * (_BLOCK * ELEMENT.bits // 8)
    codes = load_codes(packed_ptr, block, exists, 0, _BLOCK // ELEMENT.pack_elements, _BLOCK, ELEMENT)
    scales = tl.load(scales_ptr + first + block, mask=exists, other=0).to(tl.int32)
    values = decode_codes(codes, ELEMENT) * scale_factors(scales)[:, None]
    tl.store(out_ptr + start + offsets, from_float32(values, out_ptr.dtype.element_ty)[:, None, :], mask=mask)


@triton.jit
def _fake_quantize(
    x_ptr, out_ptr, blocks, k, row_stride,
    RULE: tl.constexpr, WHOLE: tl.constexpr, COUNT: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    at = _place(blocks, k, row_stride, WHOLE, COUNT, 1)
    x = to_float32(tl.load(x_ptr + at[2] + at[3], mask=at[4], other=0.0))
    if ROTATED:
        x = tl.reshape(rotate_blocks(tl.reshape(x, [COUNT, _BLOCK])), [COUNT, 1, _BLOCK])
    if RULE is not None:
        x = qdq_blocks(x, RULE)
    values = from_float32(x, out_ptr.dtype.element_ty)
    at = _place(blocks, k, k, WHOLE, COUNT, 1)  # without the gaps that there may be between rows of x
    tl.store(out_ptr + at[2] + at[3], values, mask=at[4])


@triton.jit
def _fake_quantize_fp8_static(x_ptr, scale_ptr, out_ptr, run, chunks, COUNT: tl.constexpr, ROTATED: tl.constexpr):
    """Numbers in runs that share a scale; a program takes COUNT of them, or what is left of its run."""
    program = tl.program_id(0).to(tl.int64)
    group = program // chunks
    start = (program - group * chunks) * COUNT
    columns = tl.arange(0, COUNT)
    mask = columns < run - start
    at = group * run + start
    x = to_float32(tl.load(x_ptr + at + columns, mask=mask, other=0.0))
    if ROTATED:
        x = tl.reshape(rotate_blocks(tl.reshape(x, [COUNT // _BLOCK, _BLOCK])), [COUNT])
    values = fake_quantize_fp8(x, tl.load(scale_ptr + group))
    tl.store(out_ptr + at + columns, from_float32(values, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fake_quantize_fp8_dynamic(
    x_ptr, out_ptr, tokens, k, row_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Whole tokens; long ones are read once for the largest magnitude and once, from the cache, to be rounded.

    Magnitudes are compared as integers: there NaN is above Inf.
    """
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = (token < tokens)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    x_at, out_at = x_ptr + (token * row_stride)[:, None] + columns, out_ptr + (token * k)[:, None] + columns
    out_type: tl.constexpr = out_ptr.dtype.element_ty
    if CHUNKS == 1:
        mask = exists & (columns < k)
        x = to_float32(tl.load(x_at, mask=mask, other=0.0))
        if ROTATED:
            x = rotate_rows(x)
        scale = fp8_scale_of(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1))[:, None]
        tl.store(out_at, from_float32(fake_quantize_fp8(x, scale), out_type), mask=mask)
        return
    amax = tl.zeros([ROWS], tl.int32)
    for chunk in range(0, CHUNKS):
        start = chunk * COLUMNS
        x = to_float32(tl.load(x_at + start, mask=exists & (columns < k - start), other=0.0))
        if ROTATED:
            x = rotate_rows(x)
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        amax = tl.maximum(amax, tl.max(magnitude, axis=1))
    scale = fp8_scale_of(amax)[:, None]
    for chunk in range(0, CHUNKS):
        start = chunk * COLUMNS
        mask = exists & (columns < k - start)
        x = to_float32(tl.load(x_at + start, mask=mask, other=0.0))
        if ROTATED:
            x = rotate_rows(x)
        tl.store(out_at + start, from_float32(fake_quantize_fp8(x, scale), out_type), mask=mask)
