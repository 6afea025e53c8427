"""AMD Quark's layout: ``<linear>.weight``, ``<linear>.weight_scale``, and its ``quantization_config``.

Quark itself exports MXFP4 and MXFP6. Its config has words for MXFP8 too; for MXINT8 (``int8`` with ``e8m0`` scales, in
analogy) only mxperts writes and reads them.

Source: amd-quark 0.13, ``QConfig.to_dict`` and ``export``; vLLM 0.33, ``quantization/quark/quark.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mxperts.checkpoint.fields import Fields, check_pattern
from mxperts.checkpoint.layout import ModelScheme, Rule, TensorNames
from mxperts.errors import ArgumentError, CheckpointError
from mxperts.formats import (
    FP8_DYNAMIC,
    FP8_STATIC,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    Activation,
    BlockFormat,
    ScaleRule,
    Scheme,
)

NAME = "quark"
QUANT_METHOD = "quark"
NAMES = TensorNames(codes=".weight", scales=".weight_scale", input_scale=".input_scale")
NAMES_PER_BLOCK = replace(NAMES, scale_dtypes={MXFP8_E4M3.name: "F8_E8M0"})
"""With MXFP8 as Quark itself stores it."""

_DTYPES = {
    "fp4": MXFP4,
    "fp6_e2m3": MXFP6_E2M3,
    "fp6_e3m2": MXFP6_E3M2,
    "fp8_e4m3": MXFP8_E4M3,
    "fp8_e5m2": MXFP8_E5M2,
    "int8": MXINT8,
}
_SCALE_RULES = (ScaleRule.EVEN, ScaleRule.FLOOR, ScaleRule.CEIL)
_BLOCK_SCALE = "float8_e8m0fnu"
_WEIGHT_ONLY_ALGORITHMS = ("awq", "gptq", "gptaq", "qronos", "autoround", "smooth", "autosmoothquant")
"""Algorithms whose whole effect is in the stored tensors; others need operations at run time."""


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` of Quark has MX formats anywhere."""
    groups = [config.get("global_quant_config")]
    for key in ("layer_quant_config", "layer_type_quant_config"):
        if isinstance(layers := config.get(key), Mapping):
            groups += layers.values()
    return any(
        _is_mx(spec)
        for group in groups
        if isinstance(group, Mapping)
        for spec in (group.get("weight"), group.get("input_tensors"))
    )


def parse(config: Mapping[str, Any], path: str = "quantization_config") -> ModelScheme:
    """Read Quark's ``quantization_config``: ``exclude``, then by layer, then by layer type, then the global rule.

    Args:
        config: the config.
        path: where it stands, for messages.

    Raises:
        CheckpointError: it asks for something that mxperts does not support; the message names the field.
    """
    top = Fields.of(path, config)
    top.expect_unset("kv_cache_quant_config", "a quantised key-value cache")
    top.expect_unset("softmax_quant_spec", "quantised softmax")
    _check_algorithms(top)
    if (export := top.child("export")) is not None:
        export.expect("weight_format", "real_quantized", None)
        export.expect_unset("kv_cache_group", "a quantised key-value cache")

    rules = [Rule(pattern=pattern, scheme=Scheme("none")) for pattern in top.patterns("exclude")]
    for pattern, group in top.children("layer_quant_config"):
        check_pattern(group.path, pattern)
        rules.append(_rule(pattern, group))
    for layer_type, group in top.children("layer_type_quant_config"):
        if layer_type.rpartition(".")[2] != "Linear":
            raise CheckpointError(f"{group.path} quantises {layer_type}; mxperts supports Linear")
        rules.append(_rule("*", group))
    if (group_ := top.child("global_quant_config")) is not None:
        rules.append(_rule("*", group_))
    return ModelScheme(layout=NAME, names=NAMES, rules=tuple(rules), config=config)


def refuses(rule: Rule, model_type: str | None) -> str | None:
    """Why this layout cannot hold a module, whose name is the rule's pattern; None if it can."""
    return None if rule.block_rows == 1 else f"scales that {rule.block_rows} rows share are only read, not written"


