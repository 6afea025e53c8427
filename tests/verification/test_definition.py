"""The exact arithmetic that golden bytes come from, against tables and conversions of other software and by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from mxperts.cli.doctor import GOLDEN_CODES, GOLDEN_SCALE, GOLDEN_VALUES
from mxperts.formats import BLOCK_FORMATS, E2M1, MXFP4, MXINT8, PRESETS, BlockFormat, Recipe, Role, Rounding, ScaleRule
from mxperts.verification.definition import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Float,
    canonical,
    dequantize,
    elements,
    floor_log2,
    is_inf,
    nearest,
    pack,
    quantize,
    scale_exponent,
    unpack,
    values,
)

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ELEMENTS = {
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
}

each_float = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=lambda d: d.name)
each_format = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)


@pytest.mark.parametrize("fmt", BLOCK_FORMATS[:-1], ids=str)
def test_elements_are_those_of_ml_dtypes(fmt: BlockFormat) -> None:
    codes = np.arange(1 << fmt.element.bits, dtype=np.uint8)
    theirs = codes.view(ELEMENTS[fmt.element.name]).astype(np.float64)
    for code, (magnitude, value) in enumerate(zip(elements(fmt.element), theirs, strict=True)):
        if magnitude is None:
            assert math.isinf(value) if is_inf(fmt.element, code) else math.isnan(value)
        else:
            assert magnitude == abs(Fraction(value))


def test_elements_of_mxint8_are_64ths() -> None:
    assert elements(MXINT8.element)[:3] == (0, Fraction(1, 64), Fraction(2, 64))
    assert [elements(MXINT8.element)[c] for c in (127, 128, 255)] == [Fraction(127, 64), 2, Fraction(1, 64)]


@each_float
def test_patterns_and_values_are_those_of_other_software(dtype: Float) -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, dtype.inf, 2000).astype(dtype.bits)
    with np.errstate(over="ignore"):
        for pattern, value in zip(bits.tolist(), bits.view(NUMPY[dtype.name]).astype(np.float64).tolist(), strict=True):
            assert dtype.value(pattern) == Fraction(value)
            assert dtype.pattern(Fraction(value)) == pattern
        wide = np.ldexp(generator.random(2000), generator.integers(-160, 140, 2000))
        rounded = wide.astype(np.float32) if dtype is FLOAT32 else wide.astype(np.float32).astype(NUMPY[dtype.name])
        given = wide.astype(np.float32 if dtype is not FLOAT32 else np.float64)
    for value, pattern in zip(given, rounded, strict=True):
        if np.isfinite(value):
            assert dtype.pattern(Fraction(float(value))) == int(pattern.view(dtype.bits))


def test_floor_log2() -> None:
    for x in (Fraction(1), Fraction(3, 2), Fraction(2) - Fraction(1, 1 << 60), Fraction(1, 3), Fraction(7, 8)):
        assert Fraction(2) ** floor_log2(x) <= x < Fraction(2) ** (floor_log2(x) + 1)


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        (Rounding.NEAREST_EVEN, [0, 2, 2, 4, 4, 6, 6]),
        (Rounding.HALF_AWAY, [1, 2, 3, 4, 5, 6, 7]),
        (Rounding.HALF_TOWARD_ZERO, [0, 1, 2, 3, 4, 5, 6]),
        (Rounding.TOWARD_ZERO, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_ties_of_e2m1(rounding: Rounding, expected: list[int]) -> None:
    quarters = [1, 3, 5, 7, 10, 14, 20]  # of 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5
    assert [nearest(q, -2, E2M1, rounding) for q in quarters] == expected


def test_scale_rules_by_hand() -> None:
    """docs/numerics.md: amax 5, 6.5 and 7 in MXFP4."""
    rules = (ScaleRule.FLOOR, ScaleRule.EVEN, ScaleRule.RCEIL, ScaleRule.CEIL, ScaleRule.RFLOOR)
    expected = {5: (0, 0, 0, 1, -1), Fraction(13, 2): (0, 0, 1, 1, 0), 7: (0, 1, 1, 1, 0)}
    for amax, exponents in expected.items():
        found = tuple(scale_exponent(Fraction(amax), E2M1, Recipe(scale_rule=rule)) for rule in rules)
        assert found == exponents


def test_a_block_by_hand() -> None:
    x = np.array([GOLDEN_VALUES], dtype=np.float32).view(FLOAT32.bits)
    codes, scales = quantize(x, FLOAT32, MXFP4, PRESETS["default"].recipe(MXFP4, Role.WEIGHT))
    assert (codes.tolist(), scales.tolist()) == ([GOLDEN_CODES], [[GOLDEN_SCALE]])


def test_nan_and_inf() -> None:
    x = np.zeros((3, 32), dtype=np.float32)
    x[0, 0], x[1, 0], x[2, 0] = np.nan, -np.inf, 1
    found = {p: quantize(x.view(FLOAT32.bits), FLOAT32, MXFP4, PRESETS[p].weight) for p in ("ocp", "torchao")}
    assert found["ocp"][1].ravel().tolist() == [255, 255, 125]
    assert found["torchao"][1].ravel().tolist() == [255, 253, 125]
    assert found["torchao"][0][1, 0] == 15
    values = dequantize(*found["ocp"], MXFP4, FLOAT32)
    assert (values[:2] == FLOAT32.nan).all()


@each_format
def test_packing_round_trips(fmt: BlockFormat) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << fmt.element.bits, (5, 32)).astype(np.uint8)
    packed = pack(codes, fmt)
    assert packed.shape == (5, fmt.block_bytes)
    assert (unpack(packed, fmt) == codes).all()
    number = sum(int(c) << (fmt.element.bits * j) for j, c in enumerate(codes[0]))
    assert packed[0].tobytes() == number.to_bytes(fmt.block_bytes, "little")


@each_format
def test_values_are_exact_in_float32(fmt: BlockFormat) -> None:
    found = values(fmt, FLOAT32).view(np.float32)
    assert np.isnan(found[255]).all()
    for byte, code in ((127, 1), (0, 1), (254, 3)):
        with np.errstate(over="ignore"):
            assert found[byte, code] == np.float32(np.ldexp(float(elements(fmt.element)[code] or 0), byte - 127))


def test_every_nan_becomes_the_same() -> None:
    x = np.array([0x7F81, 0xFFFF, 0x7F80, 0x3F80], dtype=np.uint16)
    assert canonical(x, BFLOAT16).tolist() == [0x7FC0, 0x7FC0, 0x7F80, 0x3F80]
