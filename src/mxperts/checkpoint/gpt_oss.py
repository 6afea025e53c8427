"""gpt-oss's layout: ``experts.<projection>_blocks`` and ``_scales``, all experts in one tensor.

Only experts are quantised, to MXFP4, and activations are not. Codes are [E, N, K/32, 16] bytes: a block of 32 codes a
row of 16 bytes, low nibble first.

Source: openai/gpt-oss; transformers 5.23, ``integrations/mxfp4.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mxperts.checkpoint.fields import Fields
from mxperts.checkpoint.layout import ModelScheme, Rule, TensorNames
from mxperts.checkpoint.names import ALTERNATING, split_expert, split_fused
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.formats import MXFP4, BlockFormat, ScaleRule, Scheme

NAME = "gpt-oss"
QUANT_METHOD = "mxfp4"
NAMES = TensorNames(codes="_blocks", scales="_scales", blocked=True, stacked=True, bias="_bias")

_EXPERTS = r"re:(.*\.)?experts(\.\d+)?(\.(gate_up|gate|up|down)_proj)?$"
_SCHEME = Scheme.of(MXFP4)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


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


def refuses(rule: Rule, model_type: str | None) -> str | None:
    """Why this layout cannot hold a module, whose name is the rule's pattern; None if it can."""
    if model_type not in ALTERNATING:
        return f"this layout is that of {', '.join(ALTERNATING)} models and not of {model_type}"
    experts = split_expert(rule.pattern) is not None or split_fused(rule.pattern) is not None
    if rule.scheme == (_SCHEME if experts else Scheme("none")):
        return None
    if experts and rule.scheme.weight == MXFP4:
        return f"this layout has no words for activation formats, and this is {rule.scheme}"
    return f"this layout has experts in {_SCHEME} and nothing else quantised, and this is {rule.scheme}"


def write(rules: Sequence[Rule], scale_rule: Callable[[BlockFormat], ScaleRule] | None = None) -> dict[str, Any]:
    """gpt-oss's ``quantization_config``; all experts have MXFP4 weights.

    Args:
        rules: modules that are left alone, none of which may be experts, and what has MXFP4 weights. A layer's number
            in a name stands for every layer's.
        scale_rule: of no account; this layout has no word for it.

    Raises:
        ArgumentError: experts are left alone, or have something else.
    """
    left_alone = [rule.pattern for rule in rules if rule.scheme == Scheme("none")]
    for rule in rules:
        if rule.scheme not in (_SCHEME, Scheme("none")) or (rule.pattern in left_alone and "experts" in rule.pattern):
            raise ArgumentError(
                f"{rule.pattern!r} cannot be {rule.scheme}: in the gpt-oss layout experts are {_SCHEME}"
            )
    names = dict.fromkeys(_NUMBER.sub("*", name) for name in left_alone)
    return {"quant_method": QUANT_METHOD, "modules_to_not_convert": list(names)}
