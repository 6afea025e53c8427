"""torchao 0.18: ``to_mx`` in all four scale rules, float32 and bfloat16, and its dequantisation."""

import warnings

import pytest
import torch
from blocks import BF16, EXTREME, FP32, ORDINARY, make
from compare import assert_differ_exactly_at, assert_differ_only_at, differing, exact_amax
from torch import Tensor

import mxperts as mx
from mxperts.formats import BLOCK_FORMATS, BlockFormat
from mxperts.packing import unpack

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torchao")
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    config = pytest.importorskip("torchao.prototype.mx_formats.config")

THEIRS = {
    "mxfp4": torch.float4_e2m1fn_x2,
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
}
each_format = pytest.mark.parametrize("fmt", [f for f in BLOCK_FORMATS if f.name in THEIRS], ids=str)
each_dtype = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
BIT_RULES = ("floor", "even", "ceil")
"""Rules that torchao computes on bits; its rceil goes through a float log2."""


def to_mx(x: Tensor, fmt: BlockFormat, rule: str) -> tuple[Tensor, Tensor]:
    """Codes [n, 32] and scale bytes [n] from torchao."""
    mode = config.ScaleCalculationMode(rule)
    scales, data = mx_tensor.to_mx(x, THEIRS[fmt.name], 32, mode)
    data = data.view(torch.uint8)
    return unpack(data, fmt) if fmt.name == "mxfp4" else data, scales.view(torch.uint8).reshape(-1)


@each_format
@each_dtype
@pytest.mark.parametrize("rule", BIT_RULES)
def test_every_finite_block_is_equal_but_those_of_scale_zero(fmt: BlockFormat, dtype: torch.dtype, rule: str) -> None:
    """Under scale byte 0 torchao divides by 2^-126 and stores 2^-127, so that the block decodes to half of itself."""
    x = torch.cat([make(category, fmt, dtype, 42) for category in ORDINARY + EXTREME])
    codes, scales = to_mx(x, fmt, rule)
    ours = mx.quantize(x, fmt, preset="torchao", scale_rule=rule)
    found = differing(ours, codes, scales)
    assert_differ_only_at(found, (ours.scales[:, 0] == 0) & (exact_amax(x) > 0), x, f"torchao {rule}")
    assert found.any(), "the fault is gone: the exception can go too"
    assert torch.equal(ours.scales[:, 0], scales), "the scale bytes themselves are equal everywhere"


@each_format
@each_dtype
def test_rceil_is_equal_where_their_log2_is_right(fmt: BlockFormat, dtype: torch.dtype) -> None:
    """torchao takes ceil(log2(amax / max)) in float32, which is one too low for amax just above max * 2^k."""
    x = torch.cat([make(category, fmt, dtype, 63) for category in ORDINARY + EXTREME])
    codes, scales = to_mx(x, fmt, "rceil")
    ours = mx.quantize(x, fmt, preset="torchao", scale_rule="rceil")
    log2 = torch.log2(x.float().abs().amax(-1) / fmt.element.max).ceil().clamp(-127, 127) + 127
    wrong_log2 = log2 != ours.scales[:, 0]
    tiny = (ours.scales[:, 0] == 0) & (exact_amax(x) > 0)
    assert (log2[wrong_log2] == ours.scales[:, 0][wrong_log2] - 1).all(), "one too low, never too high"
    assert dtype is FP32 or not wrong_log2.any(), "no bfloat16 is close enough to a power of two"
    found = differing(ours, codes, scales)
    assert_differ_exactly_at(found & ~tiny, wrong_log2 & ~tiny, x, "torchao rceil")


@each_format
@each_dtype
@pytest.mark.parametrize("rule", BIT_RULES)
def test_inf_saturates_and_nan_makes_its_block_nan(fmt: BlockFormat, dtype: torch.dtype, rule: str) -> None:
    """0.18 lets Inf count as 2^128: scale byte 255 - emax, and the element becomes the largest."""
    x = make("nonfinite", fmt, dtype, 70)
    codes, scales = to_mx(x, fmt, rule)
    ours = mx.quantize(x, fmt, preset="torchao", scale_rule=rule)
    assert_differ_exactly_at(differing(ours, codes, scales), torch.zeros(70, dtype=torch.bool), x, f"torchao {rule}")
    assert torch.equal(ours.scales[:, 0] == 255, x.isnan().any(-1))
    assert (ours.scales[:, 0] == 255 - fmt.element.emax)[~x.isnan().any(-1)].all()


@each_format
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_every_code_under_every_scale_decodes_equally(fmt: BlockFormat, dtype: torch.dtype) -> None:
    codes = (torch.arange(max(32, 1 << fmt.element.bits)) % (1 << fmt.element.bits)).to(torch.uint8).expand(256, -1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, codes.shape[-1] // 32).contiguous()
    t = mx.MXTensor.from_codes(codes, scales, fmt)
    data = t.packed if fmt.name == "mxfp4" else codes.contiguous()
    data = data.view(THEIRS[fmt.name]) if fmt.element.bits == 8 else data
    found = mx_tensor.to_dtype(data, scales.view(torch.float8_e8m0fnu), THEIRS[fmt.name], 32, dtype)
    torch.testing.assert_close(mx.dequantize(t, dtype), found, rtol=0, atol=0, equal_nan=True)
