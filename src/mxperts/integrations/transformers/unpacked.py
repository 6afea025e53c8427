"""Quantised weights of modules that are not linear layers, such as a router: small, unpacked once after loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxperts.checkpoint.stored import stored_tensor
from mxperts.errors import CheckpointError
from mxperts.formats import FP8_DYNAMIC, FP8_STATIC, Activation, BlockFormat
from mxperts.integrations.transformers.parameters import add_parameter, replace_parameter
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
        block_rows: rows that share their scales.
    """

    format: BlockFormat
    activation: Activation
    k: int
    dtype: torch.dtype
    codes: str
    scales: str
    block_rows: int


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


def unpack(module: Any) -> None:
    """Replace packed parameters by their values once they are loaded; ``state_dict`` shows them packed again."""
    weight: Unpacked = module.mxperts_weight
    codes = getattr(module, weight.codes).detach()
    delattr(module, weight.codes)
    module.register_buffer("mxperts_codes", codes, persistent=False)
    replace_parameter(module, "weight", _values(module))
    module.register_state_dict_post_hook(_show_packed)
    module.register_load_state_dict_pre_hook(_take_packed)
    if weight.activation is not None:
        module.register_forward_pre_hook(_quantize_input)


def _values(module: Any) -> Tensor:
    weight: Unpacked = module.mxperts_weight
    codes, scales = module.mxperts_codes, getattr(module, weight.scales)
    return dequantize(stored_tensor(codes, scales, weight.format, weight.k, block_rows=weight.block_rows), weight.dtype)


def _show_packed(module: Any, state: dict[str, Any], prefix: str, metadata: object) -> None:
    del state[f"{prefix}weight"]
    state[prefix + module.mxperts_weight.codes] = module.mxperts_codes


def _take_packed(module: Any, state: dict[str, Any], prefix: str, *args: object) -> None:
    weight: Unpacked = module.mxperts_weight
    if prefix + weight.codes in state:
        module.mxperts_codes.copy_(state.pop(prefix + weight.codes))
        getattr(module, weight.scales).data.copy_(state[prefix + weight.scales])
        state[f"{prefix}weight"] = _values(module)


def _quantize_input(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (fake_quantize(args[0], module.mxperts_weight.activation), *args[1:])
