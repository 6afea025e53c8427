"""quantize, dequantize and fake_quantize: golden blocks, exhaustive sweeps, every policy, what PyTorch asks of them."""

import dataclasses
import itertools
import math
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from integer_formulas import quantize as quantize_in_integers
from torch import Tensor

import mxperts as mx
from mxperts.backend import reference
from mxperts.errors import ArgumentError, BackendUnavailable, FormatError
from mxperts.formats import (
    BLOCK_FORMATS,
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

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (FP32, BF16, FP16)
FP4, E2M3, E3M2 = mx.MXFP4, mx.MXFP6_E2M3, mx.MXFP6_E3M2
E4M3, E5M2, INT8 = mx.MXFP8_E4M3, mx.MXFP8_E5M2, mx.MXINT8
DETERMINISTIC = [r for r in Rounding if r is not Rounding.STOCHASTIC]

each_format = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_rule = pytest.mark.parametrize("rule", ScaleRule, ids=lambda r: r.value)


def block(*values: float, dtype: torch.dtype = FP32) -> Tensor:
    """One block [1, 32] that starts with these values; the others are zero."""
    return torch.tensor([[*values, *[0.0] * (32 - len(values))]], dtype=torch.float64).to(dtype)


def quantized(x: Tensor, fmt: BlockFormat, count: int, **choices: object) -> tuple[int, str]:
    """Scale byte and the first codes, as hexadecimal text, of one block."""
    t = mx.quantize(x, fmt, **choices)
    return int(t.scales), " ".join(f"{c:x}" for c in t.codes()[0, :count].tolist())


def bits32(x: Tensor) -> np.ndarray:
    return x.to(FP32).view(torch.int32).numpy().view(np.uint32)


# Golden blocks, by hand: letters as in docs/numerics.md

BLOCK_A = block(6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -2.5, -5, -0.125, -0.0, 0.1, dtype=BF16)
BLOCK_B = block(6.5, 4.0, 3.0, 1.0, 0.5, -2.0)


@pytest.mark.parametrize(
    ("choices", "codes"),
    [
        ({"preset": "torchao"}, "7 0 2 2 4 4 6 6 8 a a c e 8 8 0"),
        ({"preset": "vllm"}, "7 0 2 2 4 4 6 6 8 a a c e 8 8 0"),
        ({"preset": "quark"}, "7 0 2 2 4 4 6 6 0 a a c e 0 0 0"),
        ({}, "7 0 2 2 4 4 6 6 0 a a c e 0 0 0"),
        ({"role": "activation"}, "7 0 2 2 4 4 6 6 8 a a c e 8 8 0"),
        ({"preset": "compressed_tensors"}, "7 0 2 2 4 4 6 6 8 a a c e 8 0 0"),
        ({"preset": "triton_kernels"}, "7 1 2 3 4 5 6 7 9 a b d f 8 8 0"),
        ({"preset": "ggml"}, "7 0 1 2 3 4 5 6 0 9 a c e 0 0 0"),
        ({"rounding": "toward_zero"}, "7 0 1 2 3 4 5 6 0 9 a c e 0 0 0"),
    ],
    ids=str,
)
def test_golden_block_a_ties_and_signs_of_zero(choices: dict[str, object], codes: str) -> None:
    assert quantized(BLOCK_A, FP4, 16, **choices) == (127, codes)


@pytest.mark.parametrize(
    ("x", "fmt", "rule", "scale", "codes"),
    [
        (BLOCK_B, FP4, "floor", 127, "7 6 5 2 1 c"),
        (BLOCK_B, FP4, "even", 127, "7 6 5 2 1 c"),
        (BLOCK_B, FP4, "rceil", 128, "5 4 3 1 0 a"),
        (BLOCK_B, FP4, "ceil", 128, "5 4 3 1 0 a"),
        (block(7.0), FP4, "floor", 127, "7"),
        (block(7.0), FP4, "even", 128, "6"),
        (block(7.0), FP4, "rceil", 128, "6"),
        (block(7.0), FP4, "ceil", 128, "6"),
        (block(5.0, 6.0 / 2, 1.0, -2.0), FP4, "floor", 127, "6 5 2 c"),
        (block(5.0, 6.0 / 2, 1.0, -2.0), FP4, "even", 127, "6 5 2 c"),
        (block(5.0, 6.0 / 2, 1.0, -2.0), FP4, "rceil", 127, "6 5 2 c"),
        (block(5.0), FP4, "ceil", 128, "4"),
        (block(5.0, 3.0, 1.0, -2.0), FP4, "rfloor", 126, "7 7 4 e"),
        (block(15.999999), FP4, "floor", 128, "7"),
        (block(15.9375, dtype=BF16), FP4, "floor", 128, "7"),
        (block(460.0), E4M3, "floor", 127, "7e"),
        (block(460.0), E4M3, "even", 127, "7e"),
        (block(460.0), E4M3, "rceil", 128, "76"),
        (block(500.0), E4M3, "floor", 127, "7e"),
        (block(500.0), E4M3, "even", 128, "78"),
        (block(500.0), E4M3, "rceil", 128, "78"),
        (block(30.0), E3M2, "floor", 127, "1f"),
        (block(30.0), E3M2, "even", 128, "1c"),
        (block(30.0), E3M2, "rceil", 128, "1c"),
        (block(2.0**-127, 0.5 * 2.0**-127, -(2.0**-128)), FP4, "even", 0, "2 1 9"),
        (block(torch.finfo(FP32).max), FP4, "floor", 252, "7"),
        (block(torch.finfo(FP32).max), FP4, "rceil", 253, "6"),
        (block(torch.finfo(FP32).max), FP4, "even", 254, "4"),
        (block(1.99, -1.99, 1.0, -1.0), INT8, "floor", 127, "7f 81 40 c0"),
    ],
    ids=lambda v: "" if isinstance(v, Tensor) else str(v),
)
def test_golden_blocks_b_to_p_scale_rules(x: Tensor, fmt: BlockFormat, rule: str, scale: int, codes: str) -> None:
    count = len(codes.split())
    assert quantized(x, fmt, count, scale_rule=rule, signed_zero="keep") == (scale, codes)


def test_the_same_mxfp8_block_under_two_presets() -> None:
    """Block L: compressed-tensors steps at 1.75, Quark at 1.9375, vLLM above 448."""
    x = block(460.0)
    assert [int(mx.quantize(x, E4M3, preset=p).scales) for p in ("quark", "ocp", "compressed_tensors", "vllm")] == [
        127,
        127,
        128,
        128,
    ]


@pytest.mark.parametrize("name", PRESETS)
@each_format
def test_a_block_of_zeros_has_scale_zero_or_quarks_one(name: str, fmt: BlockFormat) -> None:
    t = mx.quantize(block(), fmt, preset=name)
    assert int(t.scales) == (1 if name == "quark" and fmt in (FP4, E2M3, E3M2) else 0)
    assert not t.codes().any()


# Scale rules


def expected_exponent(amax: Fraction, fmt: BlockFormat, rule: ScaleRule) -> int:
    """The rule as it is stated in ``ScaleRule``, in fractions."""

    def floor_log2(v: Fraction) -> int:
        e = math.floor(math.log2(v.numerator) - math.log2(v.denominator))
        return e + (v >= Fraction(2) ** (e + 1)) - (v < Fraction(2) ** e)

    def ceil_log2(v: Fraction) -> int:
        return -floor_log2(1 / v)

    element = fmt.element
    e = floor_log2(amax)
    match rule:
        case ScaleRule.FLOOR:
            return e - element.emax
        case ScaleRule.EVEN:
            ulp = Fraction(2) ** (e - element.mantissa_bits)
            return floor_log2(math.floor(amax / ulp + Fraction(1, 2)) * ulp) - element.emax
        case ScaleRule.RCEIL:
            return ceil_log2(amax / Fraction(element.max))
        case ScaleRule.CEIL:
            return ceil_log2(amax) - element.emax
        case ScaleRule.RFLOOR:
            return floor_log2(amax / Fraction(element.max))


@each_format
@each_rule
def test_scale_rules_at_their_thresholds_and_one_ulp_beside_them(fmt: BlockFormat, rule: ScaleRule) -> None:
    element = fmt.element
    mantissas = [1.0, element.max / 2.0**element.emax, *(2.0 - 2.0 ** -(b + 1) for b in (1, 2, 3, 7))]
    powers = [2.0**e for e in (-100, -3, 0, 1, 4, 20, 100)]
    thresholds = torch.tensor([m * p for m, p in itertools.product(mantissas, powers)], dtype=FP32)
    amax = torch.stack([(thresholds.view(torch.int32) + step).view(FP32) for step in (-1, 0, 1)]).flatten()
    x = torch.zeros(len(amax), 32)
    x[:, 17] = -amax
    scales = mx.quantize(x, fmt, scale_rule=rule).scales[:, 0].tolist()
    expected = [127 + expected_exponent(Fraction(a), fmt, rule) for a in amax.double().tolist()]
    assert scales == expected


@each_format
def test_rceil_is_the_smallest_scale_at_which_nothing_saturates(fmt: BlockFormat) -> None:
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0)) * 3
    amax = x.abs().amax(-1).double()
    scale = torch.exp2(mx.quantize(x, fmt, scale_rule="rceil").scales[:, 0].double() - 127)
    assert (amax <= fmt.element.max * scale).all()
    assert (amax > fmt.element.max * scale / 2).all()


