"""vLLM 0.33: ``mxfp4_quantize`` and ``mxfp8_e4m3_quantize``, and the triton_kernels that it ships; golden files.

The Triton kernels ran in Triton's interpreter. On a GPU they agree with it on every block of which the scale is at
least 2^-126; below, a GPU flushes the scale to zero.
"""

import pytest
import store
import torch
from blocks import BF16, FP16, FP32
from compare import assert_differ_exactly_at, assert_differ_only_at, differing, exact_amax, rounds_up_to
from torch import Tensor

import mxperts as mx
from mxperts.formats import MXFP4, MXFP8_E4M3, MXFP8_E5M2, BlockFormat

DTYPES = (FP32, BF16, FP16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
KERNELS = [(fmt, "triton_kernels") for fmt in (MXFP4, MXFP8_E4M3, MXFP8_E5M2)] + [(MXFP4, "triton_kernels_kernel")]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return store.load("vllm")


def peer(golden: dict[str, Tensor], fmt: BlockFormat, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks [n, 32], the peer's codes [n, 32] and its scale bytes [n]."""
    key = f"{fmt.name}/{dtype}"
    return golden[f"{key}/x"], golden[f"{key}/{name}/codes"], golden[f"{key}/{name}/scales"].reshape(-1)


def has_bf16_subnormals(x: Tensor) -> Tensor:
    """Blocks that Triton's interpreter misreads: it takes a subnormal bfloat16 for another number."""
    subnormal = (x != 0) & (x.abs() < torch.finfo(BF16).smallest_normal)
    return subnormal.any(-1) & (x.dtype is BF16)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_mxfp4_quantize(golden: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Equal on every finite block, those included whose amax rounds up to 2^128, Inf in between: byte 254."""
    x, codes, scales = peer(golden, MXFP4, dtype, "vllm")
    ours = mx.quantize(x, MXFP4, preset="vllm")
    finite = x.isfinite().all(-1)
    overflows = finite & rounds_up_to(x, 128, 1)
    found = differing(ours, codes, scales) & finite & ~has_bf16_subnormals(x)
    assert_differ_exactly_at(found, torch.zeros_like(found), x, "mxfp4_quantize")
    assert (scales[overflows] == 254).all()
    assert overflows.any() == (dtype is BF16)
    assert (ours.scales[~finite] == 255).all()
    assert (scales[~finite] != 255).all(), "vLLM never makes a block NaN: Inf gives byte 254, NaN is left out"


@each_dtype
def test_mxfp8_e4m3_quantize(golden: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Equal on every finite block but those whose ceil(log2(amax / 448)), taken in float32, is one too low."""
    x, codes, scales = peer(golden, MXFP8_E4M3, dtype, "vllm")
    ours = mx.quantize(x, MXFP8_E4M3, preset="vllm")
    finite = x.isfinite().all(-1)
    one_too_low = finite & (scales.int() == ours.scales[:, 0].int() - 1)
    mantissa = torch.frexp(exact_amax(x))[0]
    just_above = (mantissa * 2 > 1.75) & (mantissa * 2 <= 1.75 * (1 + 2.0**-22))
    assert (just_above | ~one_too_low).all(), "only for amax within two float32 ulps above 448 * 2^k"
    assert_differ_exactly_at(differing(ours, codes, scales) & finite, one_too_low, x, "mxfp8_e4m3_quantize")
    assert one_too_low.any() == (dtype is FP32)
    assert (ours.scales[~finite] == 255).all()


@pytest.mark.parametrize(("fmt", "name"), KERNELS, ids=lambda v: str(v))
@each_dtype
def test_triton_kernels_round_up(golden: dict[str, Tensor], fmt: BlockFormat, name: str, dtype: torch.dtype) -> None:
    """Equal on every finite block whose scale is at least 2^-126: to them byte 0 is the scale zero, so they use 1."""
    x, codes, scales = peer(golden, fmt, dtype, f"{name}/ROUND_UP")
    ours = mx.quantize(x, fmt, preset="triton_kernels")
    finite = x.isfinite().all(-1)
    avoided = (ours.scales[:, 0] == 0) & (exact_amax(x) > 0) & finite
    found = differing(ours, codes, scales) & finite
    if name.endswith("kernel"):
        found &= ~has_bf16_subnormals(x) | avoided
    assert_differ_exactly_at(found, avoided, x, name)
    assert (scales[avoided] == 1).all()
    assert (ours.scales[~finite] == 255).all()
    assert (scales[x.isinf().any(-1) & ~x.isnan().any(-1)] == 255).all(), "Inf makes the block NaN there too"


@pytest.mark.parametrize(("fmt", "name"), KERNELS, ids=lambda v: str(v))
@each_dtype
def test_triton_kernels_round_down(golden: dict[str, Tensor], fmt: BlockFormat, name: str, dtype: torch.dtype) -> None:
    """``rfloor``; under scale byte 0 their elements are zeros."""
    x, codes, scales = peer(golden, fmt, dtype, f"{name}/ROUND_DOWN")
    ours = mx.quantize(x, fmt, preset="triton_kernels", scale_rule="rfloor")
    finite = x.isfinite().all(-1)
    found = differing(ours, codes, scales) & finite
    assert_differ_only_at(found, (ours.scales[:, 0] == 0) | has_bf16_subnormals(x), x, name)
