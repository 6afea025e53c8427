"""Presets: the recipes of the software whose numbers people compare with.

Each follows its peer on every finite block that the peer handles without a fault; where a preset leaves its peer, the
peer's behaviour is a fault that docs/numerics.md lists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from mxperts.errors import FormatError
from mxperts.formats.block import BlockFormat
from mxperts.formats.naming import choose, normalize, suggest
from mxperts.formats.recipe import NonFinite, Recipe, Role, Rounding, ScaleRule, SignedZero

_FP4, _FP6 = ("mxfp4",), ("mxfp6_e2m3", "mxfp6_e3m2")
_FP8, _INT8 = ("mxfp8_e4m3", "mxfp8_e5m2"), ("mxint8",)
_FLOAT = _FP4 + _FP6 + _FP8
_ALL = _FLOAT + _INT8


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The recipes of one peer.

    Attributes:
        name: what users call it.
        source: the software and version it was read off and compared with.
        weight, activation: the recipe of either operand.
        weight_of, activation_of: formats whose recipe differs from that, by name.
        formats: names of the formats that the peer itself has, in either role; for the others the recipe is the one
            that its choices suggest, and nothing holds it.
    """

    name: str
    source: str
    weight: Recipe
    activation: Recipe
    weight_of: Mapping[str, Recipe] = field(default_factory=dict)
    activation_of: Mapping[str, Recipe] = field(default_factory=dict)
    formats: tuple[str, ...] = _ALL

    def recipe(self, fmt: BlockFormat, role: Role) -> Recipe:
        """The recipe for one format in one role."""
        if role is Role.WEIGHT:
            return self.weight_of.get(fmt.name, self.weight)
        return self.activation_of.get(fmt.name, self.activation)


_EVEN_KEEP = Recipe(scale_rule=ScaleRule.EVEN)
_EVEN_DROP = Recipe(scale_rule=ScaleRule.EVEN, signed_zero=SignedZero.DROP)
# Quark's arithmetic, and vLLM's after it
_QUARK_KEEP = dataclasses.replace(_EVEN_KEEP, even_overflow=True)
_QUARK_DROP = dataclasses.replace(_EVEN_DROP, even_overflow=True)
_RCEIL_KEEP = Recipe(scale_rule=ScaleRule.RCEIL)
_RCEIL_DROP = Recipe(scale_rule=ScaleRule.RCEIL, signed_zero=SignedZero.DROP)
_FLOOR_KEEP = Recipe(scale_rule=ScaleRule.FLOOR)