# All 65,536 patterns of bf16 and fp16


def pattern_blocks(dtype: torch.dtype) -> Tensor:
    """Blocks [32768, 8] in which each pattern and its negative are the largest, with smaller ones down to zero."""
    largest = torch.arange(1 << 15, dtype=torch.int32)[:, None]
    columns = torch.arange(8, dtype=torch.int32)
    patterns = largest * (8 - columns) // 8
    patterns[:, 4] = largest[:, 0]
    signs = (columns + largest) % 2
    signs[:, 4] = 1 - signs[:, 0]
    return (patterns | (signs << 15)).to(torch.int16).view(dtype)


@each_format
@each_rule
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_every_pattern_equals_the_integer_formulas(fmt: BlockFormat, rule: ScaleRule, dtype: torch.dtype) -> None:
    """Blocks of 8: no formula knows the size of a block, and each pattern needs one of its own."""
    x = pattern_blocks(dtype)
    assert len(x[:, [0, 4]].view(torch.int16).unique()) == 1 << 16
    short, choices = dataclasses.replace(fmt, block_size=8), recipe(fmt, "weight", preset="ocp", scale_rule=rule)
    ours = mx.MXTensor(*reference.quantize(x, short, choices), short, 8)
    codes, scales = quantize_in_integers(bits32(x), short, choices)
    np.testing.assert_array_equal(ours.scales[:, 0].numpy(), scales)
    np.testing.assert_array_equal(ours.codes().numpy(), codes)


