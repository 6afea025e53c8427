"""A quantisation written down in a TOML file: the options of ``mxperts quantize`` as keys, and rules for layers."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mxperts.errors import ArgumentError
from mxperts.formats.naming import suggest

_KEYS: Mapping[str, tuple[type, ...]] = {
    "scheme": (str,),
    "format": (str,),
    "exclude": (list,),
    "preset": (str,),
    "scale_rule": (str,),
    "method": (str,),
    "smooth": (bool,),
    "bits": (int, float),
    "rotation": (str,),
    "text": (str,),
    "tokens": (int,),
    "context": (int,),
    "seed": (int,),
    "layer": (list,),
}
"""Every key, and what its value is."""

_LAYER_KEYS = ("pattern", "scheme", "method")


def read_recipe(file: Path) -> dict[str, Any]:
    """Read a recipe.

    Args:
        file: for example::

            scheme = "w_mxfp4_a_mxfp4"
            method = "gptq"
            text = "calibration.txt"        # beside the recipe

            [[layer]]
            pattern = "model.layers.0.*"    # a name, a glob or re:...; the first match counts
            scheme = "w_mxfp6_e2m3"
            method = "rtn"

    Returns:
        Its keys; ``text`` as a path, and ``layer`` as ``layer_schemes`` and ``layer_methods`` by pattern.

    Raises:
        ArgumentError: it cannot be read or is not TOML, or has a key that there is none of, or another value than that
            can have.
    """
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"cannot read the recipe {file}: {error}") from None
    for key, value in found.items():
        if key not in _KEYS:
            raise ArgumentError(f"{file}: unknown key {key!r}; {suggest(key, _KEYS)}")
        # bool is an int to Python
        if not isinstance(value, _KEYS[key]) or (isinstance(value, bool) and bool not in _KEYS[key]):
            expected = " or ".join(kind.__name__ for kind in _KEYS[key])
            raise ArgumentError(f"{file}: {key} must be {expected}, not {value!r}")
    for pattern in found.get("exclude", []):
        if not isinstance(pattern, str):
            raise ArgumentError(f"{file}: exclude must be a list of str, not {found['exclude']!r}")
    layers = [_layer(file, number, rule) for number, rule in enumerate(found.pop("layer", []), start=1)]
    if "text" in found:
        found["text"] = file.parent / found["text"]
    for key in ("scheme", "method"):
        chosen = {rule["pattern"]: rule[key] for rule in layers if key in rule}
        if chosen:
            found[f"layer_{key}s"] = chosen
    return found


def _layer(file: Path, number: int, rule: object) -> Mapping[str, str]:
    where = f"{file}: [[layer]] {number}"
    if not isinstance(rule, Mapping):
        raise ArgumentError(f"{where} must be a table, not {rule!r}")
    for key, value in rule.items():
        if key not in _LAYER_KEYS:
            raise ArgumentError(f"{where}: unknown key {key!r}; {suggest(key, _LAYER_KEYS)}")
        if not isinstance(value, str):
            raise ArgumentError(f"{where}: {key} must be str, not {value!r}")
    if "pattern" not in rule or len(rule) < 2:
        raise ArgumentError(f"{where} needs a pattern, and a scheme or a method")
    return rule
