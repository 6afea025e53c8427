"""Parameters of packed modules, and the weight conversions that fill them from what exporters write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter


def add_parameter(module: Any, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Give a module a parameter without data; Transformers must not initialise it, it will be loaded."""
    module.register_parameter(name, nn.Parameter(torch.empty(*shape, dtype=dtype, device="meta"), requires_grad=False))
    module._is_hf_initialized = True


def attribute(suffix: str) -> str:
    """What follows a projection's name in a fused module's parameter: ``.weight_packed`` gives ``_packed``.

    Each of an exporter's suffixes has its own, so that every parameter can be saved under the name it was read from.
    """
    return suffix.removeprefix(".weight").replace(".", "_")


def experts_component(model: nn.Module, path: str) -> str:
    """The end of an experts module's name by which a conversion finds it: ``.experts``, or ``mlp.experts``.

    Transformers looks for it as a regular expression anywhere in a tensor's name, where ``.experts`` also finds
    ``shared_experts``. The part before it is named only for models that have such a module, because it may be one that
    another conversion renames.
    """
    *_, parent, last = path.split(".")
    parts = {part for name, _ in model.named_modules() for part in name.split(".")}
    ambiguous = any(part != last and part.endswith(last) for part in parts)
    return f"{parent}.{last}" if ambiguous else f".{last}"


def merge_experts(component: str, projections: Sequence[str], suffix: str, parameter: str) -> WeightConverter:
    """Stack one tensor of every expert into one parameter of the experts module, and back when the model is saved.

    Args:
        component: ``experts_component`` of the module.
        projections: the exporter's projections that make one of the model's: gate and up, or one.
        suffix: what follows the projection in the tensor's name, such as ``.weight_scale``.
        parameter: the model's projection, such as ``gate_up_proj``.
    """
    sources = [f"{component}.*.{p}{suffix}" for p in projections]
    operations: list[ConversionOps] = [MergeModulelist(dim=0)]
    if len(sources) > 1:  # a scalar per expert has no rows along which gate and up could follow each other
        operations.append(Concatenate(dim=0 if suffix == ".input_scale" else 1))
    return WeightConverter(sources, f"{component}.{parameter}{attribute(suffix)}", operations=operations)