@each_format
@pytest.mark.parametrize("rounding", DETERMINISTIC, ids=lambda r: r.value)
@pytest.mark.parametrize("zero", SignedZero, ids=lambda z: z.value)
def test_random_float32_patterns_equal_the_integer_formulas(
    fmt: BlockFormat, rounding: Rounding, zero: SignedZero
) -> None:
    """Random bits: every exponent, subnormals, a few Inf and NaN; then one exponent shared by the whole block."""
    generator = torch.Generator().manual_seed(DETERMINISTIC.index(rounding))
    anything = torch.randint(-(2**31), 2**31, (60, 32), generator=generator)
    centre = torch.randint(0, 250, (120, 1), generator=generator)
    exponent = (centre - torch.randint(0, 12, (120, 32), generator=generator)).clamp(min=0)
    mantissa = torch.randint(0, 2**23, (120, 32), generator=generator) & -(
        2 ** torch.randint(0, 23, (120, 32), generator=generator)
    )
    near = (exponent << 23) | mantissa | (torch.randint(0, 2, (120, 32), generator=generator) << 31)
    x = torch.cat([anything, near - (near >> 31 << 32)]).to(torch.int32).view(FP32)
    for use_min in (False, True):
        choices = Recipe(rounding=rounding, signed_zero=zero, use_min=use_min, zero_block_scale=3)
        t = reference.quantize(x, fmt, choices)
        ours = mx.MXTensor(*t, fmt, 32)
        codes, scales = quantize_in_integers(bits32(x), fmt, choices)
        np.testing.assert_array_equal(ours.scales[:, 0].numpy(), scales)
        np.testing.assert_array_equal(ours.codes().numpy(), codes)


# Rounding


