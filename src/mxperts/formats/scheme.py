"""A scheme: the weight format and the activation format of a layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from mxperts.errors import FormatError
from mxperts.formats.block import BlockFormat
from mxperts.formats.catalog import BLOCK_FORMATS, format
from mxperts.formats.naming import normalize, suggest

FP8_STATIC = "fp8_static"
"""E4M3 activations with one scale a projection, fixed in the checkpoint."""
FP8_DYNAMIC = "fp8_dynamic"
"""E4M3 activations with one scale a token, amax / 448."""
FP8_ACTIVATIONS = (FP8_STATIC, FP8_DYNAMIC)

Activation = BlockFormat | str | None
"""What a layer's input is quantised to: a block format, one of ``FP8_ACTIVATIONS``, or None for not at all."""

_ALIASES = {
    # AMD Quark's scheme names
    "mxfp4": "w_mxfp4_a_mxfp4",
    "mxfp4_weight_only": "w_mxfp4",
    "mxfp6_e2m3": "w_mxfp6_e2m3_a_mxfp6_e2m3",
    "mxfp6_e3m2": "w_mxfp6_e3m2_a_mxfp6_e3m2",
    "mxfp4_mxfp6_e2m3": "w_mxfp4_a_mxfp6_e2m3",
    "mxfp4_mxfp6_e3m2": "w_mxfp4_a_mxfp6_e3m2",
    "mxfp4_fp8": "w_mxfp4_a_fp8",
    "mxfp8": "w_mxfp8_e4m3_a_mxfp8_e4m3",
    # compressed-tensors' presets
    "mxfp4a16": "w_mxfp4",
    "mxfp4xfp8": "w_mxfp4_a_fp8_dynamic",  # one scale a token here, one for 128 values there
    "mxfp6a16": "w_mxfp6_e2m3",
    "mxfp6a8": "w_mxfp6_e2m3_a_mxfp8_e4m3",
    "mxfp8a16": "w_mxfp8_e4m3",
    # what people say
    "w4a16": "w_mxfp4",
    "w4a4": "w_mxfp4_a_mxfp4",
    "w4a6": "w_mxfp4_a_mxfp6_e2m3",
    "w4a8": "w_mxfp4_a_mxfp8_e4m3",
    "w6a16": "w_mxfp6_e2m3",
    "w6a6": "w_mxfp6_e2m3_a_mxfp6_e2m3",
    "w6a8": "w_mxfp6_e2m3_a_mxfp8_e4m3",
    "w8a16": "w_mxfp8_e4m3",
    "w8a8": "w_mxfp8_e4m3_a_mxfp8_e4m3",
    "bf16": "none",
}
_FP8_NAMES = {"fp8": FP8_STATIC, "fp8_static": FP8_STATIC, "fp8_dynamic": FP8_DYNAMIC}


@dataclass(frozen=True, init=False)
class Scheme:
    """Weight format and activation format, parsed from a name.

    Args:
        name: vLLM's spelling, ``w_<format>[_a_<format>]``, with ``fp8`` (static) or ``fp8_dynamic`` also possible after
            ``_a_``; ``a_<format>`` alone leaves the weights unquantised and ``none`` both. AMD Quark's and
            compressed-tensors' preset names and short forms such as ``w4a6`` are understood.

    Attributes:
        weight: block format of the weights, or None for unquantised weights.
        activation: block format of the layer's input, ``"fp8_static"``, ``"fp8_dynamic"``, or None.

    Raises:
        FormatError: no such scheme; the message lists near names.
    """

    weight: BlockFormat | None
    activation: Activation
    name: str = field(compare=False)

    def __init__(self, name: str | Scheme) -> None:
        weight, activation = (name.weight, name.activation) if isinstance(name, Scheme) else _parse(name)
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "activation", activation)
        object.__setattr__(self, "name", _print(weight, activation))

    @classmethod
    def of(cls, weight: BlockFormat | str | None, activation: Activation = None) -> Scheme:
        """The scheme of two formats."""
        return cls(_print(None if weight is None else format(weight), parse_activation(activation)))

    def __str__(self) -> str:
        return self.name


def parse_activation(activation: Activation) -> Activation:
    """A block format from its name; None and the fp8 names are returned as they are (``"fp8"`` means static).

    Raises:
        FormatError: neither.
    """
    if activation is None or isinstance(activation, BlockFormat):
        return activation
    return (_FP8_NAMES.get(normalize(activation)) if isinstance(activation, str) else None) or format(activation)


def all_schemes() -> list[Scheme]:
    """Every weight format with every activation format, weight-only first."""
    activations: list[Activation] = [None, *FP8_ACTIVATIONS, *BLOCK_FORMATS]
    return [Scheme.of(w, a) for w in BLOCK_FORMATS for a in activations]


def _print(weight: BlockFormat | None, activation: Activation) -> str:
    parts = [f"w_{weight}"] if weight else []
    if activation:
        parts.append("a_fp8" if activation == FP8_STATIC else f"a_{activation}")
    return "_".join(parts) or "none"


def _parse(name: str) -> tuple[BlockFormat | None, Activation]:
    if not isinstance(name, str):
        raise FormatError(
            f"a scheme is named by a string such as 'w_mxfp4_a_mxfp4', not {type(name).__name__}: {name!r}"
        )
    key = normalize(name)
    key = _ALIASES.get(key, key)
    if key == "none":
        return None, None
    weight, separator, activation = key.partition("a_") if key.startswith("a_") else key.partition("_a_")
    try:
        if not key or (weight and not weight.startswith("w_")):
            raise FormatError(key)
        if separator and not activation:
            raise FormatError(key)
        return format(weight[2:]) if weight else None, parse_activation(activation or None)
    except FormatError:
        known = [*_ALIASES, *(s.name for s in all_schemes())]
        near = suggest(key, known)
        if near.startswith("known"):
            near = f"expected w_<format>, w_<format>_a_<format> or one of {', '.join(_ALIASES)}"
        raise FormatError(f"unknown scheme {name!r}; {near}") from None
