"""Element formats against table 1 and section 5.3 of OCP Microscaling Formats (MX) v1.0."""

import dataclasses
import math
from fractions import Fraction

import pytest

from mxperts.formats import E2M1, E2M3, E3M2, E4M3, E5M2, ELEMENT_FORMATS, INT8, ElementFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One column of OCP's tables for an element format."""

    element: ElementFormat
    bits: int
    bias: int
    emax: int
    max: float
    min_normal: float | None  # integers have none
    smallest: float
    infs: tuple[int, ...] = ()
    nans: tuple[int, ...] = ()


ROWS = [
    Row(element=E2M1, bits=4, bias=1, emax=2, max=6.0, min_normal=1.0, smallest=0.5),
    Row(element=E2M3, bits=6, bias=1, emax=2, max=7.5, min_normal=1.0, smallest=0.125),
    Row(element=E3M2, bits=6, bias=3, emax=4, max=28.0, min_normal=0.25, smallest=0.0625),
    Row(element=E4M3, bits=8, bias=7, emax=8, max=448.0, min_normal=2**-6, smallest=2**-9, nans=(0x7F, 0xFF)),
    Row(
        element=E5M2,
        bits=8,
        bias=15,
        emax=15,
        max=57344.0,
        min_normal=2**-14,
        smallest=2**-16,
        infs=(0x7C, 0xFC),
        nans=(0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF),
    ),
    Row(element=INT8, bits=8, bias=0, emax=0, max=127 / 64, min_normal=None, smallest=1 / 64),
]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.element.name)
each_element = pytest.mark.parametrize("element", ELEMENT_FORMATS, ids=str)


def test_every_element_format_has_a_row() -> None:
    assert [row.element for row in ROWS] == list(ELEMENT_FORMATS)


@each_row
def test_derived_numbers_are_those_of_the_table(row: Row) -> None:
    found = row.element
    assert (found.bits, found.bias, found.emax) == (row.bits, row.bias, row.emax)
    assert (found.max, found.smallest) == (row.max, row.smallest)


@pytest.mark.parametrize("row", ROWS[:-1], ids=lambda row: row.element.name)
def test_smallest_normal_number_has_mantissa_zero_and_exponent_one(row: Row) -> None:
    assert row.element.decode(1 << row.element.mantissa_bits) == row.min_normal


@each_row
def test_specials_are_exactly_those_of_the_table(row: Row) -> None:
    values = row.element.values
    assert tuple(c for c, v in enumerate(values) if math.isinf(v)) == row.infs
    assert tuple(c for c, v in enumerate(values) if math.isnan(v)) == row.nans


def exact(element: ElementFormat, code: int) -> Fraction | None:
    """The number of a code by the formula of section 5.3, in fractions; None where it is not finite."""
    text = f"{code:0{element.bits}b}"
    if element is INT8:
        return Fraction(int(text, 2) - 256 * int(text[0]), 64)
    sign, exponent, mantissa = int(text[0]), text[1 : 1 + element.exponent_bits], text[1 + element.exponent_bits :]
    if element is E5M2 and "0" not in exponent:
        return None
    if element is E4M3 and "0" not in exponent + mantissa:
        return None
    fraction = Fraction(int(mantissa, 2), 2 ** len(mantissa))
    e = int(exponent, 2)
    magnitude = (
        (1 + fraction) * Fraction(2) ** (e - element.bias) if e else fraction * Fraction(2) ** (1 - element.bias)
    )
    return -magnitude if sign else magnitude


@each_element
def test_every_code_decodes_to_the_number_of_the_formula(element: ElementFormat) -> None:
    for code, value in enumerate(element.values):
        expected = exact(element, code)
        assert not math.isfinite(value) if expected is None else Fraction(value) == expected, f"code {code:#x}"


@each_element
def test_negative_codes_mirror_positive_ones(element: ElementFormat) -> None:
    if element is INT8:
        assert element.values[0x80] == element.min == -2.0
        assert not element.has_signed_zero
        return
    assert element.has_signed_zero
    assert element.min == -element.max
    for code in range(element.sign_bit):
        positive, negative = element.values[code], element.values[code | element.sign_bit]
        assert math.copysign(1, negative) == -math.copysign(1, positive) or math.isnan(positive)
        assert negative == -positive or math.isnan(positive)


@each_element
def test_magnitudes_are_indexed_by_their_code(element: ElementFormat) -> None:
    assert list(element.magnitudes) == sorted(element.magnitudes)
    for code, magnitude in enumerate(element.magnitudes):
        assert element.decode(code) == magnitude


@each_element
@pytest.mark.parametrize("offset", [-1, 0, 1000])
def test_a_code_outside_the_format_is_refused(element: ElementFormat, offset: int) -> None:
    code = -1 if offset == -1 else (1 << element.bits) + offset
    last = (1 << element.bits) - 1
    with pytest.raises(ValueError, match=rf"^code {code} is outside 0\.\.{last} of {element.name}$"):
        element.decode(code)


def test_a_format_is_a_frozen_record() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        E2M1.bias = 2  # type: ignore[misc]
    assert str(E4M3) == "E4M3"
