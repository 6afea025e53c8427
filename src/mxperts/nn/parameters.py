"""Parameters of the modules: packed weights and scales, which nothing trains or converts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mxperts.formats import BlockFormat, Preset, Scheme
from mxperts.ops.prepare import Weight
from mxperts.ops.quantize import quantize
from mxperts.rotation import check_rotation, rotate_weight
from mxperts.tensor import MXTensor


class FrozenModule(nn.Module):
    """A module without trainable parameters whose input scales stay float32 through ``half()`` and ``to(dtype)``.

    A state dict remembers the format of its codes, and by what they are rotated, as long as it is handed on as it is,
    and is refused by a module of another format or rotation.
    """

    scheme: Scheme
    rotation: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_note_format)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_check_format)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenModule:
        scales = [
            (name, p.detach()) for name, p in self.named_parameters(recurse=False) if name.endswith("input_scale")
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in scales:
            converted = getattr(self, name)
            if converted.dtype is not scale.dtype:
                setattr(self, name, frozen(scale.to(converted.device)))
        return self

    def set_weight(self, name: str, weight: Weight) -> None:
        """Register packed codes as ``name`` and scales as ``name_scale``, or a dense weight as ``name``, uncopied."""
        if isinstance(weight, MXTensor):
            self.register_parameter(name, frozen(weight.packed))
            self.register_parameter(f"{name}_scale", frozen(weight.scales))
        else:
            self.register_parameter(name, frozen(weight.detach()))

    def get_weight(self, name: str, fmt: BlockFormat | None, k: int) -> Weight:
        """What ``set_weight`` was given."""
        tensor: Tensor = getattr(self, name)
        return tensor if fmt is None else MXTensor(tensor, getattr(self, f"{name}_scale"), fmt, k)


def _note_format(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    assert isinstance(module, FrozenModule)
    metadata["weight_format"] = _described(module)


def _check_format(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    assert isinstance(module, FrozenModule)
    found, expected = metadata.get("weight_format"), _described(module)
    if found not in (None, expected):
        errors.append(f"{prefix}: the state dict holds codes of {found}, but the module's format is {expected}")


def _described(module: FrozenModule) -> str:
    return str(module.scheme.weight) + (f" rotated by {module.rotation}" if module.rotation else "")


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter without a gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def zero_weight(
    fmt: BlockFormat | None, *shape: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> Weight:
    """A weight of zeros; ``dtype`` is that of a dense one."""
    *rows, k = shape
    if fmt is None:
        return torch.zeros(shape, device=device, dtype=dtype)
    packed = torch.zeros(*rows, fmt.packed_size(k), device=device, dtype=torch.uint8)
    return MXTensor(packed, torch.zeros(*rows, fmt.blocks(k), device=device, dtype=torch.uint8), fmt, k)


def quantize_weight(
    dense: Tensor,
    fmt: BlockFormat | None,
    name: str,
    rotation: str | None,
    *,
    preset: Preset | str | None,
    backend: str,
) -> Weight:
    """A dense weight as ``mx.quantize`` brings it to a format, rotated before; for no format rounded to its dtype.

    Args:
        name: what to call it if its rows cannot be rotated.
    """
    check_rotation(rotation, **{name: dense.shape[-1]})
    dense = dense.detach()
    values = dense if rotation is None else rotate_weight(dense)
    return values.to(dense.dtype) if fmt is None else quantize(values, fmt, preset=preset, backend=backend)


def unset_scale(device: torch.device | str | None) -> Tensor:
    """An input scale that is yet to be loaded: NaN, which the operations refuse."""
    return torch.full((), torch.nan, device=device, dtype=torch.float32)
