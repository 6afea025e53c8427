"""Our own layout, for what no other software can run: rotated weights, named and described as in AMD Quark's.

``quantization_config`` is ``{"quant_method": "mxperts", "rotation": "hadamard32", "config": {…}}``, where ``config`` is
what Quark would say of the same modules. A loader that looks at ``quant_method`` does not know it. One that goes on
without, as Transformers does, finds codes in no shape that a weight has: [N, K / 32, bytes of a block].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mxperts.checkpoint import quark
from mxperts.checkpoint.fields import Fields
from mxperts.checkpoint.layout import ModelScheme, Rule
from mxperts.errors import CheckpointError
from mxperts.formats import BlockFormat, ScaleRule
from mxperts.rotation import ROTATIONS

NAME = "mxperts"
QUANT_METHOD = "mxperts"
NAMES = replace(quark.NAMES, blocked=True)

_FIELDS = ("quant_method", "rotation", "config")


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` has MX formats: in this layout, always."""
    return True


def parse(config: Mapping[str, Any]) -> ModelScheme:
    """Read our ``quantization_config``.

    Raises:
        CheckpointError: it has other fields, a rotation that is not known, or its ``config`` asks for something that is
            not supported; the message names the field.
    """
    top = Fields.of("quantization_config", config)
    for key in config:
        if key not in _FIELDS:
            raise CheckpointError(f"{top.path}.{key} is unknown to this version of mxperts: {config[key]!r}")
    rotation = top.expect("rotation", *ROTATIONS)
    inner = Fields.of(f"{top.path}.config", top.get("config"))
    inner.expect("quant_method", quark.QUANT_METHOD)
    scheme = quark.parse(inner.values, inner.path)
    return replace(scheme, layout=NAME, names=NAMES, config=config, rotation=rotation)


def refuses(rule: Rule, model_type: str | None) -> str | None:
    """Why this layout cannot hold a module, whose name is the rule's pattern; None if it can."""
    return quark.refuses(rule, model_type)


def write(
    rules: Sequence[Rule], scale_rule: Callable[[BlockFormat], ScaleRule] | None = None, *, rotation: str
) -> dict[str, Any]:
    """Our ``quantization_config`` for these rules; arguments as of Quark's.

    Raises:
        ArgumentError: another order of the rules.
    """
    return {"quant_method": QUANT_METHOD, "rotation": rotation, "config": quark.write(rules, scale_rule)}
