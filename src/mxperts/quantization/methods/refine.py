"""Choosing blocks again, each given all others: coordinate descent, a block at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from mxperts.quantization.methods.block import kernels, round_block
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
    blocks = hessian.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # [E, B, 32, B, 32]
    inner = blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).contiguous()  # [E, B, 32, 32]
    factors = damped(inner.flatten(0, 1), 0.0)[1].to(torch.float32).unflatten(0, inner.shape[:2])
    for _ in range(sweeps):
        slope = (target - values) @ hessian  # [E, N, K], minus half the gradient
        for b in range(inner.shape[1]):
            block, factor = slice(b * size, (b + 1) * size), factors[:, b]
            old = values[..., block]
            best = old + slope[..., block] @ (factor.mT @ factor)  # what the block would be if it were free
            choice = round_block(best, factor, grid.near(exponents[..., b]), grid)
            tried, scales = torch.stack([old, choice.values]), torch.stack([exponents[..., b], choice.exponents])
            new, exponents[..., b] = descend(tried, best, inner[:, b], scales, grid)
            slope -= (new - old) @ hessian[:, block]
            values[..., block] = new
    return values, exponents


def descend(values: Tensor, target: Tensor, hessian: Tensor, exponents: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Choose each element of a block again, once, given the others and the scale; of all candidates keep the best.

    Args:
        values: [C, E, N, 32], elements at the scales 2^exponents.
        target: [E, N, 32].
        hessian: [E, 32, 32].
        exponents: int64 [C, E, N].
        grid: to round to.

    Returns:
        For every row the new values [E, N, 32] and the exponent [E, N] of the first candidate with the least error.
    """
    if (gpu := kernels(target)) is not None:
        new, chosen = gpu.descend(values, target, hessian, exponents, grid.format, grid.recipe)
        return new, chosen
    values = values.clone()
    slope = (target - values) @ hessian
    for j in range(values.shape[-1]):
        old = values[..., j]
        new = grid.nearest(old + slope[..., j] / hessian[:, j, j].unsqueeze(-1), exponents)
        slope -= (new - old).unsqueeze(-1) * hessian[:, j].unsqueeze(1)
        values[..., j] = new
    best = (slope * (target - values)).sum(-1).argmin(0, keepdim=True)  # [1, E, N]
    chosen = torch.take_along_dim(exponents, best, 0)[0]
    return torch.take_along_dim(values, best.unsqueeze(-1), 0)[0], chosen
