"""gfloat: OCP's block quantisation, by a library that is written to be read."""

import itertools

import numpy as np
import pytest
import torch
from blocks import BF16, EXTREME, FP16, FP32, ORDINARY, make

import mxperts as mx
from mxperts.formats import BLOCK_FORMATS, ELEMENT_FORMATS, BlockFormat, ElementFormat, Preset, Recipe, ScaleRule

gfloat = pytest.importorskip("gfloat")
formats = pytest.importorskip("gfloat.formats")

FINITE = ORDINARY + EXTREME
ROUNDINGS = {
    "nearest_even": gfloat.RoundMode.TiesToEven,
    "half_away": gfloat.RoundMode.TiesToAway,
    "toward_zero": gfloat.RoundMode.TowardZero,
}
OCP = Recipe(scale_rule=ScaleRule.FLOOR, use_min=True)  # gfloat's INT8 has -2.0
PRESET = Preset(name="ocp with -2.0", source="gfloat", weight=OCP, activation=OCP)
each_element = pytest.mark.parametrize("element", ELEMENT_FORMATS, ids=str)
each_format = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)


def theirs(element: ElementFormat) -> "gfloat.FormatInfo":
    return getattr(formats, f"format_info_ocp_{element.name.lower()}")


@each_element
def test_every_code_has_the_same_value(element: ElementFormat) -> None:
    for code, ours in enumerate(element.values):
        found = gfloat.decode_float(theirs(element), code).fval
        np.testing.assert_array_equal([ours, np.signbit(ours)], [found, np.signbit(found)], f"code {code}")


@each_element
def test_the_derived_numbers_are_the_same(element: ElementFormat) -> None:
    info = theirs(element)
    assert (info.k, info.max, info.min, info.smallest) == (element.bits, element.max, element.min, element.smallest)
    assert info.num_nans == sum(np.isnan(v) for v in element.values)
    if element is not mx.MXINT8.element:  # gfloat gives an integer format the exponent of its -2.0
        assert (info.emax, info.bias) == (element.emax, element.bias)


def test_every_scale_byte_has_the_same_value() -> None:
    info = formats.format_info_ocp_e8m0
    ones = torch.full((256, 32), 2, dtype=torch.uint8)  # code 2 of E2M1 is 1.0
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    ours = mx.dequantize(mx.MXTensor.from_codes(ones, scales, "mxfp4"), torch.float64)[:, 0].tolist()
    np.testing.assert_array_equal(ours, [gfloat.decode_float(info, s).fval for s in range(256)])


@each_format
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_ocp_quantisation_is_the_same(fmt: BlockFormat, dtype: torch.dtype, rounding: str) -> None:
    """OCP's section 6.3, every category of finite blocks: scale bytes and codes, the sign of zero included."""
    x = torch.cat([make(category, fmt, dtype, 21) for category in FINITE])
    values, info = x.double().numpy(), theirs(fmt.element)
    scale = np.array([gfloat.compute_scale_amax(fmt.element.emax, row) for row in values])
    rounded = gfloat.round_ndarray(info, values / scale[:, None], ROUNDINGS[rounding], sat=True)
    codes = gfloat.encode_ndarray(info, rounded)
    t = mx.quantize(x, fmt, preset=PRESET, rounding=rounding)
    np.testing.assert_array_equal(t.scales[:, 0].numpy(), np.log2(scale) + 127)
    np.testing.assert_array_equal(t.codes().numpy(), codes)


@each_format
def test_gfloats_scalar_quantise_block_is_the_same(fmt: BlockFormat) -> None:
    block_info = getattr(formats, f"format_info_{fmt.name if fmt.element.bits > 4 else 'mxfp4_e2m1'}")
    x = torch.cat([make(category, fmt, FP32, 3) for category in ("normal", "ties", "thresholds")])
    ours = mx.fake_quantize(x, fmt, preset=PRESET).double().numpy()

    def scale(_: float, row: np.ndarray) -> float:
        return gfloat.compute_scale_amax(fmt.element.emax, row)

    for row, expected in itertools.zip_longest(x.double().numpy(), ours):
        np.testing.assert_array_equal(gfloat.quantize_block(block_info, row, scale), expected)
