"""Every format that mxperts knows, one literal each."""

from __future__ import annotations

from mxperts.errors import FormatError
from mxperts.formats.block import BlockFormat
from mxperts.formats.element import ElementFormat, Encoding
from mxperts.formats.naming import normalize, suggest

E2M1 = ElementFormat(name="E2M1", exponent_bits=2, mantissa_bits=1, bias=1, encoding=Encoding.FINITE)
E2M3 = ElementFormat(name="E2M3", exponent_bits=2, mantissa_bits=3, bias=1, encoding=Encoding.FINITE)
E3M2 = ElementFormat(name="E3M2", exponent_bits=3, mantissa_bits=2, bias=3, encoding=Encoding.FINITE)
E4M3 = ElementFormat(name="E4M3", exponent_bits=4, mantissa_bits=3, bias=7, encoding=Encoding.NAN)
E5M2 = ElementFormat(name="E5M2", exponent_bits=5, mantissa_bits=2, bias=15, encoding=Encoding.IEEE)
INT8 = ElementFormat(name="INT8", exponent_bits=0, mantissa_bits=7, bias=0, encoding=Encoding.TWOS_COMPLEMENT)

MXFP4 = BlockFormat(name="mxfp4", element=E2M1)
MXFP6_E2M3 = BlockFormat(name="mxfp6_e2m3", element=E2M3)
MXFP6_E3M2 = BlockFormat(name="mxfp6_e3m2", element=E3M2)
MXFP8_E4M3 = BlockFormat(name="mxfp8_e4m3", element=E4M3)
MXFP8_E5M2 = BlockFormat(name="mxfp8_e5m2", element=E5M2)
MXINT8 = BlockFormat(name="mxint8", element=INT8)

ELEMENT_FORMATS = (E2M1, E2M3, E3M2, E4M3, E5M2, INT8)
BLOCK_FORMATS = (MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8_E4M3, MXFP8_E5M2, MXINT8)

_BY_NAME = {f.name: f for f in BLOCK_FORMATS}
_ALIASES = {
    "mxfp4_e2m1": "mxfp4",
    "mxfp8": "mxfp8_e4m3",
    "fp4": "mxfp4",
    "fp6_e2m3": "mxfp6_e2m3",
    "fp6_e3m2": "mxfp6_e3m2",
}


def format(name: str | BlockFormat) -> BlockFormat:
    """Look a block format up by name.

    Args:
        name: such as ``"mxfp4"`` or ``"MXFP6_E2M3"``; ``"mxfp8"`` means E4M3. A ``BlockFormat`` is returned as it is.

    Raises:
        FormatError: no such format; the message lists near names.
    """
    if isinstance(name, BlockFormat):
        return name
    if not isinstance(name, str):
        raise FormatError(f"a format is a BlockFormat or its name, not {type(name).__name__}: {name!r}")
    key = normalize(name)
    key = _ALIASES.get(key, key)
    if key not in _BY_NAME:
        raise FormatError(f"unknown MX format {name!r}; {suggest(key, _BY_NAME)}")
    return _BY_NAME[key]
