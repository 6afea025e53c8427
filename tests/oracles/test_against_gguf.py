"""gguf 0.19: MXFP4 as ggml quantises it."""

import numpy as np
import pytest
import torch
from blocks import BF16, EXTREME, FP16, FP32, ORDINARY, make
from compare import assert_differ_exactly_at, assert_differ_only_at, differing, exact_amax
from torch import Tensor

import mxperts as mx
from mxperts.formats import MXFP4

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")
KIND = gguf.GGMLQuantizationType.MXFP4


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n, 32] and scale bytes [n]: 17 bytes a block, the scale first, then codes j and j + 16 in one byte."""
    with np.errstate(all="ignore"):
        blocks = torch.from_numpy(quants.quantize(x.float().numpy(), KIND)).reshape(-1, 17)
    return torch.cat([blocks[:, 1:] & 0xF, blocks[:, 1:] >> 4], -1), blocks[:, 0]


def float_log2(x: Tensor) -> Tensor:
    """floor(log2(amax)) - 2 + 127 as gguf takes it, in float32 and before it becomes a byte."""
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.floor(np.log2(x.float().abs().amax(-1).numpy())) - 2 + 127)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_every_finite_block_is_equal_but_those_whose_log2_or_byte_is_wrong(dtype: torch.dtype) -> None:
    """Its faults: a float log2 that is one too high just below 2^k, and bytes below 0 that wrap to 252 ... 255."""
    x = torch.cat([make(category, MXFP4, dtype, 84) for category in ORDINARY + EXTREME])
    codes, scales = quantize(x)
    ours = mx.quantize(x, MXFP4, preset="ggml")
    byte, amax = float_log2(x), exact_amax(x)
    exact = torch.frexp(amax)[1] - 1 - 2 + 127
    wraps = (byte < 0) & (amax > 0)
    one_too_high = (byte == exact + 1) & (byte >= 0)
    assert ((byte == exact) | one_too_high | (amax == 0) | (byte < -60)).all(), "log2 is right or one too high"
    assert_differ_exactly_at(differing(ours, codes, scales), wraps | one_too_high, x, "gguf")
    assert (scales[wraps] >= 252).all()
    assert wraps.any() or dtype is FP16
    assert one_too_high.any() == (dtype is FP32)


def test_a_non_finite_block_is_not_followed() -> None:
    """gguf gives it scale byte 0, so that it decodes to numbers below 2^-124; here it becomes NaN."""
    x = make("nonfinite", MXFP4, FP32, 70)
    with np.errstate(all="ignore"):
        _, scales = quantize(x)
    assert set(scales.tolist()) == {0}
    assert (mx.quantize(x, MXFP4, preset="ggml").scales == 255).all()


def test_every_code_under_every_scale_decodes_equally() -> None:
    """Except byte 255, which is NaN here and 2^128 there, and Inf where float32 ends."""
    codes = torch.arange(32).remainder(16).to(torch.uint8).expand(256, -1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    nibbles = codes[:, :16] | codes[:, 16:] << 4
    with np.errstate(all="ignore"):
        theirs = torch.from_numpy(quants.dequantize(torch.cat([scales, nibbles], -1).numpy(), KIND))
    ours = mx.dequantize(mx.MXTensor.from_codes(codes, scales, MXFP4), torch.float32)
    assert_differ_only_at((ours != theirs).any(-1), scales[:, 0] == 255, theirs, "gguf")
    assert ours[255].isnan().all()
