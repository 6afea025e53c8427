"""ml_dtypes: the value of every code, and rounding to it, by code that JAX and TensorFlow use."""

import numpy as np
import pytest
import torch
from blocks import CATEGORIES, FP32, make

import mxperts as mx
from mxperts.formats import E2M1, E2M3, E3M2, E4M3, E5M2, MXFP4, BlockFormat, ElementFormat

ml_dtypes = pytest.importorskip("ml_dtypes")

DTYPES = {
    E2M1: ml_dtypes.float4_e2m1fn,
    E2M3: ml_dtypes.float6_e2m3fn,
    E3M2: ml_dtypes.float6_e3m2fn,
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
}
each_element = pytest.mark.parametrize("element", DTYPES, ids=str)
each_format = pytest.mark.parametrize("fmt", [f for f in mx.formats.BLOCK_FORMATS if f.element in DTYPES], ids=str)


@each_element
def test_every_code_has_the_same_value(element: ElementFormat) -> None:
    codes = np.arange(1 << element.bits, dtype=np.uint8)
    theirs = codes.view(DTYPES[element]).astype(np.float64)
    ours = np.array(element.values)
    np.testing.assert_array_equal(ours, theirs)
    number = ~np.isnan(ours)
    np.testing.assert_array_equal(np.signbit(ours)[number], np.signbit(theirs)[number])


@each_element
def test_the_derived_numbers_are_the_same(element: ElementFormat) -> None:
    info = ml_dtypes.finfo(DTYPES[element])
    assert (float(info.max), float(info.smallest_subnormal)) == (element.max, element.smallest)
    assert (info.nmant, info.bits) == (element.mantissa_bits, element.bits)


def test_every_scale_byte_has_the_same_value() -> None:
    bytes_ = np.arange(256, dtype=np.uint8)
    theirs = bytes_.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    ones = torch.full((256, 32), 2, dtype=torch.uint8)  # code 2 of E2M1 is 1.0
    ours = mx.dequantize(mx.MXTensor.from_codes(ones, torch.from_numpy(bytes_)[:, None], MXFP4), torch.float64)[:, 0]
    np.testing.assert_array_equal(ours.numpy(), theirs)


@each_format
@pytest.mark.parametrize("category", [c for c in CATEGORIES if c != "nonfinite"])
def test_scaled_elements_round_to_the_same_codes(fmt: BlockFormat, category: str) -> None:
    """rceil scales, under which nothing saturates: there the formats' own casts define the result."""
    x = make(category, fmt, FP32, 120)
    t = mx.quantize(x, fmt, scale_rule="rceil", signed_zero="keep")
    scaled = torch.ldexp(x.double(), 127 - t.scales.int()).numpy()
    theirs = scaled.astype(np.float32).astype(DTYPES[fmt.element]).view(np.uint8)
    np.testing.assert_array_equal(scaled, scaled.astype(np.float32), "the scaled values are float32 numbers")
    np.testing.assert_array_equal(t.codes().numpy(), theirs)
