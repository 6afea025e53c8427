"""Parameters of packed modules, and the weight conversions that fill them from what exporters write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter

from mxperts.errors import CheckpointError


def add_parameter(module: Any, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Give a module a parameter without data; Transformers must not initialise it, it will be loaded."""
    module.register_parameter(
        name, nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device="meta"), requires_grad=False)
    )
    module._is_hf_initialized = True


def attribute(suffix: str) -> str:
    """What follows a projection's name in a fused module's parameter: ``.weight_packed`` gives ``_packed``.

    Each of an exporter's suffixes has its own, so that every parameter can be saved under the name it was read from.
    """
    return suffix.removeprefix(".weight").replace(".", "_")


def replace_parameter(module: Any, name: str, values: torch.Tensor) -> None:
    """Give a loaded module other values for a parameter, or a parameter made of what was loaded."""
    parameter = nn.Parameter(values, requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    module.register_parameter(name, parameter)


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


def check_complete(model: Any) -> None:
    """No parameter may be left as Transformers initialises what a checkpoint does not have.

    Models of another class than the checkpoint's, such as a classifier on a language model, may have new parameters.

    Raises:
        CheckpointError: one is; the message names it.
    """
    if type(model).__name__ not in (getattr(model.config, "architectures", None) or ()):
        return
    missing = [name for name, p in model.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
    if missing:
        raise CheckpointError(
            f"the checkpoint of {model.config.name_or_path} has no tensor for {missing[0]}"
            + (f" and {len(missing) - 1} other parameters" if len(missing) > 1 else "")
        )


def keep_bytes(module: Any) -> None:
    """Hold codes and scales that are stored as float8 or int8 as the bytes they are.

    Otherwise ``model.to(dtype)`` would take them for numbers and convert them. ``state_dict`` shows them as stored.
    """
    stored = {n: p.dtype for n, p in module.named_parameters(recurse=False) if _is_byte(p) and p.dtype != torch.uint8}
    if not stored:
        return
    for name in stored:
        replace_parameter(module, name, getattr(module, name).detach().view(torch.uint8))
    module.mxperts_stored = stored
    module.register_state_dict_post_hook(_show_stored)
    module.register_load_state_dict_pre_hook(_take_bytes)


def _is_byte(tensor: torch.Tensor) -> bool:
    return tensor.element_size() == 1


def _show_stored(module: Any, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for name, dtype in module.mxperts_stored.items():
        state[prefix + name] = state[prefix + name].view(dtype)


def _take_bytes(module: Any, state: dict[str, Any], prefix: str, *args: object) -> None:
    for name in module.mxperts_stored:
        if prefix + name in state:
            state[prefix + name] = state[prefix + name].view(torch.uint8)