@each_format
@pytest.mark.parametrize("rounding", DETERMINISTIC, ids=lambda r: r.value)
def test_every_tie_of_every_format(fmt: BlockFormat, rounding: Rounding) -> None:
    """Exactly between codes c and c+1, and one ulp of float32 to either side of it."""
    magnitudes = fmt.element.magnitudes
    ties = [(c, (a + b) / 2) for c, (a, b) in enumerate(itertools.pairwise(magnitudes))]
    for side in (-1, 0, 1):
        values = torch.tensor([v for _, v in ties], dtype=FP32)
        values = (values.view(torch.int32) + side).view(FP32)
        x = torch.zeros(len(ties), 32)
        x[:, 0], x[:, 1], x[:, 2] = fmt.element.max, values, -values
        codes = mx.quantize(x, fmt, scale_rule="rceil", rounding=rounding, signed_zero="keep").codes()
        for (c, _), positive, negative in zip(ties, codes[:, 1].tolist(), codes[:, 2].tolist(), strict=True):
            up = {
                Rounding.NEAREST_EVEN: side > 0 or (side == 0 and c % 2 == 1),
                Rounding.HALF_AWAY: side >= 0,
                Rounding.HALF_TOWARD_ZERO: side > 0,
                Rounding.TOWARD_ZERO: False,
            }[rounding]
            assert positive == c + up
            mirrored = -positive % 256 if fmt is INT8 else positive | fmt.element.sign_bit
            assert negative == mirrored


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ("nearest_even", [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]),
        ("half_away", [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]),
        ("half_toward_zero", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]),
        ("toward_zero", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]),
    ],
)
def test_the_seven_ties_of_fp4_by_hand(rounding: str, expected: list[float]) -> None:
    x = block(6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
    assert mx.fake_quantize(x, FP4, rounding=rounding)[0, 1:8].tolist() == expected
    assert mx.fake_quantize(-x, FP4, rounding=rounding)[0, 1:8].tolist() == [-v for v in expected]


@each_format
def test_stochastic_rounding_is_unbiased(fmt: BlockFormat) -> None:
    """Each mean lies within six standard errors of the value; the variance follows from the two neighbours."""
    magnitudes = torch.tensor(fmt.element.magnitudes, dtype=torch.float64)
    low = magnitudes[torch.arange(24) * (len(magnitudes) - 1) // 24]
    high = magnitudes[torch.arange(24) * (len(magnitudes) - 1) // 24 + 1]
    probability = torch.linspace(0.02, 0.98, 24, dtype=torch.float64)
    value = (low + (high - low) * probability).float().double()
    probability = (value - low) / (high - low)
    samples = 4000
    x = torch.zeros(samples, 32)
    x[:, 0], x[:, 1:25] = fmt.element.max, value * torch.tensor([1.0, -1.0]).repeat(12)
    q = mx.fake_quantize(x, fmt, scale_rule="rceil", rounding="stochastic", generator=torch.Generator().manual_seed(3))
    q = q[:, 1:25].double().abs()
    assert ((q == low) | (q == high)).all(), "only the two neighbours occur"
    standard_error = (high - low) * (probability * (1 - probability) / samples).sqrt()
    assert ((q.mean(0) - value).abs() <= 6 * standard_error).all()


@each_format
def test_stochastic_rounding_leaves_exact_values_alone(fmt: BlockFormat) -> None:
    values = torch.tensor([*fmt.element.magnitudes, *[0.0] * (-len(fmt.element.magnitudes) % 31)]).view(-1, 31)
    x = torch.cat([torch.full((len(values), 1), fmt.element.max), values], 1).repeat(4, 1)
    for seed in range(3):
        q = mx.fake_quantize(
            x, fmt, scale_rule="rceil", rounding="stochastic", generator=torch.Generator().manual_seed(seed)
        )
        assert torch.equal(q, x)


def test_stochastic_rounding_follows_its_generator_and_saturates() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))

    def draw(seed: int) -> Tensor:
        return mx.quantize(x, FP4, rounding="stochastic", generator=torch.Generator().manual_seed(seed)).packed

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    t = mx.quantize(
        block(7.99), FP4, scale_rule="floor", rounding="stochastic", generator=torch.Generator().manual_seed(0)
    )
    assert int(t.codes()[0, 0]) == 7


# Range: saturation, zeros, subnormals, Inf, NaN


@each_format
@each_dtype
def test_values_beyond_the_range_saturate_with_their_sign(fmt: BlockFormat, dtype: torch.dtype) -> None:
    """Section 6.3: under floor everything between max and the next power of two is clamped."""
    element = fmt.element
    largest = (2.0 ** (element.emax + 1)) * (1 - torch.finfo(dtype).eps)
    q = mx.fake_quantize(block(largest, -largest, dtype=dtype), fmt, scale_rule="floor")
    assert q[0, :2].double().tolist() == [element.max, -element.max]


def test_int8_takes_its_most_negative_code_only_when_asked() -> None:
    x = block(1.999, -1.999, -1.99)
    assert mx.quantize(x, INT8).codes()[0, :3].tolist() == [0x7F, 0x81, 0x81]
    packed, scales = reference.quantize(x, INT8, Recipe(scale_rule=ScaleRule.FLOOR, use_min=True))
    assert mx.MXTensor(packed, scales, INT8, 32).codes()[0, :3].tolist() == [0x7F, 0x80, 0x81]


@pytest.mark.parametrize("fmt", BLOCK_FORMATS[:5], ids=str)
@pytest.mark.parametrize(("zero", "codes"), [("keep", "110"), ("drop", "000"), ("keep_rounded", "010")])
def test_signs_of_zero(fmt: BlockFormat, zero: str, codes: str) -> None:
    """-0 itself, a negative number that rounds to zero, a positive one; also in a block with nothing else."""
    x = block(-0.0, -(2.0**-60), 2.0**-60, 1.0)
    found = mx.quantize(x, fmt, signed_zero=zero).codes()[0, :3] >> (fmt.element.bits - 1)
    assert "".join(map(str, found.tolist())) == codes
    only = mx.fake_quantize(block(-0.0), fmt, signed_zero=zero)
    assert bool(only[0, 0].signbit()) == (zero == "keep")


@each_format
@each_dtype
def test_subnormal_inputs_are_numbers_like_others(fmt: BlockFormat, dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    tiny = smallest * torch.finfo(dtype).eps
    x = block(*(tiny * n for n in (0, 1, 2, 3, 5, 100)), smallest, -smallest / 2, dtype=dtype)
    assert (x[0, 1:8] != 0).all()
    t = mx.quantize(x, fmt, preset="ocp", scale_rule="floor")
    codes, scales = quantize_in_integers(bits32(x), fmt, recipe(fmt, "weight", preset="ocp"))
    assert t.scales[0].tolist() == scales.tolist()
    assert t.codes()[0].tolist() == codes[0].tolist()


@each_format
@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_by_default_one_nan_or_inf_makes_its_block_nan(fmt: BlockFormat, dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(2, 96, dtype=dtype)
    x[1, 40] = bad
    t = mx.quantize(x, fmt)
    assert (t.scales == 255).tolist() == [[False, False, False], [False, True, False]]
    assert not t.codes()[1, 32:64].any(), "the codes of such a block are zero"
    q = mx.dequantize(t, dtype)
    assert q[1, 32:64].isnan().all()
    assert q.isnan().sum() == 32


@each_format
@each_rule
def test_saturation_makes_inf_and_nan_the_largest_value(fmt: BlockFormat, rule: ScaleRule) -> None:
    largest = len(fmt.element.magnitudes) - 1
    negative = (-largest) % 256 if fmt is INT8 else largest | fmt.element.sign_bit
    t = mx.quantize(block(math.inf, -math.inf, 1.0), fmt, preset="ocp", scale_rule=rule, inf="saturate")
    assert t.codes()[0, :3].tolist() == [largest, negative, 0]
    exponent = expected_exponent(Fraction(2) ** 128, fmt, rule)
    assert int(t.scales) == 127 + min(127, exponent)
    t = mx.quantize(block(math.nan, 1.0), fmt, scale_rule=rule, nan="saturate")
    assert int(t.codes()[0, 0]) == largest
    assert int(t.scales) == 127 + expected_exponent(Fraction(1), fmt, rule), "NaN is left out of amax"


def test_each_of_inf_and_nan_has_its_own_policy() -> None:
    both = block(math.nan, math.inf, 1.0)
    assert int(mx.quantize(both, FP4, nan="saturate").scales) == 255
    assert int(mx.quantize(both, FP4, inf="saturate").scales) == 255
    assert int(mx.quantize(both, FP4, nan="saturate", inf="saturate").scales) == 254
    with pytest.raises(ArgumentError, match=r"^x holds NaN, which this recipe refuses$"):
        mx.quantize(both, FP4, nan=NonFinite.RAISE)
    with pytest.raises(ArgumentError, match=r"^x holds Inf, which this recipe refuses$"):
        mx.quantize(both, FP4, inf="raise")
    mx.quantize(block(1.0), FP4, nan="raise", inf="raise")


# Decoding


@each_format
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_every_code_under_every_scale_decodes_exactly_once_rounded(fmt: BlockFormat, dtype: torch.dtype) -> None:
    count = 1 << fmt.element.bits
    codes = (torch.arange(max(count, 32)) % count).to(torch.uint8)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, len(codes) // 32)
    q = mx.dequantize(mx.MXTensor.from_codes(codes.expand(256, -1), scales, fmt), dtype)

    values = np.array([fmt.element.decode(c) for c in codes.tolist()])
    with np.errstate(over="ignore", invalid="ignore"):
        exact = np.ldexp(values[None, :], np.arange(256)[:, None] - 127)
        exact[255] = np.nan
        single = exact.astype(np.float32)
        assert (np.isinf(single) | (single == exact) | np.isnan(exact)).all(), "float32 holds every product in range"
        match dtype:
            case torch.float64:
                expected = exact
            case torch.float32:
                expected = single
            case torch.float16:
                expected = single.astype(np.float16)
            case torch.bfloat16:
                expected = round_to_bf16(single)
    found = q.double().numpy()
    np.testing.assert_array_equal(found, expected.astype(np.float64))
    number = ~np.isnan(found)
    np.testing.assert_array_equal(np.signbit(found)[number], np.signbit(expected)[number])


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even, in integers."""
    bits = x.view(np.uint32).astype(np.int64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    rounded = np.where(np.isnan(x), 0x7FC00000, rounded)
    return rounded.astype(np.uint32).view(np.float32)


def test_scale_bytes_at_the_ends() -> None:
    """Byte 0 is 2^-127, 254 is 2^127, 255 is NaN: section 5.4.1."""
    codes = torch.full((4, 32), 2, dtype=torch.uint8)  # 1.0
    t = mx.MXTensor.from_codes(codes, torch.tensor([[0], [1], [254], [255]], dtype=torch.uint8), FP4)
    q = mx.dequantize(t, torch.float32)[:, 0]
    assert q[:3].tolist() == [2.0**-127, 2.0**-126, 2.0**127]
    assert q[3].isnan()


def test_products_beyond_the_range_become_inf() -> None:
    codes = torch.tensor([[7] * 16 + [15] * 16], dtype=torch.uint8)
    t = mx.MXTensor.from_codes(codes, torch.tensor([[254]], dtype=torch.uint8), FP4)
    for dtype in DTYPES:
        assert mx.dequantize(t, dtype)[0, [0, 31]].tolist() == [math.inf, -math.inf]
    assert mx.dequantize(t, torch.float64)[0, 0] == 6 * 2.0**127


# Shapes and layouts


@each_format
@each_dtype
@pytest.mark.parametrize("shape", [(1,), (33,), (3, 1), (2, 40), (2, 3, 64), (1, 2, 3, 31)], ids=str)
def test_shapes_and_tails(fmt: BlockFormat, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A last block that is not full gives what it gives when padded with zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    t = mx.quantize(x, fmt)
    k = shape[-1]
    whole = mx.quantize(torch.nn.functional.pad(x, (0, -k % 32)), fmt)
    assert t.shape == shape
    assert torch.equal(t.packed, whole.packed)
    assert torch.equal(t.scales, whole.scales)
    assert torch.equal(mx.dequantize(t, dtype), mx.dequantize(whole, dtype)[..., :k])
    q = mx.fake_quantize(x, fmt, role="weight")
    assert q.shape == x.shape
    assert q.dtype is dtype
    assert torch.equal(q, mx.dequantize(t, dtype))


@pytest.mark.parametrize("shape", [(0, 32), (0, 3, 40), (2, 0, 32)], ids=str)
def test_there_may_be_no_rows(shape: tuple[int, ...]) -> None:
    t = mx.quantize(torch.empty(shape), FP4)
    assert t.shape == shape
    assert mx.dequantize(t).shape == shape
    assert mx.fake_quantize(torch.empty(shape), FP4).shape == shape


@each_format
def test_layout_in_memory_does_not_matter(fmt: BlockFormat) -> None:
    x = torch.randn(64, 6, 40, generator=torch.Generator().manual_seed(2))
    for view in (x.transpose(0, 2), x.transpose(0, 1), x[::2], x[..., ::2], x[:, :1].expand(64, 6, 40)):
        assert torch.equal(mx.quantize(view, fmt).packed, mx.quantize(view.contiguous(), fmt).packed)
        assert torch.equal(mx.fake_quantize(view, fmt), mx.fake_quantize(view.contiguous(), fmt))


@each_format
def test_rows_do_not_know_each_other(fmt: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, row by row, and in chunks that split the rows unevenly."""
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(4))
    whole = mx.quantize(x, fmt)
    for i in range(7):
        assert torch.equal(mx.quantize(x[i], fmt).packed, whole.packed[i])
    monkeypatch.setattr(sys.modules["mxperts.backend.reference.quantize"], "CHUNK", 200)
    chunked = mx.quantize(x, fmt)
    assert torch.equal(chunked.packed, whole.packed)
    assert torch.equal(chunked.scales, whole.scales)


@each_format
def test_the_dtype_of_the_input_does_not_matter(fmt: BlockFormat) -> None:
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(5))
    for dtype in (BF16, FP16):
        low = x.to(dtype)
        assert torch.equal(mx.quantize(low, fmt).packed, mx.quantize(low.float(), fmt).packed)


def test_the_input_is_left_alone() -> None:
    x = torch.randn(4, 40)
    before = x.clone()
    mx.quantize(x, FP4)
    mx.fake_quantize(x, FP4)
    assert torch.equal(x, before)


# Properties

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)
blocks = st.lists(floats, min_size=1, max_size=40).map(lambda v: torch.tensor([v], dtype=FP32))
formats = st.sampled_from(BLOCK_FORMATS)
rules = st.sampled_from(list(ScaleRule))
roundings = st.sampled_from(DETERMINISTIC)


