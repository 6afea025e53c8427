"""Recipes: defaults, and the string form that operators carry."""

import dataclasses
import itertools

import pytest

from mxperts.formats import PRESETS, NonFinite, Preset, Recipe, Role, Rounding, ScaleRule, SignedZero
from mxperts.formats.catalog import BLOCK_FORMATS


def test_every_choice_survives_encoding() -> None:
    for rule, rounding, zero, nan, inf in itertools.product(ScaleRule, Rounding, SignedZero, NonFinite, NonFinite):
        recipe = Recipe(scale_rule=rule, rounding=rounding, signed_zero=zero, nan=nan, inf=inf)
        assert Recipe.decode(recipe.encode()) == recipe


@pytest.mark.parametrize("zero_block_scale", [0, 1, 104])
@pytest.mark.parametrize("even_bits", [None, 0, 1, 8])
@pytest.mark.parametrize("use_min", [False, True])
def test_every_number_survives_encoding(zero_block_scale: int, even_bits: int | None, use_min: bool) -> None:
    recipe = Recipe(zero_block_scale=zero_block_scale, even_bits=even_bits, use_min=use_min)
    assert Recipe.decode(recipe.encode()) == recipe


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_every_recipe_of_every_preset_survives_encoding(preset: Preset) -> None:
    for fmt, role in itertools.product(BLOCK_FORMATS, Role):
        recipe = preset.recipe(fmt, role)
        assert Recipe.decode(recipe.encode()) == recipe


def test_a_recipe_is_a_frozen_record() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().use_min = True  # type: ignore[misc]
