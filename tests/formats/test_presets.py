"""Presets: which recipe each gives, and how single choices replace its own.

That a preset equals its peer is for ``tests/oracles`` to show.
"""

import re

import pytest

from mxperts.errors import FormatError
from mxperts.formats import (
    BLOCK_FORMATS,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    PRESETS,
    BlockFormat,
    NonFinite,
    Preset,
    Recipe,
    Role,
    Rounding,
    ScaleRule,
    SignedZero,
    recipe,
)

EVEN_KEEP = Recipe(scale_rule=ScaleRule.EVEN, even_overflow=True)
EVEN_DROP = Recipe(scale_rule=ScaleRule.EVEN, signed_zero=SignedZero.DROP, even_overflow=True)
RCEIL_KEEP = Recipe(scale_rule=ScaleRule.RCEIL)
RCEIL_DROP = Recipe(scale_rule=ScaleRule.RCEIL, signed_zero=SignedZero.DROP)
FLOOR_KEEP = Recipe(scale_rule=ScaleRule.FLOOR)


@pytest.mark.parametrize(
    ("fmt", "weight", "activation"),
    [
        (MXFP4, EVEN_DROP, EVEN_KEEP),
        (MXFP6_E2M3, EVEN_DROP, EVEN_DROP),
        (MXFP6_E3M2, EVEN_DROP, EVEN_DROP),
        (MXFP8_E4M3, RCEIL_DROP, RCEIL_KEEP),
        (MXFP8_E5M2, RCEIL_DROP, RCEIL_KEEP),
        (MXINT8, FLOOR_KEEP, FLOOR_KEEP),
    ],
    ids=str,
)
def test_the_default(fmt: BlockFormat, weight: Recipe, activation: Recipe) -> None:
    """docs/numerics.md: weights drop -0, MXFP4 activations keep it, MXFP6 activations drop it; MXFP8 uses rceil."""
    assert recipe(fmt, "weight") == weight
    assert recipe(fmt, "activation") == activation


def test_default_and_quark_differ_only_where_nothing_decodes_differently_or_in_eight_bits() -> None:
    for fmt in (MXFP4, MXFP6_E2M3, MXFP6_E3M2):
        quark, default = recipe(fmt, "weight", preset="quark"), recipe(fmt, "weight")
        assert (quark.zero_block_scale, default.zero_block_scale) == (1, 0)
        assert Recipe.decode(quark.encode().replace(",1,None", ",0,None")) == default
        assert recipe(fmt, "activation", preset="quark") == recipe(fmt, "activation")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_every_preset_has_a_recipe_for_every_format(name: str, fmt: BlockFormat) -> None:
    for role in Role:
        found = recipe(fmt, role, preset=name)
        assert found == PRESETS[name].recipe(fmt, role)
        assert not found.use_min, "every peer clamps integers to +-127"


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_every_preset_names_real_formats_and_its_source(preset: Preset) -> None:
    names = {f.name for f in BLOCK_FORMATS}
    assert set(preset.formats) <= names
    assert set(preset.weight_of) | set(preset.activation_of) <= names
    assert preset.source


def test_each_choice_replaces_the_presets() -> None:
    found = recipe(
        MXFP4,
        "weight",
        scale_rule="ceil",
        rounding="half-away",
        signed_zero="keep",
        nan="raise",
        inf=NonFinite.SATURATE,
    )
    assert found == Recipe(
        scale_rule=ScaleRule.CEIL,
        rounding=Rounding.HALF_AWAY,
        signed_zero=SignedZero.KEEP,
        nan=NonFinite.RAISE,
        inf=NonFinite.SATURATE,
        even_overflow=True,
    )


def test_a_preset_may_be_given_as_itself() -> None:
    mine = Preset(name="mine", source="test", weight=FLOOR_KEEP, activation=RCEIL_KEEP)
    assert recipe(MXFP4, Role.ACTIVATION, preset=mine) == RCEIL_KEEP


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        ({"preset": "quack"}, "unknown preset 'quack'; did you mean quark?"),
        ({"preset": "zzz"}, "unknown preset 'zzz'; known: default, quark, vllm, ocp, torchao"),
        ({"role": "bias"}, "unknown role 'bias'; known: weight, activation"),
        ({"scale_rule": "flor"}, "unknown scale rule 'flor'; did you mean floor"),
        ({"rounding": "nearest"}, "unknown rounding 'nearest'; did you mean nearest_even?"),
        ({"signed_zero": "lose"}, "unknown treatment of signed zero 'lose'; known: keep, drop, keep_rounded"),
        ({"nan": "ignore"}, "unknown treatment of NaN 'ignore'; known: block_nan, saturate, raise"),
        ({"inf": 3}, "unknown treatment of Inf 3; known: block_nan, saturate, raise"),
    ],
    ids=str,
)
def test_an_unknown_choice_is_refused_with_near_names(choices: dict[str, object], text: str) -> None:
    with pytest.raises(FormatError, match=f"^{re.escape(text)}"):
        recipe(MXFP4, **{"role": "weight", **choices})
