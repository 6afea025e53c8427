"""Looking formats up by name."""

import re

import pytest

import mxperts as mx
from mxperts.errors import FormatError
from mxperts.formats import BLOCK_FORMATS, BlockFormat


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
@pytest.mark.parametrize("spelling", [str.lower, str.upper, lambda s: s.replace("_", "-"), lambda s: f" {s} "])
def test_a_format_is_found_however_it_is_spelled(fmt: BlockFormat, spelling: object) -> None:
    assert mx.format(spelling(fmt.name)) is fmt


@pytest.mark.parametrize(
    ("alias", "fmt"),
    [
        ("mxfp8", mx.MXFP8_E4M3),
        ("fp4", mx.MXFP4),
        ("MXFP4_E2M1", mx.MXFP4),
        ("fp6_e2m3", mx.MXFP6_E2M3),
        ("fp6-e3m2", mx.MXFP6_E3M2),
    ],
)
def test_aliases(alias: str, fmt: BlockFormat) -> None:
    assert mx.format(alias) is fmt


def test_a_format_stands_for_itself() -> None:
    assert mx.format(mx.MXFP4) is mx.MXFP4


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mxfp5", "unknown MX format 'mxfp5'; did you mean mxfp4 or"),
        ("mxfp6", "unknown MX format 'mxfp6'; did you mean"),
        ("nonsense", "unknown MX format 'nonsense'; known: mxfp4, mxfp6_e2m3, mxfp6_e3m2, mxfp8_e4m3"),
        (4, "a format is a BlockFormat or its name, not int: 4"),
        (None, "a format is a BlockFormat or its name, not NoneType: None"),
    ],
)
def test_an_unknown_format_is_refused_with_near_names(name: object, text: str) -> None:
    with pytest.raises(FormatError, match=f"^{re.escape(text)}"):
        mx.format(name)


def test_mxfp6_alone_suggests_both() -> None:
    with pytest.raises(FormatError) as error:
        mx.format("mxfp6_e")
    assert "mxfp6_e2m3" in str(error.value)
    assert "mxfp6_e3m2" in str(error.value)
