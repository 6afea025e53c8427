"""The layout of compressed-tensors and llm-compressor: ``<linear>.weight_packed``, ``<linear>.weight_scale``.

MXFP8 codes are ``<linear>.weight``, in dtype F8_E4M3.

Source: compressed-tensors 0.20, ``quantization/quant_config.py``, ``compressors/mxfp*``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mxperts.checkpoint.fields import Fields
from mxperts.checkpoint.layout import ModelScheme, Rule, TensorNames
from mxperts.checkpoint.names import ALTERNATING_ROWS
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.formats import (
    FP8_DYNAMIC,
    FP8_STATIC,
    MXFP4,
    MXFP6_E2M3,
    MXFP8_E4M3,
    Activation,
    BlockFormat,
    ScaleRule,
    Scheme,
)

NAME = "compressed-tensors"
QUANT_METHOD = "compressed-tensors"
NAMES = TensorNames(
    codes=".weight_packed",
    scales=".weight_scale",
    codes_of={MXFP8_E4M3.name: ".weight"},
    input_scale=".input_scale",
    input_scale_shape=(1,),
    alternating=ALTERNATING_ROWS,
)

_FORMATS = {"mxfp4-pack-quantized": MXFP4, "mxfp6-pack-quantized": MXFP6_E2M3, "mxfp8-quantized": MXFP8_E4M3}
_BY_BITS = {fmt.element.bits: fmt for fmt in _FORMATS.values()}
_SCALE_DTYPE = "torch.uint8"


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` of compressed-tensors has MX formats anywhere."""
    groups = config.get("config_groups")
    nested = groups.values() if isinstance(groups, Mapping) else ()
    formats = [config.get("format"), *(group.get("format") for group in nested if isinstance(group, Mapping))]
    return any(isinstance(name, str) and name.startswith("mx") for name in formats)


def parse(config: Mapping[str, Any]) -> ModelScheme:
    """Read a ``quantization_config``: ``ignore``, then targets by name, by regular expression, by class.

    Raises:
        CheckpointError: it asks for something that mxperts does not support; the message names the field.
    """
    top = Fields.of("quantization_config", config)
    top.expect_unset("kv_cache_scheme", "a quantised key-value cache")
    top.expect_unset("transform_config", "transforms of activations")
    top.expect_unset("sparsity_config", "sparse weights")
    top.expect_unset("moe_sparsity_config", "sparse experts")
    top.expect("quantization_status", "compressed", None)

    rules = [Rule(pattern=pattern, scheme=Scheme("none")) for pattern in top.patterns("ignore")]
    by_target: dict[str, Scheme] = {}
    for _, group in top.children("config_groups"):
        scheme = _scheme(group, top.get("format"))
        for target in group.patterns("targets"):
            if target != "Linear" and "." not in target and target[:1].isupper():
                raise CheckpointError(f"{group.path}.targets has the class {target!r}; mxperts supports 'Linear'")
            by_target[target] = scheme
    for target in sorted(by_target, key=lambda t: (t == "Linear", t.startswith("re:"), t)):
        rules.append(Rule(pattern="*" if target == "Linear" else target, scheme=by_target[target]))
    return ModelScheme(layout=NAME, names=NAMES, rules=tuple(rules), config=config)


def refuses(rule: Rule, model_type: str | None) -> str | None:
    """Why this layout cannot hold a module, whose name is the rule's pattern; None if it can."""
    weight, activation = rule.scheme.weight, rule.scheme.activation
    if rule.scheme == Scheme("none"):
        return None
    known = ", ".join(str(fmt) for fmt in _FORMATS.values())
    if weight not in _FORMATS.values():
        return f"compressed-tensors has no weights in {weight}, only in {known}"
    if isinstance(activation, BlockFormat) and activation not in _FORMATS.values():
        return f"compressed-tensors has no activations in {activation}, only in {known} and fp8"
    if rule.block_rows != 1:
        return f"compressed-tensors has no scales that {rule.block_rows} rows share"
    return None


