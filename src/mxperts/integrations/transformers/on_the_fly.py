"""Quantising a model while it loads: the weights arrive as numbers and stay as codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform

from mxperts.checkpoint.layout import ModelScheme
from mxperts.errors import ArgumentError
from mxperts.formats import FP8_STATIC, BlockFormat, Scheme
from mxperts.integrations.transformers.experts import (
    ExpertsModule,
    PackedProjection,
    Stacked,
    is_experts,
    projection_shapes,
    up_projection,
)
from mxperts.integrations.transformers.linear import StoredLinear
from mxperts.integrations.transformers.parameters import add_parameter, experts_component, merge_experts
from mxperts.ops.quantize import quantize
from mxperts.quantization.checkpoint import ALWAYS_EXCLUDED, DEFAULT_EXCLUDE
from mxperts.rotation import check_rotation, rotate_weight


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parameter that is to be quantised.

    Attributes:
        format: to this.
        scales: the parameter's name of the scales.
        shape: of the codes.
        rotation: what to rotate it by before.
        transpose: whether the weight arrives as [E, K, N].
    """

    format: BlockFormat
    scales: str
    shape: tuple[int, ...]
    rotation: str | None = None
    transpose: bool = False


def prepare_for_quantization(
    model: nn.Module, scheme: ModelScheme, backend: str
) -> tuple[list[WeightConverter], dict[str, Target]]:
    """Give every module that ``scheme`` quantises packed parameters in place of its weights.

    Args:
        model: on the meta device, as Transformers builds it.
        scheme: what to quantise, to what; its names are AMD Quark's, or those of our own layout.
        backend: which backend will run it.

    Returns:
        The conversions by which the model is saved as AMD Quark would store it, and the parameters to be quantised.

    Raises:
        ArgumentError: static fp8, which needs calibrated scales; experts of one layer would differ in format; or rows
            that cannot be rotated.
    """
    converters: dict[str, WeightConverter] = {}
    targets: dict[str, Target] = {}
    tied = getattr(model, "all_tied_weights_keys", {})
    _check_patterns(model, scheme)
    for path, module in list(model.named_modules()):
        if is_experts(module):
            found = _experts_scheme(path, module, scheme)
            if found.weight is not None:
                targets |= _pack_experts(model, path, module, found, scheme, backend, converters)
        elif type(module) is nn.Linear and f"{path}.weight" not in tied:
            found = _check(path, scheme.scheme_of(path))
            if found.weight is not None:
                shape = (module.out_features, *_row(path, found.weight, module.in_features, scheme))
                model.set_submodule(path, _linear(module, found, shape, scheme.rotation, backend))
                targets[f"{path}.weight"] = Target(
                    format=found.weight, scales=f"{path}.weight_scale", shape=shape, rotation=scheme.rotation
                )
    if not targets:
        raise ArgumentError(f"nothing in {type(model).__name__} is left to quantise: exclude less")
    return list(converters.values()), targets


def saving_conversions(used: Sequence[WeightTransform], ours: Sequence[WeightConverter]) -> list[WeightTransform]:
    """The conversions that ``save_pretrained`` is to undo: those that loaded the model, and the same for the scales.

    Args:
        used: the conversions that loaded the model.
        ours: those of ``prepare_for_quantization``, which serve where the model has none of its own.
    """
    result = list(used)
    for converter in ours:
        (target,) = converter.target_patterns
        parameter = target.removesuffix("_scale")
        stock = next((c for c in used if parameter.endswith(c.target_patterns[0].lstrip("."))), None)
        if not isinstance(stock, WeightConverter):  # experts that the model's checkpoints store in one tensor
            result = [*(c for c in result if c is not stock), converter]
        elif target != parameter:
            sources, targets = stock._original_source_patterns, stock._original_target_patterns
            operations = list(stock.operations)
            scales = WeightConverter([s + "_scale" for s in sources], [t + "_scale" for t in targets], operations)
            result.append(scales)
    return result


