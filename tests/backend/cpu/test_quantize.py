"""quantize, dequantize and fake_quantize on the CPU against the reference, bit by bit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from mxperts.backend import reference
from mxperts.backend.cpu.blocks import (
    bf16_to_float,
    encode_block,
    fp16_to_float,
    quantize_block,
    round_bf16,
    round_fp16,
    scale_block,
)
from mxperts.backend.cpu.fp8 import dynamic_scale, fake_quantize_fp8
from mxperts.backend.cpu.quantize import SHARE, dequantize, fake_quantize, quantize
from mxperts.backend.cpu.rule import block_rule
from mxperts.backend.reference.fp8 import fake_quantize_dynamic, fake_quantize_static
from mxperts.errors import ArgumentError
from mxperts.formats import (
    BLOCK_FORMATS,
    MXFP4,
    MXFP6_E3M2,
    PRESETS,
    BlockFormat,
    NonFinite,
    Recipe,
    Role,
    Rounding,
    ScaleRule,
    SignedZero,
    recipe,
)
from mxperts.packing import pack, unpack

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (FP32, BF16, FP16)
ROUNDINGS = [r for r in Rounding if r is not Rounding.STOCHASTIC]

each_format = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The reference's many small steps would wait for each other's threads wherever the CPU is busy."""
    with torch_threads(1):
        yield


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, signs of zeros included; every NaN equals every other."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = a.contiguous().view(integer) == b.contiguous().view(integer)
    if a.is_floating_point():
        equal |= a.isnan() & b.isnan()
    return bool(equal.all())


def assert_as_reference(x: Tensor, fmt: BlockFormat, choices: Recipe) -> None:
    packed, scales = reference.quantize(x, fmt, choices)
    found = quantize(x, fmt, choices)
    assert same(found[1], scales), choices
    assert same(found[0], packed), choices
    values = reference.dequantize(packed, scales, fmt, x.shape[-1], x.dtype)
    assert same(dequantize(packed, scales, fmt, x.shape[-1], x.dtype), values), choices
    assert same(fake_quantize(x, fmt, choices), values), choices


def floats(bits: Tensor) -> Tensor:
    """float32 numbers of bit patterns."""
    return bits.to(torch.int64).to(torch.int32).view(FP32)