def write(rules: Sequence[Rule], scale_rule: Callable[[BlockFormat], ScaleRule] | None = None) -> dict[str, Any]:
    """The ``quantization_config`` for these rules.

    Args:
        rules: unquantised patterns first, then names and regular expressions, ``"*"`` last.
        scale_rule: of no account; compressed-tensors has no word for it.

    Raises:
        ArgumentError: another order, or a scheme that compressed-tensors has no words for.
    """
    ignore = [rule.pattern for rule in rules if rule.scheme == Scheme("none")]
    quantised = rules[len(ignore) :]
    if ignore != [rule.pattern for rule in rules[: len(ignore)]] or any(r.pattern == "*" for r in quantised[:-1]):
        raise ArgumentError(
            "compressed-tensors' config takes unquantised patterns first and '*' last; "
            f"the rules are {[(rule.pattern, str(rule.scheme)) for rule in rules]}"
        )
    for rule in quantised:
        if why := refuses(rule, None):
            raise ArgumentError(f"{rule.pattern!r} cannot be written: {why}")
    groups: dict[str, dict[str, Any]] = {}
    for scheme in dict.fromkeys(rule.scheme for rule in quantised):
        targets = [_target(rule.pattern) for rule in quantised if rule.scheme == scheme]
        groups[f"group_{len(groups)}"] = _write_group(scheme, targets)
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": QUANT_METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [_target(pattern) for pattern in ignore],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _scheme(group: Fields, default_format: object) -> Scheme:
    group.expect_unset("output_activations", "quantised outputs")
    named = Fields(group.path, {"format": group.get("format") or default_format})
    fmt = _FORMATS[named.expect("format", *_FORMATS)]
    weights, inputs = group.child("weights"), group.child("input_activations")
    if weights is None:
        raise CheckpointError(f"{group.path}.weights is null; the format {named.get('format')!r} needs them")
    weights.expect("num_bits", fmt.element.bits)
    weights.expect("dynamic", False)
    weights.expect("actorder", None)
    _check_group(weights)
    return Scheme.of(fmt, None if inputs is None else _activation(inputs))


def _activation(spec: Fields) -> Activation:
    spec.expect("type", "float")
    if spec.get("strategy") == "group":
        spec.expect("dynamic", True)
        _check_group(spec)
        return _BY_BITS[spec.expect("num_bits", *_BY_BITS)]
    spec.expect("num_bits", 8)
    spec.expect("symmetric", True)
    spec.expect("dynamic", spec.expect("strategy", "group", "token", "tensor") == "token")
    return FP8_DYNAMIC if spec.get("dynamic") else FP8_STATIC


def _check_group(spec: Fields) -> None:
    spec.expect("type", "float")
    spec.expect("strategy", "group")
    spec.expect("group_size", 32)
    spec.expect("symmetric", True)
    # before it had scale_dtype, compressed-tensors took four bits in groups of 32 to mean E8M0 scales
    spec.expect("scale_dtype", _SCALE_DTYPE, *([None] if spec.get("num_bits") == MXFP4.element.bits else []))


def _target(pattern: str) -> str:
    """A pattern in compressed-tensors' words, which has no globs."""
    if pattern == "*":
        return "Linear"
    if Rule(pattern=pattern, scheme=Scheme("none")).is_name or pattern.startswith("re:"):
        return pattern
    # Python 3.14 ends it with a word for the end of the text that older ones do not know
    return "re:" + fnmatch.translate(pattern).replace(r"\z", r"\Z")


def _write_group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    assert scheme.weight is not None
    return {
        "targets": targets,
        "format": next(name for name, fmt in _FORMATS.items() if fmt == scheme.weight),
        "weights": _write_block(scheme.weight, dynamic=False),
        "input_activations": _write_activation(scheme.activation),
        "output_activations": None,
    }


def _write_activation(activation: Activation) -> dict[str, Any] | None:
    if activation is None:
        return None
    if isinstance(activation, BlockFormat):
        return _write_block(activation, dynamic=True)
    token = activation == FP8_DYNAMIC
    strategy = "token" if token else "tensor"
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": token}


def _write_block(fmt: BlockFormat, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": fmt.element.bits,
        "type": "float",
        "symmetric": True,
        "group_size": fmt.block_size,
        "strategy": "group",
        "dynamic": dynamic,
        "scale_dtype": _SCALE_DTYPE,
    }
