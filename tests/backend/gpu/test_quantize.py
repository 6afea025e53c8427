"""quantize, dequantize and fake_quantize in Triton against the reference, bit by bit."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mxperts.backend import reference
from mxperts.backend.gpu.elements import decode_weight_tile
from mxperts.backend.gpu.quantize import (
    dequantize,
    fake_quantize,
    fake_quantize_fp8_dynamic,
    fake_quantize_fp8_static,
    quantize,
)
from mxperts.backend.gpu.rule import block_rule, element_rule
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
from mxperts.packing import pack

module = importlib.import_module("mxperts.backend.gpu.quantize")  # the package has a function of this name

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (FP32, BF16, FP16)
ROUNDINGS = [r for r in Rounding if r is not Rounding.STOCHASTIC]

each_format = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Under the interpreter NumPy warns of the numbers that these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal bits, signs of zeros included; every NaN equals every other."""
    if found.dtype is not expected.dtype or found.shape != expected.shape:
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    found = found.cpu()
    equal = found.contiguous().view(integer) == expected.contiguous().view(integer)
    if found.is_floating_point():
        equal |= found.isnan() & expected.isnan()
    return bool(equal.all())


def assert_as_reference(x: Tensor, fmt: BlockFormat, choices: Recipe, device: str) -> None:
    packed, scales = reference.quantize(x, fmt, choices)
    found = quantize(on(device, x), fmt, choices)
    assert same(found[1], scales), choices
    assert same(found[0], packed), choices
    values = reference.dequantize(packed, scales, fmt, x.shape[-1], x.dtype)
    assert same(dequantize(*found, fmt, x.shape[-1], x.dtype), values), choices
    assert same(fake_quantize(on(device, x), fmt, choices), values), choices


def on(device: str, x: Tensor) -> Tensor:
    """``x`` there, with its strides."""
    if x.device.type == device:
        return x
    storage = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype, device=device)
    storage.copy_(x.as_strided(storage.shape, (1,), 0))
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


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


