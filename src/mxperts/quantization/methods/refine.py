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

    A block's scale and codes are chosen as when it was first reached, but with all other blocks, those after it too, as
    they are. Each code of what that gives, and of what was there, is then chosen again given all others. Of the two,
    each row keeps the one with less error.

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
            scales = torch.stack([exponents[..., b], choice.exponents])  # [2, E, N]
            tried = _descend(torch.stack([old, choice.values]), best, inner, scales, grid)
            left = (((best - tried) @ inner) * (best - tried)).sum(-1)  # of the error
            better = left[1] < left[0]
            new = torch.where(better.unsqueeze(-1), tried[1], tried[0])
            exponents[..., b] = torch.where(better, scales[1], scales[0])
            slope -= (new - old) @ hessian[:, block]
            values[..., block] = new
    return values, exponents


def _descend(values: Tensor, target: Tensor, hessian: Tensor, exponents: Tensor, grid: Grid) -> Tensor:
    """``values`` [2, E, N, 32] with each element chosen again, once, given the others and the scale."""
    values = values.clone()
    slope = (target - values) @ hessian
    for j in range(values.shape[-1]):
        old = values[..., j]
        new = grid.nearest(old + slope[..., j] / hessian[:, j, j].unsqueeze(-1), exponents)
        slope -= (new - old).unsqueeze(-1) * hessian[:, j].unsqueeze(1)
        values[..., j] = new
    return values