@given(blocks, formats, rules, roundings, st.sampled_from(list(SignedZero)))
@settings(max_examples=100, deadline=None)
def test_quantising_again_changes_nothing(
    x: Tensor, fmt: BlockFormat, rule: ScaleRule, rounding: Rounding, zero: SignedZero
) -> None:
    """But for E4M3 with ``even`` and a rounding that takes ties down.

    An amax of 1.9375 then gets the scale of 2, with which it is 1.875, whose own scale is half as large and takes no
    number above 1.75.
    """
    down = (Rounding.TOWARD_ZERO, Rounding.HALF_TOWARD_ZERO)
    assume(not (fmt == E4M3 and rule is ScaleRule.EVEN and rounding in down))
    once = mx.fake_quantize(x, fmt, scale_rule=rule, rounding=rounding, signed_zero=zero)
    twice = mx.fake_quantize(once, fmt, scale_rule=rule, rounding=rounding, signed_zero=zero)
    assert torch.equal(once, twice)


@given(blocks, formats, rules, roundings, st.integers(-40, 40))
@settings(max_examples=100, deadline=None)
def test_a_power_of_two_moves_only_the_scale(
    x: Tensor, fmt: BlockFormat, rule: ScaleRule, rounding: Rounding, power: int
) -> None:
    x = torch.where(x.abs() < 2.0**-60, 0.0, x)
    t, moved = (
        mx.quantize(v, fmt, scale_rule=rule, rounding=rounding) for v in (x, torch.ldexp(x, torch.tensor(power)))
    )
    assert torch.equal(t.packed, moved.packed)
    zero = t.scales == 0
    assert torch.equal(zero, moved.scales == 0)
    assert torch.equal((t.scales.int() + power)[~zero], moved.scales.int()[~zero])


