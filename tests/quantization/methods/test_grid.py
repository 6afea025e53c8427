"""Rounding to elements at scales that the caller chooses."""

from __future__ import annotations

import math

import pytest
import torch

import mxperts as mx
from mxperts.formats import BLOCK_FORMATS, PRESETS, BlockFormat
from mxperts.quantization.methods import Problem
from mxperts.quantization.methods.grid import STEPS, Grid, power_of_two

FORMATS = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)


def grid(fmt: BlockFormat, **choices: str) -> Grid:
    return Grid(Problem(weight=torch.ones(1, 32), format=fmt, **choices))


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-127, 128)
    assert power_of_two(exponents).tolist() == [math.ldexp(1.0, e) for e in range(-127, 128)]


@FORMATS
@pytest.mark.parametrize("exponent", [-20, 0, 3])
def test_every_number_goes_to_the_nearest_element(fmt: BlockFormat, exponent: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, generator=g) * torch.randn(500, generator=g).exp() * fmt.element.max * 2.0**exponent / 2
    elements = torch.tensor([v for v in fmt.element.values if math.isfinite(v)]) * 2.0**exponent
    elements = elements[elements >= -fmt.element.max * 2.0**exponent]  # INT8's -2 is not used
    found = grid(fmt).nearest(x, torch.tensor(exponent))
    assert torch.isin(found, elements).all()
    distance = (x.unsqueeze(-1) - elements).abs().amin(-1)
    torch.testing.assert_close((x - found).abs(), distance, rtol=0, atol=0)


@FORMATS
@pytest.mark.parametrize("preset", PRESETS)
def test_with_the_rules_own_scales_it_is_quantize(fmt: BlockFormat, preset: str) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(20, 96, generator=g).bfloat16().float()
    x[3, :32] = 0
    rounding = grid(fmt, preset=preset)
    exponents = rounding.exponents(x.unflatten(-1, (-1, 32)))
    values = rounding.nearest(x, exponents.repeat_interleave(32, -1))
    t, expected = rounding.tensor(values, exponents, x.shape), mx.quantize(x, fmt, preset=preset)
    assert t.scales.equal(expected.scales)
    assert mx.dequantize(t, torch.float32).equal(mx.dequantize(expected, torch.float32))
    assert not (t.codes() == fmt.element.sign_bit).any() or not fmt.element.has_signed_zero


@FORMATS
def test_steps_stay_within_the_range_of_scales(fmt: BlockFormat) -> None:
    rounding = grid(fmt)
    exponents = torch.tensor([-127, 0, 127])
    near = rounding.near(exponents)
    assert near[0].equal(exponents)
    assert near.shape == (len(STEPS), 3)
    assert near.min() == -127
    assert near.max() == 127


@FORMATS
def test_a_tensor_holds_the_values_it_was_made_of(fmt: BlockFormat) -> None:
    g = torch.Generator().manual_seed(2)
    rounding, exponents = grid(fmt), torch.tensor([[-127, 5], [0, 100]])
    x = torch.randn(2, 64, generator=g).ldexp(exponents.repeat_interleave(32, -1).float())
    values = rounding.nearest(x, exponents.repeat_interleave(32, -1))
    t = rounding.tensor(values, exponents, torch.Size((2, 50)))
    assert t.shape == (2, 50)
    assert mx.dequantize(t, torch.float32).equal(values[:, :50])
