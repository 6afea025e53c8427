"""Quantised weights of modules that are not linear layers, such as a router: small, unpacked once after loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxperts.errors import CheckpointError
from mxperts.formats import FP8_DYNAMIC, FP8_STATIC, Activation, BlockFormat
from mxperts.integrations.transformers.linear import as_mx
from mxperts.integrations.transformers.parameters import add_parameter
from mxperts.ops.quantize import dequantize, fake_quantize


@dataclass(frozen=True, kw_only=True)
class Unpacked:
    """How a module's weight is stored; kept on the module as ``mxperts_weight``.

    Attributes:
        format: of the weight.
        activation: what the module's input is quantised to.
        k: values in a row.
        dtype: of the unpacked weight.
        codes, scales: what the two parameters are called.
    """

    format: BlockFormat
    activation: Activation
    k: int
    dtype: torch.dtype
    codes: str
    scales: str


def store_packed(
    module: Any,
    weight: Unpacked,
    codes: tuple[tuple[int, ...], torch.dtype],
    scales: tuple[tuple[int, ...], torch.dtype],
) -> None:
    """Give a module the packed parameters that the checkpoint has for its ``weight``.

    Raises:
        CheckpointError: its input is to be quantised to fp8, which only linear layers and experts can do.
    """
    if weight.activation in (FP8_STATIC, FP8_DYNAMIC):
        raise CheckpointError(f"{type(module).__name__}: quantising its input to {weight.activation} is not supported")
    delattr(module, "weight")
    add_parameter(module, weight.codes, *codes)
    add_parameter(module, weight.scales, *scales)
    module.mxperts_weight = weight


def unpack_after_loading(model: nn.Module) -> None:
    """Replace the packed weights by their values, which ``state_dict`` will again show packed."""
    for module in model.modules():
        weight = getattr(module, "mxperts_weight", None)
        if isinstance(weight, Unpacked):
            _unpack(module, weight)


def _unpack(module: nn.Module, weight: Unpacked) -> None:
    codes = getattr(module, weight.codes).detach()
    values = dequantize(as_mx(codes, getattr(module, weight.scales), weight.format, weight.k), weight.dtype)
    delattr(module, weight.codes)
    module.register_parameter("weight", nn.Parameter(values, requires_grad=False))

    def show_packed(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        del state[f"{prefix}weight"]
        state[prefix + weight.codes] = codes

    module.register_state_dict_post_hook(show_packed)
    if weight.activation is not None:

        def quantize_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (fake_quantize(args[0], weight.activation), *args[1:])  # type: ignore[arg-type]

        module.register_forward_pre_hook(quantize_input)
