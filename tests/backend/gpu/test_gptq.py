"""The GPU's kernels choose what PyTorch chooses, but where two choices are as good as equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mxperts as mx
from mxperts.backend.gpu import gptq as kernels
from mxperts.formats import BLOCK_FORMATS, BlockFormat
from mxperts.quantization.methods import Inputs, Problem, gptq
from mxperts.quantization.methods.block import round_block
from mxperts.quantization.methods.error import output_error
from mxperts.quantization.methods.grid import Grid
from mxperts.quantization.methods.hessian import damped
from mxperts.quantization.methods.refine import descend

FAST = torch.cuda.is_available()
"""Whether kernels are compiled: Triton's interpreter takes seconds for one block."""
FORMATS = pytest.mark.parametrize("fmt", BLOCK_FORMATS if FAST else [mx.MXFP4, mx.MXINT8], ids=str)
EXPERTS, ROWS, CANDIDATES = (3, 70, 4) if FAST else (1, 9, 2)


def problem(fmt: BlockFormat) -> tuple[Tensor, Tensor, Tensor, Grid]:
    """A target that is part of a larger tensor, its moment, factor and grid, on the CPU."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(EXPERTS, 300, 32, generator=g)
    hessian, factor = damped(x.mT @ x / 300 + 0.2)
    target = torch.randn(EXPERTS, ROWS, 96, generator=g)[..., 32:64]
    return target, hessian.float(), factor.float(), Grid(Problem(weight=target, format=fmt))


@FORMATS
def test_rounding_a_block(fmt: BlockFormat, device: str) -> None:
    target, _, factor, grid = problem(fmt)
    exponents = grid.candidates(target)[:CANDIDATES]
    expected = round_block(target, factor, exponents, grid)
    values, errors, chosen = (
        t.cpu()
        for t in kernels.round_block(target.to(device), factor.to(device), exponents.to(device), fmt, grid.recipe)
    )  # fmt: skip
    same = (values == expected.values).all(-1)
    assert same.float().mean() > 0.97
    assert chosen[same].equal(expected.exponents[same])
    torch.testing.assert_close(errors[same], expected.errors[same], rtol=1e-4, atol=1e-4)
    assert values.equal(grid.nearest(values, chosen.unsqueeze(-1))), "values are elements"
    torch.testing.assert_close(errors.square().sum(-1), expected.errors.square().sum(-1), rtol=0.1, atol=1e-6)


@FORMATS
def test_descending(fmt: BlockFormat, device: str) -> None:
    target, hessian, _, grid = problem(fmt)
    exponents = grid.candidates(target)[:2]
    start = grid.nearest(target.expand(2, *target.shape), exponents.unsqueeze(-1))
    values, chosen = descend(start, target, hessian, exponents, grid)
    found, scales = (
        t.cpu()
        for t in kernels.descend(
            start.to(device), target.to(device), hessian.to(device), exponents.to(device), fmt, grid.recipe
        )
    )
    same = (values == found).all(-1)
    assert same.float().mean() > 0.97
    assert scales[same].equal(chosen[same])
    assert found.equal(grid.nearest(found, scales.unsqueeze(-1))), "values are elements"


@pytest.mark.gpu
@pytest.mark.skipif(not FAST, reason="there is no GPU")
@FORMATS
@pytest.mark.parametrize("k", [64, 90])
def test_a_whole_weight(fmt: BlockFormat, k: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    weight, x = torch.randn(2, 20, k, generator=g), torch.randn(2, 300, k, generator=g) @ torch.randn(k, k, generator=g)
    moment = x.mT @ x / 300

    def quantized(at: str) -> mx.MXTensor:
        inputs = Inputs(rows=300, moment=moment.to(at), cross=None, amax=x.abs().amax(-2).to(at))
        return gptq(Problem(weight=weight.to(at), format=fmt, inputs=inputs)).to("cpu")

    inputs = Inputs(rows=300, moment=moment, cross=None, amax=x.abs().amax(-2))
    expected = output_error(weight, quantized("cpu"), inputs)
    for module in ("block", "refine"):
        monkeypatch.setattr(f"mxperts.quantization.methods.{module}.kernels", lambda t: kernels)
    found = quantized(device)
    assert output_error(weight, found, inputs) == pytest.approx(expected, rel=0.05)