def write(
    rules: Sequence[Rule],
    scale_rule: Callable[[BlockFormat], ScaleRule] | None = None,
    *,
    per_block: bool = False,
) -> dict[str, Any]:
    """Quark's ``quantization_config`` for these rules.

    Args:
        rules: unquantised patterns first, then layers, ``"*"`` last: the order of Quark's own precedence.
        scale_rule: by which weights in a format were quantised; ``even`` by default. Activations have ``even``.
        per_block: describe MXFP8 in the words that Quark itself reads, ``per_block`` with blocks of one row, instead of
            vLLM's, which are those of the other formats.

    Raises:
        ArgumentError: another order.
    """
    exclude = [rule.pattern for rule in rules[:-1] if rule.scheme == Scheme("none")]
    layers = rules[len(exclude) : -1]
    if (
        not rules
        or rules[-1].pattern != "*"
        or any(rule.scheme == Scheme("none") for rule in layers)
        or any(rule.block_rows != 1 for rule in rules)
    ):
        raise ArgumentError(
            "Quark's config takes unquantised patterns first, then layers, then '*', each row with its own scales; "
            f"the rules are {[(rule.pattern, str(rule.scheme), rule.block_rows) for rule in rules]}"
        )
    return {
        "quant_method": QUANT_METHOD,
        "quant_mode": "eager_mode",
        "version": "0.13",
        "global_quant_config": _write_group(rules[-1].scheme, scale_rule, per_block),
        "layer_quant_config": {rule.pattern: _write_group(rule.scheme, scale_rule, per_block) for rule in layers},
        "layer_type_quant_config": {},
        "exclude": exclude,
        "algo_config": None,
        "softmax_quant_spec": None,
        "kv_cache_quant_config": {},
        "kv_cache_post_rope": False,
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
    }


def _rule(pattern: str, group: Fields) -> Rule:
    group.expect_unset("output_tensors", "quantised outputs")
    group.expect_unset("bias", "quantised biases")
    weight = _one(group, "weight")
    weight_format = _weight(weight) if weight else None
    per_block = weight is not None and weight.get("qscheme") == "per_block"
    inputs = _one(group, "input_tensors")
    scheme = Scheme.of(weight_format, _activation(inputs, per_block=per_block) if inputs else None)
    rows = weight.get("block_size")[0] if weight and per_block else 1
    return Rule(pattern=pattern, scheme=scheme, block_rows=rows)


def _one(group: Fields, key: str) -> Fields | None:
    """A field that is a spec, a list of one spec, or null."""
    value = group.get(key)
    if not isinstance(value, list):
        return group.child(key)
    if len(value) != 1:
        raise CheckpointError(
            f"{group.path}.{key} has {len(value)} stages; mxperts supports one (NVFP4 and FP8 over INT4 have two)"
        )
    return Fields.of(f"{group.path}.{key}[0]", value[0])


def _weight(spec: Fields) -> BlockFormat:
    spec.expect("is_dynamic", False, None)
    return _block_format(spec)


def _activation(spec: Fields, *, per_block: bool) -> Activation:
    if per_block and spec.get("qscheme") == "per_group":
        # Quark kept a source in FP8 with E8M0 scales, and says so at the weight only; its own forward pass
        # gives activations float scales instead, amax / 448
        spec.expect("dtype", "fp8_e4m3")
        spec.expect("is_dynamic", True)
        spec.expect("group_size", MXFP8_E4M3.block_size)
        return MXFP8_E4M3
    if spec.get("dtype") == "fp8_e4m3" and not _is_mx(spec.values):
        spec.expect("symmetric", True, None)
        # Quark's per_channel is one scale a token; mxperts gives every dynamic fp8 activation one scale a token
        spec.expect("qscheme", "per_tensor", *(["per_channel"] if spec.get("is_dynamic") else []))
        return FP8_DYNAMIC if spec.expect("is_dynamic", True, False) else FP8_STATIC
    spec.expect("is_dynamic", True)
    spec.expect("qscheme", "per_group")
    spec.expect("scale_calculation_mode", ScaleRule.EVEN.value, None)
    return _block_format(spec)


def _block_format(spec: Fields) -> BlockFormat:
    fmt = _DTYPES[spec.expect("dtype", *_DTYPES)]
    spec.expect("is_scale_quant", False, None)
    if spec.expect("qscheme", "per_group", "per_block") == "per_group":
        spec.expect("ch_axis", -1, 1, None)
        spec.expect("group_size", fmt.block_size)
        spec.expect("scale_format", "e8m0")
        return fmt
    spec.expect("dtype", "fp8_e4m3")
    spec.expect("scale_type", _BLOCK_SCALE)
    match spec.get("block_size"):
        case [int(rows), fmt.block_size] if rows >= 1:
            return fmt
    raise CheckpointError(
        f"{spec.path}.block_size is {spec.get('block_size')!r}; mxperts supports [rows, {fmt.block_size}]"
    )