@given(st.lists(floats, min_size=2, max_size=32), formats, rules, roundings)
@settings(max_examples=100, deadline=None)
def test_within_a_block_order_is_kept(
    values: list[float], fmt: BlockFormat, rule: ScaleRule, rounding: Rounding
) -> None:
    q = mx.fake_quantize(torch.tensor([sorted(values)]), fmt, scale_rule=rule, rounding=rounding)[0]
    assert (q[1:] >= q[:-1]).all()


@given(blocks, formats, rules)
@settings(max_examples=100, deadline=None)
def test_the_error_is_at_most_half_a_gap_where_nothing_saturates(x: Tensor, fmt: BlockFormat, rule: ScaleRule) -> None:
    t = mx.quantize(x, fmt, scale_rule=rule)
    scale = torch.exp2(t.scales.double() - 127).repeat_interleave(32, -1)[:, : x.shape[-1]]
    magnitudes = torch.tensor(fmt.element.magnitudes, dtype=torch.float64)
    scaled = x.double().abs() / scale
    inside = scaled <= fmt.element.max
    below = torch.searchsorted(magnitudes, scaled.clamp(max=fmt.element.max), right=True) - 1
    gap = magnitudes[(below + 1).clamp(max=len(magnitudes) - 1)] - magnitudes[below]
    error = (mx.dequantize(t, torch.float64) - x.double()).abs() / scale
    assert (error <= gap / 2)[inside].all()


