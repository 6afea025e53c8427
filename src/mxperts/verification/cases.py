"""Everything that is compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mxperts.formats import PRESETS, BlockFormat, Role, Scheme, all_schemes
from mxperts.verification import layers
from mxperts.verification.case import Case
from mxperts.verification.definition import BFLOAT16, FLOAT16, FLOAT32
from mxperts.verification.layer_cases import Experts, Linear
from mxperts.verification.number_cases import Dequantize, Packing, Quantize
from mxperts.verification.numbers import families

__all__ = ["Case", "Dequantize", "Experts", "Linear", "Packing", "Quantize", "cases"]

FLOATS = (BFLOAT16, FLOAT16, FLOAT32)


def cases(formats: Sequence[BlockFormat], presets: Sequence[str]) -> Iterator[Case]:
    """Everything that is compared, for some formats and presets."""
    for fmt in formats:
        for family in families(fmt):
            for preset in presets:
                for role in Role:
                    chosen = PRESETS[preset].recipe(fmt, role)
                    yield Quantize(format=fmt.name, preset=preset, block=fmt, recipe=chosen, role=role, family=family)
        for dtype in FLOATS:
            yield Dequantize(format=fmt.name, block=fmt, dtype=dtype)
        yield Packing(format=fmt.name, block=fmt)
        for scheme in all_schemes():
            if scheme.weight == fmt:
                yield from _layers(scheme)


def _layers(scheme: Scheme) -> Iterator[Case]:
    labels = {"format": str(scheme.weight), "activation": str(scheme.activation or "none")}
    yield Linear(**labels, layer=layers.Linear(scheme=scheme, dtype=BFLOAT16))
    for dtype in FLOATS if scheme.activation is None else (BFLOAT16,):
        layer = layers.Experts(scheme=scheme, dtype=dtype)
        for prepared in (False, True):
            for tokens in layers.TOKENS:
                yield Experts(**labels, layer=layer, tokens=tokens, prepared=prepared)