def _is_mx(spec: object) -> bool:
    if isinstance(spec, list):
        return any(_is_mx(s) for s in spec)
    return isinstance(spec, Mapping) and (
        spec.get("scale_format") == "e8m0" or spec.get("scale_type") == _BLOCK_SCALE or spec.get("dtype") == "mx"
    )


def _check_algorithms(top: Fields) -> None:
    value = top.get("algo_config")
    algorithms: Iterable[Any] = value if isinstance(value, list) else [] if value is None else [value]
    for index, algorithm in enumerate(algorithms):
        Fields.of(f"{top.path}.algo_config[{index}]", algorithm).expect("name", *_WEIGHT_ONLY_ALGORITHMS)


def _write_group(
    scheme: Scheme, scale_rule: Callable[[BlockFormat], ScaleRule] | None, per_block: bool
) -> dict[str, Any]:
    weight, inputs = None, _write_activation(scheme.activation)
    if per_block and scheme.weight == MXFP8_E4M3 and scheme.activation in (None, FP8_STATIC, FP8_DYNAMIC, MXFP8_E4M3):
        weight = _FP8_PER_BLOCK
        inputs = _FP8_PER_GROUP if scheme.activation == MXFP8_E4M3 else inputs
    elif scheme.weight is not None:
        rule = scale_rule(scheme.weight) if scale_rule else ScaleRule.EVEN
        weight = _write_block(scheme.weight, is_dynamic=False, rule=rule)
    return {
        "weight": weight,
        "input_tensors": inputs,
        "output_tensors": None,
        "bias": None,
        "target_device": None,
    }


def _write_activation(activation: Activation) -> dict[str, Any] | None:
    if activation is None:
        return None
    if isinstance(activation, BlockFormat):
        return _write_block(activation, is_dynamic=True)
    if activation == FP8_STATIC:
        return _FP8 | {"is_dynamic": False, "qscheme": "per_tensor", "observer_cls": "PerTensorMinMaxObserver"}
    per_token = {"qscheme": "per_channel", "ch_axis": 1, "observer_cls": "PerChannelMinMaxObserver"}
    return _FP8 | per_token | {"is_dynamic": True}


def _write_block(fmt: BlockFormat, *, is_dynamic: bool, rule: ScaleRule = ScaleRule.EVEN) -> dict[str, Any]:
    dtype = next(name for name, known in _DTYPES.items() if known == fmt)
    return _SPEC | {
        "dtype": dtype,
        "is_dynamic": is_dynamic,
        "qscheme": "per_group",
        "ch_axis": -1,
        "group_size": fmt.block_size,
        "scale_type": "float",
        "scale_format": "e8m0",
        "scale_calculation_mode": rule.value if rule in _SCALE_RULES else None,
        "observer_cls": "PerBlockMXObserver",
    }


_SPEC: dict[str, Any] = {
    "dtype": None,
    "is_dynamic": None,
    "qscheme": None,
    "ch_axis": None,
    "group_size": None,
    "block_size": None,
    "symmetric": None,
    "round_method": "half_even",
    "scale_type": None,
    "zero_point_type": "int32",
    "scale_format": None,
    "scale_calculation_mode": None,
    "mx_element_dtype": None,
    "observer_cls": None,
    "is_scale_quant": False,
}
_FP8 = _SPEC | {"dtype": "fp8_e4m3", "symmetric": True}
_FP8_PER_BLOCK = _FP8 | {
    "is_dynamic": False,
    "qscheme": "per_block",
    "block_size": [1, MXFP8_E4M3.block_size],
    "scale_type": _BLOCK_SCALE,
    "observer_cls": "PerBlock2DMinMaxObserver",
}
_FP8_PER_GROUP = _FP8 | {
    "is_dynamic": True,
    "qscheme": "per_group",
    "ch_axis": -1,
    "group_size": MXFP8_E4M3.block_size,
    "observer_cls": "PerGroupMinMaxObserver",
}