@given(blocks, formats)
@settings(max_examples=100, deadline=None)
def test_negating_the_input_negates_the_output(x: Tensor, fmt: BlockFormat) -> None:
    assert torch.equal(mx.fake_quantize(-x, fmt), -mx.fake_quantize(x, fmt))


# What PyTorch asks of operators


@each_format
def test_operators_pass_opcheck(fmt: BlockFormat) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(6))
    text = recipe(fmt, "weight").encode()
    torch.library.opcheck(torch.ops.mxperts.quantize.default, (x, fmt.name, text, "reference"))
    torch.library.opcheck(
        torch.ops.mxperts.fake_quantize.default, (x.clone().requires_grad_(), fmt.name, text, "reference")
    )
    t = mx.quantize(x, fmt)
    torch.library.opcheck(
        torch.ops.mxperts.dequantize.default, (t.packed, t.scales, fmt.name, t.k, torch.bfloat16, "reference")
    )


@each_format
def test_the_gradient_passes_straight_through(fmt: BlockFormat) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(7), requires_grad=True)
    weights = torch.randn(3, 40, generator=torch.Generator().manual_seed(8))
    for choices in ({}, {"rounding": "stochastic", "generator": torch.Generator().manual_seed(0)}):
        (grad,) = torch.autograd.grad((mx.fake_quantize(x, fmt, **choices) * weights).sum(), x)
        assert torch.equal(grad, weights)


