"""What holds for every method."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mxperts as mx
from mxperts.formats import BLOCK_FORMATS, BlockFormat
from mxperts.quantization.methods import METHODS, Inputs, Problem

EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@EVERY
@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
@pytest.mark.parametrize("k", [1, 45])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_inputs", [False, True])
def test_it_gives_a_tensor_of_the_weights_shape_near_to_it(
    method: Callable[[Problem], mx.MXTensor], fmt: BlockFormat, k: int, dtype: torch.dtype, with_inputs: bool,
    draw: Callable[..., tuple[Tensor, Tensor]], make_inputs: Callable[..., Inputs],
) -> None:  # fmt: skip
    weight, x = draw(5, k)
    inputs = make_inputs(x, mx.fake_quantize(x, mx.MXFP6_E2M3)) if with_inputs else None
    found = method(Problem(weight=weight.to(dtype), format=fmt, inputs=inputs))
    assert (found.shape, found.format) == (weight.shape, fmt)
    difference = mx.dequantize(found, torch.float32) - weight
    assert float(difference.square().mean().sqrt()) < 0.5


@EVERY
@pytest.mark.parametrize("preset", ["quark", "ocp", "ggml"])
def test_an_empty_weight_has_the_scales_of_its_preset(method: Callable[[Problem], mx.MXTensor], preset: str) -> None:
    weight = torch.zeros(2, 64)
    found, expected = method(Problem(weight=weight, format=mx.MXFP4, preset=preset)), mx.quantize(
        weight, mx.MXFP4, preset=preset
    )  # fmt: skip
    assert found.scales.equal(expected.scales)
    assert not found.codes().any()


@EVERY
def test_a_stack_without_inputs_is_its_layers(method: Callable[[Problem], mx.MXTensor]) -> None:
    weight = torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(0))
    together = method(Problem(weight=weight, format=mx.MXFP6_E3M2))
    for e in range(3):
        alone = method(Problem(weight=weight[e], format=mx.MXFP6_E3M2))
        assert together[e].packed.equal(alone.packed)
        assert together[e].scales.equal(alone.scales)


def test_round_to_nearest_is_quantize() -> None:
    weight = torch.randn(4, 70, generator=torch.Generator().manual_seed(1))
    found = METHODS["rtn"](Problem(weight=weight, format=mx.MXFP4, preset="ocp", scale_rule="ceil"))
    expected = mx.quantize(weight, mx.MXFP4, preset="ocp", scale_rule="ceil")
    assert found.packed.equal(expected.packed)
    assert found.scales.equal(expected.scales)
