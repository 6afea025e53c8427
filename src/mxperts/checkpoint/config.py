"""From a model's config.json to a ``ModelScheme``, whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from mxperts.checkpoint import compressed_tensors, gpt_oss, quark, rotated
from mxperts.checkpoint.layout import ModelScheme
from mxperts.errors import ArgumentError, CheckpointError

LAYOUTS: dict[str, ModuleType] = {
    layout.QUANT_METHOD: layout for layout in (quark, compressed_tensors, gpt_oss, rotated)
}
"""The layouts by ``quant_method``."""


def layout_of(name: str) -> ModuleType:
    """A layout by its own name: "quark", "compressed-tensors", "gpt-oss" or "mxperts".

    Raises:
        ArgumentError: there is no such layout.
    """
    known: dict[str, ModuleType] = {layout.NAME: layout for layout in LAYOUTS.values()}
    if name not in known:
        raise ArgumentError(f"unknown layout {name!r}; expected {', '.join(known)}")
    return known[name]


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The ``quantization_config`` in a model's config, or ``config`` itself if it is one; None if there is none.

    Raises:
        CheckpointError: it is not an object.
    """
    if "quant_method" in config:
        return config
    text_config = config.get("text_config")
    for holder in (config, text_config):
        if isinstance(holder, Mapping) and (found := holder.get("quantization_config")) is not None:
            if not isinstance(found, Mapping):
                raise CheckpointError(f"quantization_config must be an object, not {found!r}")
            return found
    return None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a model's config says of its language model: itself, or its ``text_config``."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def is_mx(config: Mapping[str, Any]) -> bool:
    """Whether a model's config, or its ``quantization_config``, has MX formats in a layout that mxperts reads.

    Others (no quantisation, ``fp8``, ``bitsandbytes``, integers or NVFP4 in compressed-tensors or Quark) are for other
    loaders.
    """
    found = quantization_config(config)
    layout = LAYOUTS.get(str(found.get("quant_method"))) if found is not None else None
    return layout is not None and bool(layout.claims(found))


def parse(config: Mapping[str, Any]) -> ModelScheme | None:
    """Which scheme every module of a checkpoint has.

    Args:
        config: a model's config.json, or its ``quantization_config``.

    Returns:
        None if ``is_mx`` is false.

    Raises:
        CheckpointError: the config is MX, but asks for something that mxperts does not support; the message names the
            field.
    """
    if not is_mx(config):
        return None
    found = quantization_config(config)
    assert found is not None
    scheme: ModelScheme = LAYOUTS[str(found["quant_method"])].parse(found)
    return scheme