@pytest.mark.parametrize("fmt", [FP4, E3M2, INT8], ids=str)
def test_compiled_without_graph_breaks_gives_the_same_bits(fmt: BlockFormat) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = mx.quantize(x * 2, fmt)
        return t.packed, t.scales, mx.dequantize(t, torch.float32), mx.fake_quantize(x, fmt) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(rows))
        for ours, eager in zip(compiled(x), function(x), strict=True):
            assert torch.equal(ours, eager)


def test_the_meta_device_knows_shapes() -> None:
    x = torch.empty(3, 40, device="meta")
    t = mx.quantize(x, E2M3)
    assert t.device.type == "meta"
    assert (t.shape, t.packed.shape, t.scales.shape) == ((3, 40), (3, 48), (3, 2))
    assert mx.dequantize(t).shape == mx.fake_quantize(x, E2M3).shape == (3, 40)


# Errors


@pytest.mark.parametrize("function", [mx.quantize, mx.fake_quantize], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("x", "choices", "error", "text"),
    [
        ([1.0], {}, ArgumentError, "x must be a torch.Tensor, not list"),
        (
            torch.ones(32, dtype=torch.int32),
            {},
            ArgumentError,
            "x must be float32, bfloat16 or float16, not torch.int32",
        ),
        (
            torch.ones(32, dtype=torch.float64),
            {},
            ArgumentError,
            "x must be float32, bfloat16 or float16, not torch.float64",
        ),
        (
            torch.tensor(1.0),
            {},
            ArgumentError,
            "x must have at least one value along its last dimension; its shape is ()",
        ),
        (
            torch.ones(3, 0),
            {},
            ArgumentError,
            "x must have at least one value along its last dimension; its shape is (3, 0)",
        ),
        (torch.ones(32), {"fmt": "mxfp5"}, FormatError, "unknown MX format 'mxfp5'; did you mean"),
        (torch.ones(32), {"preset": "quarky"}, FormatError, "unknown preset 'quarky'; did you mean quark?"),
        (torch.ones(32), {"scale_rule": "up"}, FormatError, "unknown scale rule 'up'; known: floor, even, rceil, ceil"),
        (torch.ones(32), {"rounding": "stochastic"}, ArgumentError, "stochastic rounding needs a generator"),
        (
            torch.ones(32),
            {"generator": torch.Generator()},
            ArgumentError,
            "a generator is of use only with rounding='stochastic', not 'nearest_even'",
        ),
        (torch.ones(32), {"backend": "cuda"}, ArgumentError, "unknown backend 'cuda'; "),
        (torch.ones(32), {"role": "bias"}, FormatError, "unknown role 'bias'; known: weight, activation"),
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else "",
)
def test_errors_say_what_was_expected(
    function: object, x: object, choices: dict[str, object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        function(x, **{"fmt": FP4, **choices})


def test_dequantize_to_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^dtype must be float32, bfloat16, float16 or float64, not torch.int8$"):
        mx.dequantize(mx.quantize(torch.ones(32), FP4), torch.int8)


def test_roles_are_told_apart() -> None:
    x = block(-(2.0**-30), 1.0)
    assert mx.fake_quantize(x, FP4)[0, 0].signbit()
    assert not mx.fake_quantize(x, FP4, role="weight")[0, 0].signbit()
    assert mx.quantize(x, FP4, role=Role.ACTIVATION).codes()[0, 0] == 8


def test_the_error_types_are_value_and_runtime_errors() -> None:
    assert issubclass(FormatError, ValueError)
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(BackendUnavailable, RuntimeError)
