"""vLLM's quantisation keys and the schemes they stand for."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.quantization.utils.ocp_mx_utils import _ACTIVATION_QUANT_KEY_MAP, _WEIGHT_QUANT_KEY_MAP
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTensorSym,
    kFp8StaticTensorSym,
    kMxfp4Static,
    kMxfp6E2M3Static,
    kMxfp6E3M2Static,
)

from mxperts.formats import FP8_DYNAMIC, FP8_STATIC, Scheme

WEIGHTS: dict[Any, str] = {key: name for name, key in _WEIGHT_QUANT_KEY_MAP.items()}
"""vLLM's name of a weight format by its key; format names of ours."""
PACKED = (kMxfp4Static, kMxfp6E2M3Static, kMxfp6E3M2Static)
"""Weights whose codes vLLM holds in bytes that several share; those of MXFP8 go another way there."""
FP8: dict[Any, str] = {kFp8StaticTensorSym: FP8_STATIC, kFp8DynamicTensorSym: FP8_DYNAMIC}
"""Keys of fp8 inputs; for a dynamic scale per tensor, as the key has it, mxperts takes one for each token."""
ACTIVATIONS: dict[Any, str | None] = {
    None: None,
    **FP8,
    **{key: name for name, key in _ACTIVATION_QUANT_KEY_MAP.items()},
}
"""What a layer's input is quantised to by its key."""


def scheme_of_keys(weight_key: Any, activation_key: Any) -> Scheme:
    """The scheme of vLLM's keys for weights and inputs."""
    return Scheme.of(WEIGHTS[weight_key], ACTIVATIONS[activation_key])
