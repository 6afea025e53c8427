"""Choosing blocks again, each given all others: coordinate descent, a block at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from mxperts.quantization.methods.block import round_block
from mxperts.quantization.methods.grid import Grid
from mxperts.quantization.methods.hessian import damped


def refine(
    values: Tensor, exponents: Tensor, target: Tensor, hessian: Tensor, grid: Grid, *, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Lessen the error tr((W - Ŵ) H (W - Ŵ)ᵀ) block by block; it never grows.

    A block's scale and codes are chosen as when it was first reached, but as if all other blocks, those after it too,
    were not to be changed; then each code is chosen again given all others of its block. The result replaces a row's
    block where its error is less.

    Args:
        values: Ŵ [E, N, K], elements at their scales.
        exponents: of the scales [E, N, K / 32].
        target: W [E, N, K].
        hessian: H, float32 [E, K, K], positive definite.
        grid: to round to.
        sweeps: how often to go over all blocks.

    Returns:
        New values and exponents.
    """
    values, exponents = values.clone(), exponents.clone()
    size = grid.format.block_size
    blocks = [slice(start, start + size) for start in range(0, target.shape[-1], size)]
    for _ in range(sweeps):
        slope = (target - values) @ hessian  # [E, N, K], minus half the gradient
        for b, block in enumerate(blocks):
            inner = hessian[:, block, block]  # [E, 32, 32]
            factor = damped(inner, 0.0)[1].to(torch.float32)
            old = values[..., block]
            best = old + slope[..., block] @ factor.mT @ factor  # what the block would be if it were free
            choice = round_block(best, factor, grid.near(exponents[..., b]), grid)
            new = _descend(choice.values, best, inner, choice.exponents, grid)
            better = _error(best - new, inner) < _error(best - old, inner)  # [E, N]
            new = torch.where(better.unsqueeze(-1), new, old)
            exponents[..., b] = torch.where(better, choice.exponents, exponents[..., b])
            slope -= (new - old) @ hessian[:, block]
            values[..., block] = new
    return values, exponents


def _descend(values: Tensor, target: Tensor, hessian: Tensor, exponents: Tensor, grid: Grid) -> Tensor:
    """``values`` [E, N, 32] with each element chosen again, once, given the others and the scale."""
    values = values.clone()
    slope = (target - values) @ hessian
    for j in range(values.shape[-1]):
        old = values[..., j]
        new = grid.nearest(old + slope[..., j] / hessian[:, j, j].unsqueeze(-1), exponents)
        slope -= (new - old).unsqueeze(-1) * hessian[:, j].unsqueeze(1)
        values[..., j] = new
    return values


def _error(difference: Tensor, hessian: Tensor) -> Tensor:
    """The squared error of every row, [E, N]."""
    return ((difference @ hessian) * difference).sum(-1)
