"""Which schemes an evaluation compares."""

from __future__ import annotations

from collections.abc import Sequence

from mxperts.formats import FP8_STATIC, Scheme, all_schemes

COMMON = tuple(
    Scheme(name)
    for name in (
        # weights alone, one a format
        "w_mxfp4",
        "w_mxfp6_e2m3",
        "w_mxfp6_e3m2",
        "w_mxfp8_e4m3",
        "w_mxfp8_e5m2",
        "w_mxint8",
        # 4-bit weights with every width of activation
        "w_mxfp4_a_mxfp4",
        "w_mxfp4_a_mxfp6_e2m3",
        "w_mxfp4_a_mxfp6_e3m2",
        "w_mxfp4_a_mxfp8_e4m3",
        "w_mxfp4_a_fp8_dynamic",
        # 6-bit weights
        "w_mxfp6_e2m3_a_mxfp6_e2m3",
        "w_mxfp6_e3m2_a_mxfp6_e3m2",
        "w_mxfp6_e2m3_a_mxfp8_e4m3",
        "w_mxfp6_e2m3_a_fp8_dynamic",
        # 8-bit weights
        "w_mxfp8_e4m3_a_mxfp8_e4m3",
        "w_mxint8_a_mxint8",
    )
)
"""The schemes that published checkpoints and their tools use: what ``common`` stands for."""

ALL = tuple(s for s in all_schemes() if s.activation != FP8_STATIC)
"""Every weight format with every activation format, but for static fp8, whose scales must be calibrated first: they are
in a checkpoint or nowhere. What ``all`` stands for."""

_SETS = {"common": COMMON, "all": ALL}


def parse(text: str) -> Sequence[Scheme]:
    """The schemes that ``common``, ``all`` or a comma-separated list of names stands for.

    Raises:
        FormatError: no such scheme.
    """
    return _SETS.get(text.strip().lower()) or tuple(dict.fromkeys(Scheme(name) for name in text.split(",")))
