"""GPTQ for MX blocks: codes that make up for each other's errors in the layer's output.

The error of a layer is tr((W - Ŵ) H (W - Ŵ)ᵀ), H the moment of its inputs. Columns are rounded one after the other, and
the error of each is passed on to those not yet rounded, as far as they can make up for it. A block's shared scale is
chosen when the block is reached, from what the weights have become by then: all candidates are carried through the
block, and the one is kept that leaves the least error. When all blocks have been visited, ``refine`` goes over them
again.

Source: Frantar et al., GPTQ, arXiv 2210.17323; activation order inside the bounds of blocks as in Egiazarian et al.,
MR-GPTQ, arXiv 2509.23202.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxperts.quantization.methods.block import round_block
from mxperts.quantization.methods.grid import Grid
from mxperts.quantization.methods.hessian import damped, moved
from mxperts.quantization.methods.problem import Problem, operands
from mxperts.quantization.methods.refine import refine
from mxperts.quantization.methods.scale_search import scale_search
from mxperts.tensor import MXTensor

SWEEPS = 2
"""How often all blocks are chosen again after the first time, each given all others."""


def gptq(problem: Problem, *, sweeps: int = SWEEPS) -> MXTensor:
    """Quantise a weight, or a stack of weights, to the least error of the output over the calibration text.

    Where the layer reads quantised activations x̂, the output that is aimed at is still that of x: the weight is first
    moved to where the layer comes nearest to it, and what is quantised is that.

    Without inputs, ``scale_search``.
    """
    if problem.inputs is None:
        return scale_search(problem)
    weight, moment, cross = operands(problem)  # [E, N, K], [E, K, K]
    order = _order(moment, problem.format.block_size)  # [E, K]
    hessian, factor = damped(_permute(moment, order, order))
    target = _permute(weight if cross is None else moved(weight, moment, cross), None, order)
    hessian, factor = hessian.to(torch.float32), factor.to(torch.float32)

    grid = Grid(problem)
    values, exponents = _visit(target, factor, grid)
    values, exponents = refine(values, exponents, target, hessian, grid, sweeps=sweeps)

    back = order.argsort(dim=-1)
    block = order[:, :: problem.format.block_size] // problem.format.block_size  # [E, B], which blocks stand where
    values, exponents = _permute(values, None, back), _permute(exponents, None, block.argsort(dim=-1))
    return grid.tensor(values, exponents, problem.weight.shape)


def _visit(target: Tensor, factor: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Values [E, N, K] and exponents [E, N, K / 32], block after block."""
    size = grid.format.block_size
    rest = target.clone()
    chosen = []
    for start in range(0, target.shape[-1], size):
        block, later = slice(start, start + size), slice(start + size, None)
        choice = round_block(rest[..., block], factor[:, block, block], grid.candidates(rest[..., block]), grid)
        rest[..., later] -= choice.errors @ factor[:, block, later]
        chosen.append(choice)
    return torch.cat([c.values for c in chosen], dim=-1), torch.stack([c.exponents for c in chosen], dim=-1)


def _order(moment: Tensor, size: int) -> Tensor:
    """Which channel comes when, int64 [E, K]: blocks with the largest inputs first, and so inside every block."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, size))  # [E, B, 32]
    inside = diagonal.argsort(dim=-1, descending=True, stable=True)
    blocks = diagonal.sum(-1).argsort(dim=-1, descending=True, stable=True).unsqueeze(-1)  # [E, B, 1]
    order: Tensor = blocks * size + torch.take_along_dim(inside, blocks, 1)
    return order.flatten(-2)


def _permute(t: Tensor, rows: Tensor | None, columns: Tensor) -> Tensor:
    """``t`` [E, N, K] with rows and columns in the order given, each [E, N] or [E, K]."""
    if rows is not None:
        t = torch.take_along_dim(t, rows.unsqueeze(-1), 1)
    return torch.take_along_dim(t, columns.unsqueeze(1), 2)
