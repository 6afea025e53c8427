"""One block's codes, chosen one after the other, each error passed on to the codes still to come."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from mxperts.quantization.methods.grid import Grid


@dataclass(frozen=True, eq=False, kw_only=True)
class Choice:
    """What ``round_block`` chose.

    Attributes:
        values: [E, N, 32], elements at their scale.
        errors: [E, N, 32], what is to be passed on to later blocks: through the rows of the factor.
        exponents: of the scales, int64 [E, N].
    """

    values: Tensor
    errors: Tensor
    exponents: Tensor


def round_block(target: Tensor, factor: Tensor, exponents: Tensor, grid: Grid) -> Choice:
    """Round the columns of a block from left to right, each after the errors of those before it were made up for.

    Args:
        target: [E, N, 32].
        factor: [E, 32, 32], the block of the upper triangular U for which UᵀU is the inverse of the moment.
        exponents: [C, E, N]: all are tried, and of every row the first with the least error is kept. The error is the
            squared error of the output that is left when all later columns, of later blocks too, make up for it.
        grid: to round to.
    """
    if (gpu := kernels(target)) is not None:
        values, errors, chosen = gpu.round_block(target, factor, exponents, grid.format, grid.recipe)
        return Choice(values=values, errors=errors, exponents=chosen)
    rest = target.expand(len(exponents), *target.shape).clone()  # [C, E, N, 32]
    values, errors = torch.empty_like(rest), torch.empty_like(rest)
    for j in range(target.shape[-1]):
        column = rest[..., j]
        values[..., j] = grid.nearest(column, exponents)
        errors[..., j] = (column - values[..., j]) / factor[:, j, j].unsqueeze(-1)
        rest[..., j + 1 :] -= errors[..., j, None] * factor[:, None, j, j + 1 :]
    best = errors.square().sum(-1).argmin(0, keepdim=True)  # [1, E, N]
    return Choice(
        values=torch.take_along_dim(values, best.unsqueeze(-1), 0)[0],
        errors=torch.take_along_dim(errors, best.unsqueeze(-1), 0)[0],
        exponents=torch.take_along_dim(exponents, best, 0)[0],
    )


def kernels(t: Tensor) -> ModuleType | None:
    """The kernels that do this on the device of ``t``; None where there are none, and PyTorch does it, much slower."""
    if not t.is_cuda or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("mxperts.backend.gpu.gptq")
