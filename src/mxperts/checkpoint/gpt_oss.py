"""gpt-oss's layout: ``experts.<projection>_blocks`` and ``_scales``, all experts in one tensor.

Only experts are quantised, to MXFP4, and activations are not. Codes are [E, N, K/32, 16] bytes: a block of 32 codes a
row of 16 bytes, low nibble first.

Source: openai/gpt-oss; transformers 5.23, ``integrations/mxfp4.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mxperts.checkpoint.fields import Fields
from mxperts.checkpoint.layout import ModelScheme, Rule, TensorNames
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.formats import MXFP4, Scheme

NAME = "gpt-oss"
QUANT_METHOD = "mxfp4"
NAMES = TensorNames(codes="_blocks", scales="_scales", blocked=True)

_EXPERTS = r"re:(.*\.)?experts(\.\d+)?(\.(gate_up|gate|up|down)_proj)?$"
_SCHEME = Scheme.of(MXFP4)


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` has MX formats: in this layout, always."""
    return True


def parse(config: Mapping[str, Any]) -> ModelScheme:
    """Read gpt-oss's ``quantization_config``: all experts but those under ``modules_to_not_convert``.

    Raises:
        CheckpointError: ``modules_to_not_convert`` is no list of names or regular expressions.
    """
    top = Fields.of("quantization_config", config)
    rules = []
    for name in top.strings("modules_to_not_convert"):
        try:
            re.compile(name)
        except re.error as error:
            raise CheckpointError(f"{top.path}.modules_to_not_convert has {name!r}: {error}") from None
        # transformers takes every entry as a regular expression for a module, its children, or the end of its name
        rules.append(Rule(pattern=rf"re:(.*\.)?(?:{name})(\.|$)", scheme=Scheme("none")))
    rules.append(Rule(pattern=_EXPERTS, scheme=_SCHEME))
    return ModelScheme(layout=NAME, names=NAMES, rules=tuple(rules), config=config)


def write(not_converted: Sequence[str]) -> dict[str, Any]:
    """gpt-oss's ``quantization_config``; all experts have MXFP4 weights.

    Args:
        not_converted: modules that are left alone; none of them may be experts.

    Raises:
        ArgumentError: one of them is.
    """
    for name in not_converted:
        if "experts" in name:
            raise ArgumentError(f"{name!r} cannot be left unquantised: in the gpt-oss layout all experts are MXFP4")
    return {"quant_method": QUANT_METHOD, "modules_to_not_convert": list(not_converted)}
