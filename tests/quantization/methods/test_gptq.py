"""GPTQ for MX blocks, against a slow one that solves for all remaining weights after every column."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mxperts as mx
from mxperts.formats import BLOCK_FORMATS, SCALE_BIAS, BlockFormat
from mxperts.quantization.methods import Inputs, Problem, gptq, rtn, scale_search
from mxperts.quantization.methods.error import output_error
from mxperts.quantization.methods.grid import STEPS
from mxperts.quantization.methods.hessian import DAMPING

Draw = Callable[..., tuple[Tensor, Tensor]]
MakeInputs = Callable[..., Inputs]
FORMATS = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)


def textbook(row: Tensor, moment: Tensor, fmt: BlockFormat) -> Tensor:
    """GPTQ of one row, float64 [K]: after every column that is fixed, all that are free take their best values.

    No Cholesky factor and no updates: the best values of the free columns F, given that the fixed ones X are off by d,
    are w_F + H_FF⁻¹ H_FX d.
    """
    k = len(row)
    h = moment.double() + DAMPING * moment.diagonal().double().mean() * torch.eye(k)
    diagonal = moment.diagonal()
    blocks = sorted(range(k // 32), key=lambda b: -float(diagonal[32 * b : 32 * b + 32].sum()))
    order = [j for b in blocks for j in sorted(range(32 * b, 32 * b + 32), key=lambda j: -float(diagonal[j]))]
    elements = torch.tensor([v for v in fmt.element.values if -fmt.element.max <= v <= fmt.element.max]).double()

    def free(values: Tensor, fixed: list[int]) -> Tensor:
        left = [j for j in range(k) if j not in fixed]
        best = row.double().clone()
        if fixed and left:
            best[left] += torch.linalg.solve(h[left][:, left], h[left][:, fixed] @ (row.double() - values)[fixed])
        return best

    def remaining(values: Tensor, fixed: list[int]) -> float:
        best = free(values, fixed)
        best[fixed] = values[fixed]
        return float((row.double() - best) @ h @ (row.double() - best))

    values, fixed = torch.zeros(k).double(), list[int]()
    for block in (order[i : i + 32] for i in range(0, k, 32)):
        start = int(mx.quantize(free(values, fixed)[sorted(block)].float(), fmt).scales) - SCALE_BIAS
        tried = []
        for step in STEPS:
            mine, done = values.clone(), list(fixed)
            for j in block:
                target = free(mine, done)[j]
                mine[j] = elements[(elements * 2.0 ** (start + step) - target).abs().argmin()] * 2.0 ** (start + step)
                done.append(j)
            tried.append((remaining(mine, done), mine))
        values = min(tried, key=lambda t: t[0])[1]
        fixed += block
    return values


@FORMATS
def test_it_is_the_textbooks(fmt: BlockFormat, draw: Draw, make_inputs: MakeInputs) -> None:
    weight, x = draw(3, 64, seed=3)
    inputs = make_inputs(x)
    found = mx.dequantize(gptq(Problem(weight=weight, format=fmt, inputs=inputs), sweeps=0), torch.float64)
    for row, values in zip(weight, found, strict=True):
        assert values.equal(textbook(row, inputs.moment, fmt))


@FORMATS
@pytest.mark.parametrize("k", [64, 90])
def test_without_correlations_it_is_a_scale_search(fmt: BlockFormat, k: int, draw: Draw) -> None:
    weight, _ = draw(16, k)
    white = Inputs(rows=9, moment=2 * torch.eye(k), cross=None, amax=torch.ones(k))
    found = gptq(Problem(weight=weight, format=fmt, inputs=white))
    searched = scale_search(Problem(weight=weight, format=fmt))
    assert found.packed.equal(searched.packed)
    assert found.scales.equal(searched.scales)


@FORMATS
@pytest.mark.parametrize("k", [32, 64, 90])
def test_its_output_is_nearer_than_that_of_round_to_nearest(
    fmt: BlockFormat, k: int, draw: Draw, make_inputs: MakeInputs
) -> None:
    weight, x = draw(16, k, seed=k)
    problem = Problem(weight=weight.bfloat16(), format=fmt, inputs=make_inputs(x))
    assert problem.inputs is not None
    plain, once, twice = (
        output_error(problem.weight, t, problem.inputs)
        for t in (rtn(problem), gptq(problem, sweeps=0), gptq(problem, sweeps=2))
    )
    assert once < 0.7 * plain
    assert twice <= once * 1.001  # sweeps lessen the damped error


@FORMATS
def test_where_activations_are_quantised_it_aims_at_the_output_without(
    fmt: BlockFormat, draw: Draw, make_inputs: MakeInputs
) -> None:
    weight, x = draw(16, 64, seed=5, rows=4000)
    inputs = make_inputs(x, mx.fake_quantize(x, mx.MXFP4))
    blind = Inputs(rows=inputs.rows, moment=inputs.moment, cross=None, amax=inputs.amax)
    aware, unaware = (gptq(Problem(weight=weight, format=fmt, inputs=i)) for i in (inputs, blind))
    assert output_error(weight, aware, inputs) < output_error(weight, unaware, inputs)


def test_a_stack_is_its_layers(draw: Draw, make_inputs: MakeInputs) -> None:
    layers = [draw(8, 70, seed=s) for s in range(3)]
    weight, x = (torch.stack(t) for t in zip(*layers, strict=True))
    read = mx.fake_quantize(x, mx.MXFP6_E2M3)
    together = gptq(Problem(weight=weight, format=mx.MXFP4, inputs=make_inputs(x, read)))
    assert together.shape == (3, 8, 70)
    for e in range(3):
        alone = gptq(Problem(weight=weight[e], format=mx.MXFP4, inputs=make_inputs(x[e], read[e])))
        assert together[e].scales.equal(alone.scales)
        assert together[e].packed.equal(alone.packed)


def test_it_gives_the_same_twice(draw: Draw, make_inputs: MakeInputs) -> None:
    weight, x = draw(8, 96)
    problem = Problem(weight=weight, format=mx.MXFP4, inputs=make_inputs(x))
    assert gptq(problem).packed.equal(gptq(problem).packed)


@FORMATS
def test_channels_without_inputs_are_rounded_to_nearest(fmt: BlockFormat, draw: Draw, make_inputs: MakeInputs) -> None:
    weight, x = draw(8, 64)
    x[:, 32:] = 0
    found = mx.dequantize(gptq(Problem(weight=weight, format=fmt, inputs=make_inputs(x))), torch.float32)
    searched = mx.dequantize(scale_search(Problem(weight=weight, format=fmt)), torch.float32)
    assert found[:, 32:].equal(searched[:, 32:])


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_few_inputs_are_enough(rows: int, draw: Draw, make_inputs: MakeInputs) -> None:
    weight, x = draw(8, 64)
    inputs = make_inputs(x[:rows]) if rows else Inputs(
        rows=0, moment=torch.zeros(64, 64), cross=torch.zeros(64, 64), amax=torch.zeros(64)
    )  # fmt: skip
    problem = Problem(weight=weight, format=mx.MXFP4, inputs=inputs)
    found = gptq(problem)
    assert mx.dequantize(found).isfinite().all()
    assert output_error(weight, found, inputs) <= output_error(weight, rtn(problem), inputs)


@pytest.mark.parametrize("size", [0.0, 1e-15, 1e15])
@FORMATS
def test_weights_of_any_size_are_quantised(fmt: BlockFormat, size: float, draw: Draw, make_inputs: MakeInputs) -> None:
    weight, x = draw(4, 64)
    found = mx.dequantize(gptq(Problem(weight=weight * size, format=fmt, inputs=make_inputs(x))), torch.float64)
    assert found.isfinite().all()
    torch.testing.assert_close(found, (weight * size).double(), rtol=0, atol=5 * size)