def pattern_blocks(dtype: torch.dtype) -> Tensor:
    """[32768, 4]: each pattern and its negative are the largest of a block once, with two smaller ones."""
    largest = torch.arange(1 << 15, dtype=torch.int32)[:, None]
    patterns = torch.cat([largest, largest, largest * 31 // 32, largest * 7 // 8], 1)
    signs = (torch.arange(4, dtype=torch.int32) + largest) % 2
    return (patterns | (signs << 15)).to(torch.int16).view(dtype)


@each_format
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_pattern_under_every_scale_rule(fmt: BlockFormat, dtype: torch.dtype, device: str) -> None:
    """The reference gets blocks of 4; zeros up to 32 change nothing."""
    x = pattern_blocks(dtype)
    assert len(x[:, :2].view(torch.int16).unique()) == 1 << 16
    padded = torch.nn.functional.pad(x, (0, 28)).to(device)
    short = dataclasses.replace(fmt, block_size=4)
    for rule in ScaleRule:
        choices = Recipe(scale_rule=rule)
        packed, scales = reference.quantize(x, short, choices)
        found = quantize(padded, fmt, choices)
        assert same(found[1], scales), choices
        assert same(found[0][:, : packed.shape[1]], packed), choices
    assert same(fake_quantize(padded, fmt, choices)[:, :4], reference.dequantize(packed, scales, short, 4, dtype))


@each_format
def test_float32_under_every_preset(fmt: BlockFormat, device: str) -> None:
    x = torch.cat([random_blocks(600, seed=1), thresholds(fmt)])
    for choices in dict.fromkeys(p.recipe(fmt, role) for p in PRESETS.values() for role in Role):
        assert_as_reference(x, fmt, choices, device)


@each_format
@pytest.mark.parametrize("rule", ScaleRule, ids=lambda r: r.value)
def test_float32_under_a_covering_set_of_recipes(fmt: BlockFormat, rule: ScaleRule, device: str) -> None:
    """Each rounding with each treatment of zero; the other choices take turns."""
    x = torch.cat([random_blocks(300, seed=len(rule.value)), thresholds(fmt), torch.zeros(1, 32), -torch.zeros(1, 32)])
    x[-6:-4, 3:9] = torch.tensor([torch.nan, 0.0, -0.0, -torch.nan, torch.inf, -torch.inf])
    x[-4, 5:], x[-3, 5:] = 0.0, torch.nan
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
        assert_as_reference(x, fmt, choices, device)


@each_format
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=lambda r: r.value)
def test_every_tie(fmt: BlockFormat, rounding: Rounding, device: str) -> None:
    for use_min in (False, True):
        choices = Recipe(scale_rule=ScaleRule.RCEIL, rounding=rounding, use_min=use_min)
        assert_as_reference(ties(fmt), fmt, choices, device)


@each_format
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_every_code_under_every_scale(fmt: BlockFormat, dtype: torch.dtype, device: str) -> None:
    count = 1 << fmt.element.bits
    packed = pack((torch.arange(max(count, 32)) % count).to(torch.uint8), fmt).expand(256, -1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, max(count, 32) // 32)
    expected = reference.dequantize(packed, scales, fmt, max(count, 32), dtype)
    assert same(dequantize(packed.to(device), scales.to(device), fmt, max(count, 32), dtype), expected)


@triton.jit
def weight_tiles(
    packed, scales, out, rows, blocks, ELEMENT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    values = decode_weight_tile(
        packed, scales, row, row < rows, tl.program_id(1) * BLOCK_K, blocks, BLOCK_K, ELEMENT, out.dtype.element_ty
    )
    columns = tl.num_programs(1) * BLOCK_K
    tl.store(out + (row * columns)[:, None] + k[None, :], values)


@each_format
@each_dtype
def test_tiles_of_weights(fmt: BlockFormat, dtype: torch.dtype, device: str) -> None:
    """Rows and columns beyond the weights are 0."""
    generator = torch.Generator().manual_seed(7)
    packed = torch.randint(0, 256, (21, fmt.packed_size(160)), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 256, (21, 5), dtype=torch.uint8, generator=generator)
    out = torch.empty(32, 192, dtype=dtype, device=device)
    weight_tiles[(2, 3)](packed.to(device), scales.to(device), out, 21, 5, element_rule(fmt), 16, 64)
    expected = torch.zeros(32, 192, dtype=dtype)
    expected[:21, :160] = reference.dequantize(packed, scales, fmt, 160, dtype)
    assert same(out, expected)


# Shapes and layouts


@each_dtype
def test_every_length_of_a_row(dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    formats = itertools.cycle(BLOCK_FORMATS)
    lengths = [*range(1, 71), 2880] if dtype is BF16 else [1, 15, 31, 33, 40, 63, 65, 100]
    for k in lengths:
        x = torch.randn(3, k, generator=generator).to(dtype)
        x[1, k // 2] = torch.nan
        fmt = next(formats)
        assert_as_reference(x, fmt, recipe(fmt, Role.ACTIVATION), device)


@each_dtype
@pytest.mark.parametrize("shape", [(0, 32), (0, 3, 40), (2, 0, 33), (40,), (64,), (2, 3, 40)], ids=str)
def test_shapes(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_as_reference(x, MXFP6_E3M2, Recipe(), device)


@each_dtype
def test_layout_in_memory_does_not_matter(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(64, 6, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    views = (x.transpose(0, 2), x.transpose(0, 1), x[::2], x[..., 1:], x[..., ::2], x[:, :1].expand(64, 6, 64), x[1:])
    for view in views:
        assert_as_reference(view, MXFP4, Recipe(), device)
    whole = x.flatten()[1:33]  # starts where vectors do not
    assert_as_reference(whole, MXFP4, Recipe(), device)
    packed, scales = reference.quantize(x, MXFP4, Recipe())
    expected = reference.dequantize(packed, scales, MXFP4, 64, dtype).transpose(0, 1)
    packed, scales = packed.to(device).transpose(0, 1), scales.to(device).transpose(0, 1)
    assert same(dequantize(packed, scales, MXFP4, 64, dtype), expected)
    shifted = torch.cat([packed.new_zeros(1), packed.flatten()])[1:].view(packed.shape)  # not aligned
    assert same(dequantize(shifted, scales, MXFP4, 64, dtype), expected)


@each_format
@pytest.mark.parametrize("k", [32, 50])
def test_more_blocks_than_one_program_takes(fmt: BlockFormat, k: int, device: str, monkeypatch: Any) -> None:
    x = torch.randn(37, k, generator=torch.Generator().manual_seed(3)).to(BF16)
    assert_as_reference(x, fmt, Recipe(), device)
    monkeypatch.setattr(module, "blocks_per_program", lambda blocks, element_size: 16)
    assert_as_reference(x, fmt, Recipe(), device)


def test_inputs_that_need_a_gradient_are_taken_and_left_alone(device: str) -> None:
    x = torch.randn(3, 40, device=device, requires_grad=True)
    before = x.detach().clone()
    assert not fake_quantize(x, MXFP4, Recipe()).requires_grad
    quantize(x, MXFP4, Recipe())
    assert torch.equal(x, before)


# Refused numbers, random rounding


@pytest.mark.parametrize("function", [quantize, fake_quantize])
def test_nan_and_inf_can_be_refused(function: Any, device: str) -> None:
    x = torch.ones(2, 40, device=device)
    x[1, 3] = torch.nan
    with pytest.raises(ArgumentError, match=r"^x holds NaN, which this recipe refuses$"):
        function(x, MXFP4, Recipe(nan=NonFinite.RAISE))
    x[0, 3] = -torch.inf
    with pytest.raises(ArgumentError, match=r"^x holds Inf, which this recipe refuses$"):
        function(x, MXFP4, Recipe(inf=NonFinite.RAISE))
    assert_as_reference(torch.ones(2, 40), MXFP4, Recipe(nan=NonFinite.RAISE, inf=NonFinite.RAISE), device)


@each_format
def test_stochastic_rounding_is_the_references(fmt: BlockFormat, device: str) -> None:
    x, choices = torch.randn(5, 40, device=device), Recipe(rounding=Rounding.STOCHASTIC)

    def generator() -> torch.Generator:
        return torch.Generator(device).manual_seed(4)

    for found, expected in zip(
        quantize(x, fmt, choices, generator()), reference.quantize(x, fmt, choices, generator()), strict=True
    ):
        assert torch.equal(found, expected)
    expected = reference.fake_quantize(x, fmt, choices, generator())
    assert torch.equal(fake_quantize(x, fmt, choices, generator()), expected)
    for function in (quantize, fake_quantize):
        with pytest.raises(ArgumentError, match="needs a generator"):
            function(x, fmt, choices)
    with pytest.raises(ArgumentError, match="needs a generator"):
        block_rule(fmt, choices)


# E4M3 activations


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.3, 7.1e-3, 1e-30, 1e-42, 3e38])
@each_dtype
def test_static_fp8(dtype: torch.dtype, scale: float, device: str) -> None:
    grid = torch.cat([ties(f).view(1, -1) for f in BLOCK_FORMATS], 1)
    everything = floats(torch.arange(-(2**15), 2**15, dtype=torch.int64) * 65536 + 0x1234)[None]
    for x in (grid, grid * scale, everything, everything * scale):
        expected = fake_quantize_static(x.to(dtype), torch.tensor(scale))
        assert same(fake_quantize_fp8_static(x.to(dtype).to(device), torch.tensor(scale, device=device)), expected)


@pytest.mark.parametrize("shape", [(), (1,), (5, 1, 1), (3, 1), (5, 3, 1), (70,), (5, 3, 70)], ids=str)
def test_static_fp8_scales_are_broadcast(shape: tuple[int, ...], device: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x, scale = torch.randn(5, 3, 70, generator=generator).to(BF16), torch.rand(shape, generator=generator) + 0.01
    found = fake_quantize_fp8_static(on(device, x.transpose(0, 1)).transpose(0, 1), scale.to(device))
    assert same(found, fake_quantize_static(x, scale))


@each_dtype
@pytest.mark.parametrize("k", [1, 31, 48, 200])
def test_dynamic_fp8(dtype: torch.dtype, k: int, device: str, monkeypatch: Any) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(300, k, generator=generator) * torch.logspace(-44, 38, 300)[:, None]
    x[5], x[6] = 0.0, -0.0
    x[7, k // 2], x[8, k // 3] = torch.nan, -torch.inf
    x = x.to(dtype)
    assert same(fake_quantize_fp8_dynamic(x.to(device)), fake_quantize_dynamic(x))
    monkeypatch.setattr(module, "MOST_COLUMNS", 64)  # tokens in more than one part
    assert same(fake_quantize_fp8_dynamic(x[:20].to(device)), fake_quantize_dynamic(x[:20]))


def test_fp8_of_no_tokens(device: str) -> None:
    assert fake_quantize_fp8_dynamic(torch.empty(0, 8, device=device)).shape == (0, 8)
    assert fake_quantize_fp8_static(torch.empty(0, 8, device=device), torch.ones(1, device=device)).shape == (0, 8)
