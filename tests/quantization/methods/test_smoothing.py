"""Scales of channels: exact to fold, and better where channels differ."""

from __future__ import annotations

import pytest
import torch

import mxperts as mx
from mxperts.errors import ArgumentError
from mxperts.quantization.methods.smoothing import LARGEST, channel_scales


def test_scales_are_powers_of_two_and_change_no_product() -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(50, 70, generator=g) * torch.randn(70, generator=g).mul(2).exp()).bfloat16()
    weights = [torch.randn(n, 70, generator=g).bfloat16() for n in (8, 5)]
    scales = channel_scales(x.float().abs().amax(0), weights)
    assert (scales.frexp().mantissa == 0.5).all()
    assert len(scales.unique()) > 3
    for w in weights:
        assert (w * scales.bfloat16() / scales.bfloat16()).equal(w), "folding is exact in bfloat16"
        products = (x * w[0]).double()
        assert ((x / scales.bfloat16()) * (w[0] * scales.bfloat16())).double().equal(products)


def test_outlying_channels_cost_less() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(500, 128, generator=g)
    x[:, ::37] *= 30
    weight = torch.randn(64, 128, generator=g)
    s = channel_scales(x.abs().amax(0), [weight])
    exact = x @ weight.T

    def error(scales: torch.Tensor) -> float:
        read, w = (mx.fake_quantize(t, mx.MXFP4) for t in (x / scales, weight * scales))
        return float((read @ w.T - exact).square().mean())

    assert error(s) < 0.7 * error(torch.ones(128))


def test_even_channels_stay_as_they_are() -> None:
    assert channel_scales(torch.full((40,), 3.0), [torch.full((2, 40), -7.0)]).equal(torch.ones(40))


@pytest.mark.parametrize("k", [5, 32, 45])
def test_channels_without_inputs_or_weights_stay_and_do_not_count(k: int) -> None:
    inputs, weight = torch.full((k,), 4.0), torch.ones(3, k)
    inputs[0], weight[:, 1] = 0, 0
    assert channel_scales(inputs, [weight]).equal(torch.ones(k))
    inputs[2] = 4.0 * 4**4  # in the mean of its block it is one of many
    scales = channel_scales(inputs, [weight])
    assert scales[:2].tolist() == [1, 1]
    assert scales[2] > 4


def test_scales_stay_in_bounds() -> None:
    inputs = torch.ones(64)
    inputs[0], inputs[40] = 1e38, 1e-38
    scales = channel_scales(inputs, [torch.ones(2, 64)])
    assert scales[0] == LARGEST
    assert scales[40] == 1 / LARGEST


@pytest.mark.parametrize(
    ("inputs", "weights", "message"),
    [
        (torch.ones(4), [], "one or more"),
        (torch.ones(4), [torch.ones(2, 5)], r"\[\(2, 5\)\]"),
        (torch.ones(2, 4), [torch.ones(2, 4)], "must be"),
        (torch.tensor([1, torch.nan]), [torch.ones(2, 2)], "NaN"),
        (torch.ones(2), [torch.tensor([[1, torch.inf]])], "NaN or Inf"),
    ],
)
def test_bad_input_is_refused(inputs: torch.Tensor, weights: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        channel_scales(inputs, weights)
