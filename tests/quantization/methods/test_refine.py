"""Sweeps over blocks: each lessens the error, until none can."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mxperts.formats import BLOCK_FORMATS, BlockFormat
from mxperts.quantization.methods import Problem
from mxperts.quantization.methods.grid import Grid
from mxperts.quantization.methods.refine import refine


def error(values: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """Of every row, float64."""
    d = (target - values).double()
    return ((d @ hessian.double()) * d).sum(-1)


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_every_sweep_lessens_the_error_of_every_row(fmt: BlockFormat) -> None:
    g = torch.Generator().manual_seed(0)
    target, x = torch.randn(2, 6, 96, generator=g), torch.randn(2, 300, 96, generator=g)
    hessian = x.mT @ x / 300 + 0.2
    grid = Grid(Problem(weight=target, format=fmt))
    exponents = grid.exponents(target.unflatten(-1, (-1, 32)))
    start = grid.nearest(target, exponents.repeat_interleave(32, -1))
    errors, values = [error(start, target, hessian)], start
    for sweeps in (1, 2, 8, 9):
        values, scales = refine(start, exponents, target, hessian, grid, sweeps=sweeps)
        assert values.equal(grid.nearest(values, scales.repeat_interleave(32, -1))), "values are elements"
        errors.append(error(values, target, hessian))
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-6)).all()
    assert errors[1].sum() < 0.8 * errors[0].sum()
    assert start.equal(grid.nearest(target, exponents.repeat_interleave(32, -1))), "what it is given stays as it is"


def test_no_single_code_can_then_be_bettered() -> None:
    g = torch.Generator().manual_seed(1)
    target, x = torch.randn(1, 4, 32, generator=g), torch.randn(100, 32, generator=g)
    hessian = (x.mT @ x / 100 + 0.2)[None]
    grid = Grid(Problem(weight=target, format=BLOCK_FORMATS[0]))
    exponents = grid.exponents(target.unflatten(-1, (-1, 32)))
    start = grid.nearest(target, exponents.repeat_interleave(32, -1))
    values, scales = refine(start, exponents, target, hessian, grid, sweeps=20)
    least = error(values, target, hessian)
    elements = torch.tensor(BLOCK_FORMATS[0].element.values)
    for j in range(32):
        for element in elements:
            other = values.clone()
            other[..., j] = element * 2.0 ** scales[..., 0]
            assert (error(other, target, hessian) >= least * (1 - 1e-6)).all()
