"""What methods are given is checked before any of them begins."""

from __future__ import annotations

import re

import pytest
import torch

import mxperts as mx
from mxperts.errors import ArgumentError
from mxperts.quantization.methods import Inputs, Problem
from mxperts.quantization.methods.problem import operands


def inputs(k: int = 32, *stack: int) -> Inputs:
    eye = torch.eye(k).expand(*stack, k, k)
    return Inputs(rows=9, moment=eye, cross=2 * eye, amax=torch.ones(*stack, k))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(bad: float) -> None:
    weight = torch.ones(2, 32)
    weight[1, 3] = bad
    with pytest.raises(ArgumentError, match="the weight holds NaN or Inf"):
        Problem(weight=weight, format=mx.MXFP4)


@pytest.mark.parametrize("name", ["moment", "cross", "clean"])
def test_moments_that_are_no_numbers_are_refused(name: str) -> None:
    given = {n: torch.eye(32) for n in ("moment", "cross", "clean")}
    given[name][0, 0] = torch.nan
    with pytest.raises(ArgumentError, match=f"the {name} of the layer's inputs holds NaN or Inf"):
        Inputs(rows=9, amax=torch.ones(32), **given)


@pytest.mark.parametrize(
    ("weight", "of", "message"),
    [
        (torch.ones(4, 32, dtype=torch.float64), None, "not torch.float64"),
        (torch.ones(32), None, "[..., N, K]"),
        (torch.ones(0, 32), None, "not empty"),
        (torch.ones(4, 64), inputs(32), "whose moment is (64, 64), not (32, 32)"),
        (torch.ones(3, 4, 32), inputs(32), "whose moment is (3, 32, 32)"),
        (torch.ones(4, 32), inputs(32, 3), "not (3, 32, 32)"),
        (torch.ones(4, 32, device="meta")[:0], None, "not empty"),
    ],
)
def test_shapes_and_dtypes_must_fit(weight: torch.Tensor, of: Inputs | None, message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        Problem(weight=weight, format=mx.MXFP4, inputs=of)


def test_moments_must_fit_each_other() -> None:
    with pytest.raises(ArgumentError, match=r"\[\.\.\., K, K\]"):
        Inputs(rows=1, moment=torch.ones(3, 4), cross=None, amax=torch.ones(3))
    with pytest.raises(ArgumentError, match="cross must be"):
        Inputs(rows=1, moment=torch.eye(4), cross=torch.eye(3), amax=torch.ones(4))
    with pytest.raises(ArgumentError, match="amax must be"):
        Inputs(rows=1, moment=torch.eye(4), cross=None, amax=torch.ones(3))


def test_padding_has_neither_weight_nor_inputs() -> None:
    problem = Problem(weight=torch.ones(5, 40, dtype=torch.bfloat16), format=mx.MXFP4, inputs=inputs(40))
    weight, moment, cross = operands(problem)
    assert cross is not None
    assert (weight.shape, moment.shape, cross.shape) == ((1, 5, 64), (1, 64, 64), (1, 64, 64))
    assert weight.dtype == moment.dtype == torch.float32
    assert weight.sum() == 5 * 40
    assert moment[0].equal(torch.diag((torch.arange(64) < 40).float()))
    assert cross.equal(2 * moment)
