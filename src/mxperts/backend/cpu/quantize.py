"""quantize, dequantize and fake_quantize on the CPU; results equal the reference's bit for bit."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from mxperts.backend import reference
from mxperts.backend.cpu.blocks import dequantize_at, fake_quantize_at, quantize_at
from mxperts.backend.cpu.jit import exclusive, jit, kernel, threads
from mxperts.backend.cpu.rule import BLOCK, BlockRule, block_rule
from mxperts.errors import ArgumentError
from mxperts.formats import BlockFormat, NonFinite, Recipe, Rounding

SHARE = 1024
"""Blocks that are worth a thread of their own."""


def quantize(
    x: Tensor, fmt: BlockFormat, recipe: Recipe, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 [..., P] and scales uint8 [..., ceil(K / 32)] of ``x`` [..., K].

    Stochastic rounding is the reference's: its stream of random numbers is part of the result.
    """
    if recipe.rounding is Rounding.STOCHASTIC:
        return reference.quantize(x, fmt, recipe, generator)
    _refuse(x, recipe)
    *rows, k = x.shape
    packed = torch.empty((*rows, fmt.packed_size(k)), dtype=torch.uint8)
    scales = torch.empty((*rows, fmt.blocks(k)), dtype=torch.uint8)
    blocks = scales.numel()
    if blocks:
        with exclusive():
            _quantize(_numbers(x), _row(k), _bytes(packed), _bytes(scales), block_rule(fmt, recipe), _shares(blocks))
    return packed, scales


def dequantize(packed: Tensor, scales: Tensor, fmt: BlockFormat, k: int, dtype: torch.dtype) -> Tensor:
    """Values [..., K]: element times 2^(scale - 127), in float32 and then rounded once to ``dtype``.

    In float64, which is for checks and not for speed, it is the reference's.
    """
    if dtype is torch.float64:
        return reference.dequantize(packed, scales, fmt, k, dtype)
    out = torch.empty((*packed.shape[:-1], k), dtype=dtype)
    blocks = scales.numel()
    if blocks:
        rule = block_rule(fmt, Recipe())
        with exclusive():
            _dequantize(_bytes(packed), _bytes(scales), _numbers(out), _row(k), rule, _shares(blocks))
    return out


def fake_quantize(x: Tensor, fmt: BlockFormat, recipe: Recipe, generator: torch.Generator | None = None) -> Tensor:
    """``dequantize(quantize(x))`` in the dtype of ``x``. Stochastic rounding is the reference's."""
    if recipe.rounding is Rounding.STOCHASTIC:
        return reference.fake_quantize(x, fmt, recipe, generator)
    _refuse(x, recipe)
    out = torch.empty(x.shape, dtype=x.dtype)
    *rows, k = x.shape
    blocks = math.prod(rows) * fmt.blocks(k)
    if blocks:
        with exclusive():
            _fake_quantize(_numbers(x), _numbers(out), _row(k), block_rule(fmt, recipe), blocks, _shares(blocks))
    return out


def _refuse(x: Tensor, recipe: Recipe) -> None:
    for what, policy, found in (("NaN", recipe.nan, torch.isnan), ("Inf", recipe.inf, torch.isinf)):
        if policy is NonFinite.RAISE and bool(found(x).any()):
            raise ArgumentError(f"x holds {what}, which this recipe refuses")


def _numbers(x: Tensor) -> Any:
    """The numbers in a row, as kernels take them: bfloat16 as int16, float16 as uint16."""
    x = x.detach().contiguous().view(-1)
    if x.dtype is torch.float32:
        return x.numpy()
    bits = x.view(torch.int16).numpy()
    return bits if x.dtype is torch.bfloat16 else bits.view(np.uint16)


def _bytes(x: Tensor) -> Any:
    return x.contiguous().view(-1).numpy()


def _row(k: int) -> int:
    """``k``, or 0 if rows of so many numbers are whole blocks, so that where they end makes no difference."""
    return k if k % BLOCK else 0


def _shares(blocks: int) -> int:
    """Into how many parts to divide so many blocks."""
    return 1 if blocks < 2 * SHARE else min(threads(), blocks // SHARE)


@kernel()
def _quantize(x: Any, k: int, packed: Any, scales: Any, rule: BlockRule, shares: int) -> None:
    blocks = len(scales)
    if shares == 1:
        _quantize_some(x, k, packed, scales, rule, 0, blocks)
    else:
        for i in numba.prange(shares):
            _quantize_some(x, k, packed, scales, rule, blocks * i // shares, blocks * (i + 1) // shares)


@jit
def _quantize_some(x: Any, k: int, packed: Any, scales: Any, rule: BlockRule, first: int, last: int) -> None:
    for block in range(first, last):
        at, count = _place(block, k)
        scales[block] = quantize_at(x, at, count, packed, 4 * rule.bits * block, rule)


@kernel()
def _dequantize(packed: Any, scales: Any, out: Any, k: int, rule: BlockRule, shares: int) -> None:
    blocks = len(scales)
    if shares == 1:
        _dequantize_some(packed, scales, out, k, rule, 0, blocks)
    else:
        for i in numba.prange(shares):
            _dequantize_some(packed, scales, out, k, rule, blocks * i // shares, blocks * (i + 1) // shares)


@jit
def _dequantize_some(packed: Any, scales: Any, out: Any, k: int, rule: BlockRule, first: int, last: int) -> None:
    for block in range(first, last):
        at, count = _place(block, k)
        dequantize_at(packed, 4 * rule.bits * block, scales[block], out, at, count, rule)


@kernel()
def _fake_quantize(x: Any, out: Any, k: int, rule: BlockRule, blocks: int, shares: int) -> None:
    if shares == 1:
        _fake_quantize_some(x, out, k, rule, 0, blocks)
    else:
        for i in numba.prange(shares):
            _fake_quantize_some(x, out, k, rule, blocks * i // shares, blocks * (i + 1) // shares)


@jit
def _fake_quantize_some(x: Any, out: Any, k: int, rule: BlockRule, first: int, last: int) -> None:
    for block in range(first, last):
        at, count = _place(block, k)
        fake_quantize_at(x, out, at, count, rule)


@jit
def _place(block: int, k: int) -> tuple[int, int]:
    """Where a block's numbers start and how many there are, in rows of ``k``; 0 if there are no ends of rows."""
    if k == 0:
        return BLOCK * block, BLOCK
    in_row = (k + BLOCK - 1) // BLOCK
    row, column = block // in_row, block % in_row
    return row * k + BLOCK * column, min(BLOCK, k - BLOCK * column)
