"""compressed-tensors 0.20: the weights of its MXFP4, MXFP6 and MXFP8 compressors, and its fake quantisation."""

import pytest
import torch
from blocks import BF16, EXTREME, FP16, FP32, ORDINARY, SPECIAL, make
from compare import assert_differ_exactly_at, differing, exact_amax, rounds_up_to
from torch import Tensor

import mxperts as mx
from mxperts.formats import MXFP4, MXFP6_E2M3, MXFP8_E4M3, BlockFormat
from mxperts.packing import unpack

compressors = pytest.importorskip("compressed_tensors.compressors")
quantization = pytest.importorskip("compressed_tensors.quantization")
forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
utils = pytest.importorskip("compressed_tensors.quantization.utils")

COMPRESSORS = {
    MXFP4: "mxfp4-pack-quantized",
    MXFP6_E2M3: "mxfp6-pack-quantized",
    MXFP8_E4M3: "mxfp8-quantized",
}
EVEN_BITS = {MXFP4: 1, MXFP6_E2M3: 3, MXFP8_E4M3: 1}
"""Mantissa bits to which it rounds amax: MXFP8 takes MXFP4's."""
each_format = pytest.mark.parametrize("fmt", COMPRESSORS, ids=str)


def arguments(fmt: BlockFormat) -> "quantization.QuantizationArgs":
    return quantization.QuantizationArgs(
        num_bits=fmt.element.bits,
        type="float",
        strategy="group",
        group_size=32,
        scale_dtype=torch.uint8,
        symmetric=True,
    )


def scale_of(x: Tensor, fmt: BlockFormat) -> Tensor:
    scale, _ = utils.calculate_qparams(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), arguments(fmt))
    return scale


def compress(x: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Codes [n, 32] and scale bytes [n] from compressed-tensors."""
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments(fmt))
    compressor = compressors.BaseCompressor.get_value_from_registry(COMPRESSORS[fmt])
    state = compressor.compress({"weight": x, "weight_scale": scale_of(x, fmt)}, scheme)
    packed = state.get("weight_packed", state.get("weight"))
    return unpack(packed.view(torch.uint8), fmt), state["weight_scale"].reshape(-1)


def wrapped_to_127(x: Tensor, fmt: BlockFormat) -> Tensor:
    """Blocks whose scale the peer's arithmetic loses: amax rounds up to 2^128 and its log2 is Inf, stored as 127.

    In float16 the same happens at 2^16, and below 2^-14, where it takes the exponent field of a subnormal number.
    """
    power = 16 if x.dtype is FP16 else 128
    lost = rounds_up_to(x, power, EVEN_BITS[fmt])
    return lost | (exact_amax(x) < 2.0**-14) if x.dtype is FP16 else lost


@each_format
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_every_finite_block_is_equal_but_those_whose_scale_wraps(fmt: BlockFormat, dtype: torch.dtype) -> None:
    x = torch.cat([make(category, fmt, dtype, 63) for category in ORDINARY + EXTREME])
    codes, scales = compress(x, fmt)
    ours = mx.quantize(x, fmt, preset="compressed_tensors")
    lost, found = wrapped_to_127(x, fmt), differing(ours, codes, scales)
    if dtype is FP16:  # near 2^-14 a subnormal amax can still round up to the right power
        lost &= found | (exact_amax(x) >= 1) | (exact_amax(x) == 0)
    assert_differ_exactly_at(found, lost, x, "compressed-tensors")
    overflowed = rounds_up_to(x, 16 if dtype is FP16 else 128, EVEN_BITS[fmt])
    assert overflowed.any()
    assert (scales[overflowed] == 127).all()


@each_format
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_fake_quantised_activations_are_equal(fmt: BlockFormat, dtype: torch.dtype) -> None:
    x = torch.cat([make(category, fmt, dtype, 42) for category in ORDINARY])
    theirs = forward.fake_quantize(x, scale_of(x, fmt), None, arguments(fmt))
    ours = mx.fake_quantize(x, fmt, preset="compressed_tensors")
    assert torch.equal(ours, theirs)
    assert torch.equal(ours.signbit(), theirs.signbit())


@each_format
def test_inf_and_nan_are_not_followed(fmt: BlockFormat) -> None:
    """compressed-tensors stores such a block with scale byte 0 or 127; here it becomes NaN."""
    for category in SPECIAL:
        x = make(category, fmt, FP32, 63)
        _, scales = compress(x, fmt)
        assert set(scales.tolist()) <= {0, 127}
        assert (mx.quantize(x, fmt, preset="compressed_tensors").scales == 255).all()
