"""What travels is what the experts would have made of the rows themselves."""

from __future__ import annotations

import pytest
import torch

import mxperts as mx
from mxperts.backend.reference.fp8 import fake_quantize_dynamic, fake_quantize_static
from mxperts.distributed.wire import Wire
from mxperts.formats import FP8_DYNAMIC, FP8_STATIC, Activation, Role, parse_activation
from mxperts.formats.presets import PRESETS

FORMATS = ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCALE = 0.37
NOT_IDEMPOTENT = {("mxfp4", "compressed_tensors")}  # its ties make another largest number; experts use the default


def rows(dtype: torch.dtype, hidden: int = 96) -> torch.Tensor:
    """Rows [R, H] of all magnitudes that can be quantised without overflow, zeros of both signs, NaN and Inf."""
    generator = torch.Generator().manual_seed(0)
    top = 14 if dtype is torch.float16 else 120
    exponents = torch.randint(-top - 4, top, (512, 1), generator=generator).to(torch.float64)
    x = torch.randn(512, hidden, generator=generator, dtype=torch.float64) * torch.exp2(exponents)
    ties = torch.randint(-64, 64, (64, hidden), generator=generator) / 8
    x = torch.cat([x, ties, torch.zeros(1, hidden), -torch.zeros(1, hidden)]).to(dtype)
    x[0, 3], x[1, 5], x[2, 40], x[3, 70] = torch.nan, torch.inf, -torch.inf, -0.0
    return x


def quantized(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """What the experts make of their input."""
    if activation is None:
        return x
    if activation == FP8_DYNAMIC:
        return fake_quantize_dynamic(x)
    if activation == FP8_STATIC:
        return fake_quantize_static(x, torch.tensor([SCALE]))
    return mx.fake_quantize(x, activation)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    a, b = (torch.where(t.isnan(), torch.full_like(t, torch.nan), t) for t in (a, b))
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, *FORMATS, "fp8_static", "fp8_dynamic"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_experts_make_the_same_of_what_arrives(activation: str | None, dtype: torch.dtype, backend: str) -> None:
    parsed = parse_activation(activation)
    x = rows(dtype)
    scale = SCALE if parsed == FP8_STATIC else None
    wire = Wire(hidden=x.shape[1], dtype=dtype, activation=parsed, input_scale=scale, backend=backend)
    sent = wire.pack(x)
    assert sent.dtype is torch.uint8
    assert sent.shape == (len(x), wire.row_bytes)
    arrived = wire.unpack(sent)
    assert same_bits(arrived, quantized(x, parsed) if wire.is_packed else x)
    assert same_bits(quantized(arrived, parsed), quantized(x, parsed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("fmt", FORMATS)
def test_quantising_twice_changes_nothing_in_any_preset(fmt: str, preset: str, dtype: torch.dtype) -> None:
    x = rows(dtype)[4:]  # some presets raise for NaN and Inf
    try:
        once = mx.fake_quantize(x, fmt, preset=preset)
    except mx.errors.FormatError:
        pytest.skip(f"{preset} has no {fmt}")
    assert same_bits(mx.fake_quantize(once, fmt, preset=preset), once) == ((fmt, preset) not in NOT_IDEMPOTENT)
    packed = mx.quantize(x, fmt, preset=preset, role=Role.ACTIVATION)
    assert same_bits(mx.dequantize(packed, dtype), once)


def test_bytes_of_a_row() -> None:
    def size(activation: str | None, dtype: torch.dtype = torch.bfloat16, hidden: int = 2048) -> int:
        return Wire(hidden=hidden, dtype=dtype, activation=parse_activation(activation)).row_bytes

    assert size(None) == 4096
    assert size("mxfp4") == 1024 + 64
    assert size("mxfp6_e2m3") == 1536 + 64
    assert size("mxfp8_e4m3") == 2048 + 64
    assert size("fp8_static") == 2048
    assert size("fp8_dynamic") == 2048 + 4
    assert size("fp8_dynamic", torch.float32) == 8192  # as it is
    assert size("mxfp4", hidden=40) == 32 + 2  # the last block is padded


def test_no_rows() -> None:
    for activation in (None, "mxfp4", "fp8_dynamic"):
        wire = Wire(hidden=64, dtype=torch.bfloat16, activation=parse_activation(activation))
        sent = wire.pack(torch.empty(0, 64, dtype=torch.bfloat16))
        assert sent.shape == (0, wire.row_bytes)
        assert wire.unpack(sent).shape == (0, 64)
