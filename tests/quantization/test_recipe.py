"""Recipes: what a file says, and one error for everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mxperts.errors import ArgumentError
from mxperts.quantization.recipe import read_recipe

WHOLE = """
scheme = "w_mxfp4_a_mxfp4"
format = "quark"
exclude = ["*self_attn*", "lm_head"]
preset = "quark"
scale_rule = "even"
method = "gptq"
smooth = true
bits = 4.75
rotation = "hadamard32"
text = "corpus.txt"
tokens = 65536
context = 512
seed = 3

[[layer]]
pattern = "model.layers.0.*"
scheme = "w_mxfp6_e2m3"
method = "rtn"

[[layer]]
pattern = "*down_proj"
method = "scale-search"
"""


def recipe(folder: Path, text: str) -> Path:
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"


def test_every_key(tmp_path: Path) -> None:
    assert read_recipe(recipe(tmp_path, WHOLE)) == {
        "scheme": "w_mxfp4_a_mxfp4",
        "format": "quark",
        "exclude": ["*self_attn*", "lm_head"],
        "preset": "quark",
        "scale_rule": "even",
        "method": "gptq",
        "smooth": True,
        "bits": 4.75,
        "rotation": "hadamard32",
        "text": tmp_path / "corpus.txt",
        "tokens": 65536,
        "context": 512,
        "seed": 3,
        "layer_schemes": {"model.layers.0.*": "w_mxfp6_e2m3"},
        "layer_methods": {"model.layers.0.*": "rtn", "*down_proj": "scale-search"},
    }
    assert read_recipe(recipe(tmp_path, "")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shceme = 'w4a4'", "unknown key 'shceme'; did you mean scheme?"),
        ("scheme = 4", "scheme must be str, not 4"),
        ("bits = 'many'", "bits must be int or float, not 'many'"),
        ("bits = true", "bits must be int or float, not True"),
        ("tokens = true", "tokens must be int, not True"),
        ("smooth = 1", "smooth must be bool, not 1"),
        ("exclude = 'x'", "exclude must be list"),
        ("exclude = [1]", "exclude must be a list of str"),
        ("layer = ['x']", r"\[\[layer\]\] 1 must be a table"),
        ("[[layer]]\npattern = 'x'", r"\[\[layer\]\] 1 needs a pattern, and a scheme or a method"),
        ("[[layer]]\nscheme = 'x'", r"\[\[layer\]\] 1 needs a pattern"),
        (
            "[[layer]]\npattern = 'x'\nbits = '4'",
            r"\[\[layer\]\] 1: unknown key 'bits'; known: pattern, scheme, method",
        ),
        ("[[layer]]\npattern = 'x'\nscheme = 4", r"\[\[layer\]\] 1: scheme must be str, not 4"),
        ("scheme = ", "cannot read the recipe"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        read_recipe(recipe(tmp_path, text))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot read the recipe"):
        read_recipe(tmp_path / "recipe.toml")
