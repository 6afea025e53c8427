"""The best shared scale of every block, all else being round-to-nearest."""

from __future__ import annotations

import torch

from mxperts.quantization.methods.grid import Grid
from mxperts.quantization.methods.problem import Problem, operands
from mxperts.tensor import MXTensor


def scale_search(problem: Problem) -> MXTensor:
    """Round to nearest at the scale, among the scale rule's own and its neighbours, that makes the least error.

    Without inputs that is the squared error of the block's weights, else the squared error that the block alone makes
    in the layer's output.
    """
    weight, moment, _ = operands(problem)
    grid, size = Grid(problem), problem.format.block_size
    blocks = weight.unflatten(-1, (-1, size))  # [E, N, B, 32]
    moments = moment.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # [E, B, 32, B, 32]
    moments = moments.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # [E, B, 32, 32]
    best, least = torch.zeros_like(blocks), torch.full(blocks.shape[:-1], torch.inf, device=weight.device)
    chosen = torch.zeros_like(least, dtype=torch.int64)
    for exponent in grid.candidates(blocks):  # [E, N, B]
        values = grid.nearest(blocks, exponent.unsqueeze(-1))
        error = blocks - values
        loss = (torch.einsum("enbi,ebij->enbj", error, moments) * error).sum(-1)
        better = loss < least
        least = torch.where(better, loss, least)
        chosen = torch.where(better, exponent, chosen)
        best = torch.where(better.unsqueeze(-1), values, best)
    return grid.tensor(best.flatten(-2), chosen, problem.weight.shape)