def random_blocks(count: int, seed: int) -> Tensor:
    """Float32 [count, 32]: random bits; blocks of near exponents, all of them in turn; both with few bits set."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int = 32) -> Tensor:
        return torch.randint(low, high, (count // 3, size), generator=generator)

    sparse = draw(0, 2**23) & -(2 ** draw(0, 24))
    exponent = (torch.arange(count // 3)[:, None] * 256 // (count // 3) - draw(0, 22)).clamp(min=0)
    near = exponent << 23 | sparse | draw(0, 2) << 31
    alone = torch.where(draw(0, 32, 1) == torch.arange(32), near, near & (1 << 31))
    return floats(torch.cat([draw(-(2**31), 2**31), near, alone]))


def thresholds(fmt: BlockFormat) -> Tensor:
    """Blocks whose largest magnitude lies at or one ulp beside where a scale rule steps, at all ends of the range."""
    element = fmt.element
    mantissas = [1.0, element.max / 2.0**element.emax, *(2.0 - 2.0 ** -(bits + 1) for bits in range(9))]
    exponents = [-149, -148, -141, -135, *range(-129, -124), -119, -110, 0, 1, 113, *range(124, 128)]
    amax = torch.tensor([[m * 2.0**e for m in mantissas] for e in exponents], dtype=torch.float64).to(FP32).flatten()
    amax = torch.cat([floats((amax.view(torch.int32) + step).clamp(0, 0x7F7FFFFF)) for step in (-1, 0, 1)])
    return amax[:, None] * torch.linspace(1, -1, 32)


def ties(fmt: BlockFormat) -> Tensor:
    """Every element, every midpoint of two, and one ulp beside them, each in a block that leaves it as it is."""
    magnitudes = torch.tensor(fmt.element.magnitudes, dtype=FP32)
    points = torch.cat([magnitudes, (magnitudes[1:] + magnitudes[:-1]) / 2])
    points = torch.cat([floats((points.view(torch.int32) + step).clamp(min=0)) for step in (-1, 0, 1)])
    points = torch.cat([points, points.new_zeros(-len(points) % 15)]).view(-1, 15)
    block = torch.cat([torch.full((len(points), 1), fmt.element.max), points, -points, points[:, :1]], 1)
    return torch.cat([torch.ldexp(block, torch.tensor(e)) for e in (0, -126, -130, 100)])


# All formats, recipes and numbers


def preset_recipes(fmt: BlockFormat) -> list[Recipe]:
    return list(dict.fromkeys(p.recipe(fmt, role) for p in PRESETS.values() for role in Role))


def pattern_blocks(dtype: torch.dtype) -> Tensor:
    """[32768, 4]: each pattern and its negative are the largest of a block once, with two smaller ones."""
    largest = torch.arange(1 << 15, dtype=torch.int32)[:, None]
    patterns = torch.cat([largest, largest, largest * 31 // 32, largest * 7 // 8], 1)
    signs = (torch.arange(4, dtype=torch.int32) + largest) % 2
    return (patterns | (signs << 15)).to(torch.int16).view(dtype)


@each_format
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_pattern_under_every_preset(fmt: BlockFormat, dtype: torch.dtype) -> None:
    """The reference gets blocks of 4; zeros up to 32 change nothing."""
    x = pattern_blocks(dtype)
    assert len(x[:, :2].view(torch.int16).unique()) == 1 << 16
    padded = torch.nn.functional.pad(x, (0, 28))
    short = dataclasses.replace(fmt, block_size=4)
    for choices in preset_recipes(fmt):
        packed, scales = reference.quantize(x, short, choices)
        found = quantize(padded, fmt, choices)
        assert same(found[1], scales), choices
        assert same(found[0][:, : packed.shape[1]], packed), choices
        assert same(fake_quantize(padded, fmt, choices), dequantize(*found, fmt, 32, dtype)), choices


@each_format
@pytest.mark.parametrize("rule", ScaleRule, ids=lambda r: r.value)
def test_float32_under_a_covering_set_of_recipes(fmt: BlockFormat, rule: ScaleRule) -> None:
    """Each rounding with each treatment of zero; the other choices take turns."""
    x = torch.cat([random_blocks(300, seed=len(rule.value)), thresholds(fmt), torch.zeros(1, 32), -torch.zeros(1, 32)])
    policies = itertools.cycle(itertools.product([NonFinite.BLOCK_NAN, NonFinite.SATURATE], repeat=2))
    overflow, use_min = itertools.cycle([False, True, True, False, True]), itertools.cycle([False, False, True])
    bits, zero_scale = itertools.cycle([None, None, 0, 1, 8, 22, 23]), itertools.cycle([0, 1, 17, 254, 3])
    for rounding, zero in itertools.product(ROUNDINGS, SignedZero):
        nan, inf = next(policies)
        choices = Recipe(
            scale_rule=rule,
            rounding=rounding,
            signed_zero=zero,
            nan=nan,
            inf=inf,
            zero_block_scale=next(zero_scale),
            even_bits=next(bits),
            even_overflow=next(overflow),
            use_min=next(use_min),
        )
        assert_as_reference(x, fmt, choices)


@each_format
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda r: r.value)
def test_every_tie(fmt: BlockFormat, rounding: Rounding) -> None:
    for use_min in (False, True):
        choices = Recipe(scale_rule=ScaleRule.RCEIL, rounding=rounding, use_min=use_min)
        assert_as_reference(ties(fmt), fmt, choices)


@each_format
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_every_code_under_every_scale(fmt: BlockFormat, dtype: torch.dtype) -> None:
    count = 1 << fmt.element.bits
    packed = pack((torch.arange(max(count, 32)) % count).to(torch.uint8), fmt).expand(256, -1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, max(count, 32) // 32)
    expected = reference.dequantize(packed, scales, fmt, max(count, 32), dtype)
    assert same(dequantize(packed, scales, fmt, max(count, 32), dtype), expected)


# Shapes, layouts, threads


@each_dtype
def test_every_length_of_a_row(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    formats = itertools.cycle(BLOCK_FORMATS)
    for k in range(1, 71):
        x = torch.randn(3, k, generator=generator).to(dtype)
        x[1, k // 2] = torch.nan
        fmt = next(formats)
        assert_as_reference(x, fmt, recipe(fmt, Role.ACTIVATION))


@each_dtype
@pytest.mark.parametrize("shape", [(0, 32), (0, 3, 40), (2, 0, 33), (40,), (64,), (2, 3, 40)], ids=str)
def test_shapes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_as_reference(x, MXFP6_E3M2, Recipe())


@each_dtype
def test_layout_in_memory_does_not_matter(dtype: torch.dtype) -> None:
    x = torch.randn(64, 6, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    views = (x.transpose(0, 2), x.transpose(0, 1), x[::2], x[..., 1:], x[..., ::2], x[:, :1].expand(64, 6, 64), x[1:])
    for view in views:
        assert_as_reference(view, MXFP4, Recipe())
    whole = x.flatten()[1:33]  # starts where vectors do not
    assert_as_reference(whole, MXFP4, Recipe())
    packed, scales = reference.quantize(x, MXFP4, Recipe())
    expected = reference.dequantize(packed, scales, MXFP4, 64, dtype)
    found = dequantize(packed.transpose(0, 1), scales.transpose(0, 1), MXFP4, 64, dtype)
    assert same(found, expected.transpose(0, 1))


def test_inputs_that_need_a_gradient_are_taken_and_left_alone() -> None:
    x = torch.randn(3, 40, requires_grad=True)
    before = x.detach().clone()
    assert not fake_quantize(x, MXFP4, Recipe()).requires_grad
    quantize(x, MXFP4, Recipe())
    assert torch.equal(x, before)


@each_dtype
@pytest.mark.parametrize("k", [32, 50, 32 * 5000 + 7], ids=str)
def test_the_number_of_threads_does_not_matter(dtype: torch.dtype, k: int) -> None:
    fmt, choices = MXFP6_E3M2, Recipe()
    rows = -(-5 * SHARE // fmt.blocks(k))
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(3)).to(dtype)
    packed, scales = reference.quantize(x, fmt, choices)
    values = reference.dequantize(packed, scales, fmt, k, dtype)
    for count in (1, 2, 3):
        with torch_threads(count):
            found = quantize(x, fmt, choices)
            assert same(found[0], packed)
            assert same(found[1], scales)
            assert same(dequantize(packed, scales, fmt, k, dtype), values)
            assert same(fake_quantize(x, fmt, choices), values)


@each_format
def test_flushing_of_subnormal_numbers_does_not_matter(fmt: BlockFormat) -> None:
    x = thresholds(fmt)
    expected = reference.quantize(x, fmt, Recipe())
    values = reference.dequantize(*expected, fmt, 32, FP32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        found = quantize(x, fmt, Recipe())
        dequantized, both = dequantize(*expected, fmt, 32, FP32), fake_quantize(x, fmt, Recipe())
    finally:
        torch.set_flush_denormal(False)
    assert same(found[0], expected[0])
    assert same(found[1], expected[1])
    assert same(dequantized, values)
    assert same(both, values)


# Refused numbers, random rounding


@pytest.mark.parametrize("function", [quantize, fake_quantize])
def test_nan_and_inf_can_be_refused(function: Any) -> None:
    x = torch.ones(2, 40)
    x[1, 3] = torch.nan
    with pytest.raises(ArgumentError, match=r"^x holds NaN, which this recipe refuses$"):
        function(x, MXFP4, Recipe(nan=NonFinite.RAISE))
    x[0, 3] = -torch.inf
    with pytest.raises(ArgumentError, match=r"^x holds Inf, which this recipe refuses$"):
        function(x, MXFP4, Recipe(inf=NonFinite.RAISE))
    x = torch.ones(2, 40)
    assert_as_reference(x, MXFP4, Recipe(nan=NonFinite.RAISE, inf=NonFinite.RAISE))


@each_format
def test_stochastic_rounding_is_the_references(fmt: BlockFormat) -> None:
    x, choices = torch.randn(5, 40), Recipe(rounding=Rounding.STOCHASTIC)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(4)

    for a, b in zip(
        quantize(x, fmt, choices, generator()), reference.quantize(x, fmt, choices, generator()), strict=True
    ):
        assert same(a, b)
    expected = reference.fake_quantize(x, fmt, choices, generator())
    assert same(fake_quantize(x, fmt, choices, generator()), expected)
    for function in (quantize, fake_quantize):
        with pytest.raises(ArgumentError, match="needs a generator"):
            function(x, fmt, choices)
    with pytest.raises(ArgumentError, match="needs a generator"):
        block_rule(fmt, choices)


# What other kernels call


@numba.njit
def blocks_one_by_one(x: Any, q: Any, scales: Any, codes: Any, out: Any, rule: Any) -> None:
    for i in range(len(x)):
        scales[i] = quantize_block(x[i], q[i], rule)
        encode_block(q[i], codes[i], rule)
        scale_block(q[i], scales[i], out[i])


@each_format
def test_one_block(fmt: BlockFormat) -> None:
    x = torch.cat([random_blocks(300, seed=5), thresholds(fmt)])
    for choices in (Recipe(), Recipe(scale_rule=ScaleRule.FLOOR, signed_zero=SignedZero.DROP, use_min=True)):
        packed, scales = reference.quantize(x, fmt, choices)
        q, out = torch.empty_like(x), torch.empty_like(x)
        found_scales, codes = torch.empty(len(x), dtype=torch.uint8), torch.empty(len(x), 32, dtype=torch.uint8)
        arrays = [t.numpy() for t in (x, q, found_scales, codes, out)]
        blocks_one_by_one(*arrays, block_rule(fmt, choices))
        assert same(found_scales, scales[:, 0])
        assert same(codes, unpack(packed, fmt))
        assert same(out, reference.dequantize(packed, scales, fmt, 32, FP32))
        unscaled = reference.dequantize(packed, torch.full_like(scales, 127), fmt, 32, FP32)
        assert same(q, unscaled)


@numba.njit
def rounded(x: Any, bf16: Any, fp16: Any) -> None:
    for i in range(len(x)):
        bf16[i] = round_bf16(x[i])
        fp16[i] = round_fp16(x[i])


@numba.njit
def widened(bits: Any, bf16: Any, fp16: Any) -> None:
    for i in range(len(bits)):
        bf16[i] = bf16_to_float(bits[i])
        fp16[i] = fp16_to_float(bits[i])


def test_conversions_of_dtypes() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    wide = [torch.empty(1 << 16) for _ in range(2)]
    widened(bits.numpy().view(np.uint16), *(t.numpy() for t in wide))
    for found, dtype in zip(wide, (BF16, FP16), strict=True):
        assert same(found, bits.view(dtype).float())

    exact = torch.cat([bits.view(dtype).float() for dtype in (BF16, FP16)]).view(torch.int32)
    beside = [0, 1, 0x7FF, 0xFFF, 0x1000, 0x1001, 0x1800, 0x7FFF, 0x8000, 0x8001, 0x18000]  # midpoints of either
    x = torch.cat([*(floats(exact + step) for step in beside), torch.linspace(-(2.0**-13), 2.0**-13, 20001)])
    narrow = [torch.empty(len(x), dtype=torch.int16) for _ in range(2)]
    rounded(x.numpy(), *(t.numpy().view(np.uint16) for t in narrow))
    for found, dtype in zip(narrow, (BF16, FP16), strict=True):
        assert same(found.view(dtype), x.to(dtype))
        assert found[x.isnan() & ~x.signbit()].unique().tolist() == [{BF16: 0x7FC0, FP16: 0x7E00}[dtype]]


@numba.njit
def fp8_rows(x: Any, scales: Any, dynamic: Any, out: Any) -> None:
    for i in range(len(x)):
        if dynamic:
            scales[i] = dynamic_scale(x[i])
        fake_quantize_fp8(x[i], scales[i], out[i])


def with_fp8(x: Tensor, scale: float | None) -> Tensor:
    out = torch.empty(x.shape)
    scales = np.full(len(x), 0.0 if scale is None else scale, np.float32)
    fp8_rows(x.float().numpy(), scales, scale is None, out.numpy())
    return out.to(x.dtype)


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.3, 7.1e-3, 1e-30, 1e-42, 3e38])
@each_dtype
def test_static_fp8(dtype: torch.dtype, scale: float) -> None:
    grid = torch.cat([ties(f).view(1, -1) for f in BLOCK_FORMATS], 1)
    everything = floats(torch.arange(-(2**15), 2**15, dtype=torch.int64) * 65536 + 0x1234)[None]
    for x in (grid, grid * scale, everything, everything * scale):
        expected = fake_quantize_static(x.to(dtype), torch.tensor(scale))
        assert same(with_fp8(x.to(dtype), scale), expected)


@each_dtype
@pytest.mark.parametrize("k", [1, 31, 48, 200])
def test_dynamic_fp8(dtype: torch.dtype, k: int) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(300, k, generator=generator) * torch.logspace(-44, 38, 300)[:, None]
    x[5], x[6] = 0.0, -0.0
    x[7, k // 2], x[8, k // 3] = torch.nan, -torch.inf
    assert same(with_fp8(x.to(dtype), None), fake_quantize_dynamic(x.to(dtype)))