class QuantizeOnLoad(ConversionOps):  # type: ignore[misc]
    """A weight becomes its codes, and its scales beside it."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self.targets = targets

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, nn.Parameter]:
        """Called by Transformers with one parameter, its experts already stacked."""
        (value,) = input_dict.values()
        weight: Tensor = value[0] if isinstance(value, list) else value
        target = self.targets[full_layer_name]
        if target.transpose:
            weight = weight.transpose(-1, -2)
        mx = quantize(weight if target.rotation is None else rotate_weight(weight), target.format)
        if missing_keys is not None:
            missing_keys.discard(target.scales)
        codes = mx.packed[..., : target.format.stored_size(mx.k)].reshape(target.shape)
        tensors = {full_layer_name: codes, target.scales: mx.scales}
        return {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}


def _check_patterns(model: nn.Module, scheme: ModelScheme) -> None:
    """What the user excludes must be there."""
    names = [name for name, _ in model.named_modules()]
    for path, module in model.named_modules():
        if is_experts(module):
            names += [f"{path}.{e}.{p}" for e in range(module.num_experts) for p in _projections(module)]
    for rule in scheme.rules[:-1]:
        if rule.pattern in (*ALWAYS_EXCLUDED, *DEFAULT_EXCLUDE):
            continue
        if not any(rule.matches(name) for name in names):
            raise ArgumentError(f"exclude: {rule.pattern!r} matches no module of {type(model).__name__}")


def _projections(module: ExpertsModule) -> tuple[str, ...]:
    return ("gate_proj", "up_proj", "down_proj") if module.has_gate else ("up_proj", "down_proj")


def _row(path: str, fmt: BlockFormat, k: int, scheme: ModelScheme) -> tuple[int, ...]:
    """Shape of a row of codes.

    Raises:
        ArgumentError: a row does not fill whole bytes, which no checkpoint can hold, or cannot be rotated.
    """
    if k * fmt.element.bits % 8:
        raise ArgumentError(f"{path}: a row of {k} values does not fill whole bytes in {fmt}; exclude it")
    check_rotation(scheme.rotation, **{path: k})
    return (fmt.blocks(k), fmt.block_bytes) if scheme.names.blocked else (fmt.stored_size(k),)


def _experts_scheme(path: str, module: ExpertsModule, scheme: ModelScheme) -> Scheme:
    leaves = [f"{path}.{e}.{p}" for e in range(module.num_experts) for p in _projections(module)]
    found = {scheme.scheme_of(leaf) for leaf in leaves}
    if len(found) > 1:
        names = " and ".join(sorted(s.name for s in found))
        raise ArgumentError(
            f"{path}: {names} in one layer cannot be quantised while loading; use `mxperts quantize` for that"
        )
    return _check(path, found.pop())


def _check(path: str, scheme: Scheme) -> Scheme:
    if scheme.weight is None and scheme.activation is not None:
        raise ArgumentError(f"{path}: {scheme} quantises no weights, which loading cannot do; use mx.fake_quantize")
    if scheme.activation == FP8_STATIC:
        raise ArgumentError(
            f"{path}: {scheme} needs an input scale, which only a calibrated checkpoint has; use fp8_dynamic"
        )
    return scheme


def _pack_experts(
    model: nn.Module,
    path: str,
    module: ExpertsModule,
    scheme: Scheme,
    model_scheme: ModelScheme,
    backend: str,
    converters: dict[str, WeightConverter],
) -> dict[str, Target]:
    fmt = scheme.weight
    assert fmt is not None
    component = experts_component(model, path)
    # As AMD Quark names them: gate and up in one where the model has their rows alternate, apart otherwise.
    names: dict[str, tuple[str, ...]] = {up_projection(module): (up_projection(module),), "down_proj": ("down_proj",)}
    if module.has_gate and module.is_concatenated:
        names["gate_up_proj"] = ("gate_proj", "up_proj")
    projections, targets = [], {}
    for parameter, (n, k) in projection_shapes(module).items():
        delattr(module, parameter)
        shape = (module.num_experts, n, *_row(path, fmt, k, model_scheme))
        add_parameter(module, parameter, shape, torch.uint8)
        add_parameter(module, f"{parameter}_scale", (module.num_experts, n, fmt.blocks(k)), torch.uint8)
        projections.append(PackedProjection(format=fmt, k=k, codes=parameter, scales=f"{parameter}_scale"))
        targets[f"{path}.{parameter}"] = Target(
            format=fmt,
            scales=f"{path}.{parameter}_scale",
            shape=shape,
            rotation=model_scheme.rotation,
            transpose=module.is_transposed,
        )
        suffixes = (".weight", ".weight_scale", ".bias") if module.has_bias else (".weight", ".weight_scale")
        for suffix in suffixes:
            converter = merge_experts(component, names[parameter], suffix, parameter)
            converters.setdefault(converter.target_patterns[0], converter)
    module.mxperts = Stacked(
        up=projections[0],
        down=projections[1],
        activation=scheme.activation,
        interleaved=not module.is_concatenated,
        backend=backend,
        rotation=model_scheme.rotation,
    )
    return targets


def _linear(
    linear: nn.Linear, scheme: Scheme, shape: tuple[int, ...], rotation: str | None, backend: str
) -> StoredLinear:
    fmt = scheme.weight
    assert fmt is not None
    n, k = linear.out_features, linear.in_features
    return StoredLinear(
        linear,
        fmt,
        scheme.activation,
        codes=("weight", shape, torch.uint8),
        scales=("weight_scale", (n, fmt.blocks(k)), torch.uint8),
        rotation=rotation,
        backend=backend,
    )
