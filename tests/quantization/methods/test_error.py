"""The error of an output, from moments, is that of the outputs themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mxperts as mx
from mxperts.formats import BLOCK_FORMATS, BlockFormat
from mxperts.quantization.methods import Inputs
from mxperts.quantization.methods.error import output_error


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
@pytest.mark.parametrize("activation", [None, "mxfp4"])
def test_it_is_the_mean_over_all_inputs(
    fmt: BlockFormat, activation: str | None, draw: Callable[..., tuple[Tensor, Tensor]],
    make_inputs: Callable[..., Inputs],
) -> None:  # fmt: skip
    weight, x = draw(12, 40)
    weight, read = weight.bfloat16(), x if activation is None else mx.fake_quantize(x, activation)
    t = mx.quantize(weight, fmt)
    outputs = x.double() @ weight.double().T - read.double() @ mx.dequantize(t, torch.float64).T
    found = output_error(weight, t, make_inputs(x, None if activation is None else read))
    assert found == pytest.approx(float(outputs.square().sum(-1).mean()), rel=1e-3)


def test_what_is_left_out_does_not_depend_on_the_quantised_weight(
    draw: Callable[..., tuple[Tensor, Tensor]], make_inputs: Callable[..., Inputs]
) -> None:
    weight, x = draw(12, 64)
    whole = make_inputs(x, mx.fake_quantize(x, mx.MXFP4))
    part = Inputs(rows=whole.rows, moment=whole.moment, cross=whole.cross, amax=whole.amax)
    missing = [output_error(weight, t, whole) - output_error(weight, t, part) for t in
               (mx.quantize(weight, mx.MXFP4), mx.quantize(weight, mx.MXFP8_E5M2))]  # fmt: skip
    assert missing[0] == pytest.approx(missing[1], rel=1e-9)
    assert missing[0] == pytest.approx(float((x @ weight.T).square().sum(-1).mean()), rel=1e-4)