DEFAULT = Preset(
    name="default",
    source="AMD Quark for MXFP4 and MXFP6 as vLLM's emulation uses it, vLLM's scale rule for MXFP8, OCP for MXINT8",
    weight=_QUARK_DROP,
    weight_of={"mxfp8_e4m3": _RCEIL_DROP, "mxfp8_e5m2": _RCEIL_DROP, "mxint8": _FLOOR_KEEP},
    activation=_QUARK_KEEP,
    activation_of={
        "mxfp6_e2m3": _QUARK_DROP,
        "mxfp6_e3m2": _QUARK_DROP,
        "mxfp8_e4m3": _RCEIL_KEEP,
        "mxfp8_e5m2": _RCEIL_KEEP,
        "mxint8": _FLOOR_KEEP,
    },
)
_QUARK_OTHERS = {
    # No path of Quark 0.13 writes MXFP8 or MXINT8 weights: these are its fake quantisation.
    "mxfp8_e4m3": _QUARK_KEEP,
    "mxfp8_e5m2": _QUARK_KEEP,
    "mxint8": dataclasses.replace(_QUARK_KEEP, even_bits=8),
}
QUARK = Preset(
    name="quark",
    source="amd-quark 0.13: weights as it exports them, activations as its fake quantisation computes them",
    weight=dataclasses.replace(_QUARK_DROP, zero_block_scale=1),
    weight_of=_QUARK_OTHERS,
    activation=_QUARK_KEEP,
    activation_of={"mxfp6_e2m3": _QUARK_DROP, "mxfp6_e3m2": _QUARK_DROP, **_QUARK_OTHERS},
)
_VLLM_OTHERS = {
    "mxfp6_e2m3": _QUARK_DROP,
    "mxfp6_e3m2": _QUARK_DROP,
    "mxfp8_e4m3": _RCEIL_KEEP,
    "mxfp8_e5m2": _RCEIL_KEEP,
}
VLLM = Preset(
    name="vllm",
    source="vLLM 0.33: mxfp4_quantize for MXFP4, AMD Quark's operators for MXFP6, mxfp8_e4m3_quantize for MXFP8",
    weight=_QUARK_KEEP,
    weight_of=_VLLM_OTHERS,
    activation=_QUARK_KEEP,
    activation_of=_VLLM_OTHERS,
    formats=(*_FP4, *_FP6, "mxfp8_e4m3"),
)
OCP = Preset(
    name="ocp",
    source="OCP Microscaling Formats (MX) v1.0, section 6.3",
    weight=_FLOOR_KEEP,
    activation=_FLOOR_KEEP,
)
_TORCHAO = dataclasses.replace(_FLOOR_KEEP, inf=NonFinite.SATURATE)
TORCHAO = Preset(
    name="torchao",
    source="torchao 0.18 prototype.mx_formats.mx_tensor.to_mx, ScaleCalculationMode.FLOOR",
    weight=_TORCHAO,
    activation=_TORCHAO,
    formats=_FLOAT,
)
_TRITON_KERNELS_FP4 = dataclasses.replace(_RCEIL_KEEP, rounding=Rounding.HALF_AWAY)
TRITON_KERNELS = Preset(
    name="triton_kernels",
    source="triton_kernels as vLLM 0.33 ships it: downcast_to_mxfp, ROUND_UP",
    weight=_RCEIL_KEEP,
    weight_of={"mxfp4": _TRITON_KERNELS_FP4},
    activation=_RCEIL_KEEP,
    activation_of={"mxfp4": _TRITON_KERNELS_FP4},
    formats=_FP4 + _FP8,
)
_CT_OTHERS = {
    "mxfp4": dataclasses.replace(_EVEN_KEEP, signed_zero=SignedZero.KEEP_ROUNDED),
    "mxfp8_e4m3": dataclasses.replace(_EVEN_KEEP, even_bits=1),
}
COMPRESSED_TENSORS = Preset(
    name="compressed_tensors",
    source="compressed-tensors 0.20: calculate_qparams and its packing compressors",
    weight=_EVEN_KEEP,
    weight_of=_CT_OTHERS,
    activation=_EVEN_KEEP,
    activation_of=_CT_OTHERS,
    formats=(*_FP4, "mxfp6_e2m3", "mxfp8_e4m3"),
)
_GGML = Recipe(scale_rule=ScaleRule.FLOOR, rounding=Rounding.HALF_TOWARD_ZERO, signed_zero=SignedZero.DROP)
GGML = Preset(
    name="ggml",
    source="gguf 0.19 quants.MXFP4 and ggml's quantize_row_mxfp4_ref",
    weight=_GGML,
    activation=_GGML,
    formats=_FP4,
)

PRESETS = {p.name: p for p in (DEFAULT, QUARK, VLLM, OCP, TORCHAO, TRITON_KERNELS, COMPRESSED_TENSORS, GGML)}


def recipe(
    fmt: BlockFormat,
    role: str | Role,
    *,
    preset: str | Preset | None = None,
    scale_rule: str | ScaleRule | None = None,
    rounding: str | Rounding | None = None,
    signed_zero: str | SignedZero | None = None,
    nan: str | NonFinite | None = None,
    inf: str | NonFinite | None = None,
) -> Recipe:
    """The preset's recipe with every choice that is given by name in its place.

    Raises:
        FormatError: an unknown preset or choice; the message lists near names.
    """
    if preset is None:
        preset = DEFAULT
    elif not isinstance(preset, Preset):
        key = normalize(preset) if isinstance(preset, str) else ""
        if key not in PRESETS:
            raise FormatError(f"unknown preset {preset!r}; {suggest(key, PRESETS)}")
        preset = PRESETS[key]
    found = preset.recipe(fmt, choose(Role, role, "role"))
    if scale_rule is not None:
        found = dataclasses.replace(found, scale_rule=choose(ScaleRule, scale_rule, "scale rule"))
    if rounding is not None:
        found = dataclasses.replace(found, rounding=choose(Rounding, rounding, "rounding"))
    if signed_zero is not None:
        found = dataclasses.replace(found, signed_zero=choose(SignedZero, signed_zero, "treatment of signed zero"))
    if nan is not None:
        found = dataclasses.replace(found, nan=choose(NonFinite, nan, "treatment of NaN"))
    if inf is not None:
        found = dataclasses.replace(found, inf=choose(NonFinite, inf, "treatment of Inf"))
    return found
