"""A layer as vLLM describes it, in the words of ``fused_experts``. Imports nothing of vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mxperts.formats import FP8_DYNAMIC, FP8_STATIC, Scheme
from mxperts.ops.activation import ACTIVATIONS

PACKED_HALVES = "swigluoai_uninterleave"
"""vLLM's name of ``swigluoai`` with all gate rows before all up rows; its constants have other defaults."""


def scheme_of(quant_config: Any) -> Scheme:
    """The scheme that a ``FusedMoEQuantConfig`` describes; fp8 without a scale takes one from each token.

    Raises:
        FormatError: a dtype is none of ours.
    """
    activation = quant_config.quant_dtype
    if activation == "fp8":
        activation = FP8_DYNAMIC if quant_config.a1_scale is None else FP8_STATIC
    return Scheme.of(quant_config.weight_quant_dtype, activation)


def activation_arguments(moe_config: Any, quant_config: Any) -> dict[str, Any]:
    """The activation function of a layer, as ``fused_experts`` takes it.

    Constants come from the quantisation config, or else from the model's, as in vLLM's ``ApplyMoEActivationConfig``.
    """

    def first(*given: float | None) -> float | None:
        return next((value for value in given if value is not None), None)

    limit = first(quant_config.gemm1_clamp_limit, moe_config.swiglu_limit)
    alpha = first(quant_config.gemm1_alpha, moe_config.swiglu_alpha)
    beta = first(quant_config.gemm1_beta, moe_config.swiglu_beta)
    name = moe_config.activation.value
    constants: dict[str, Callable[[], dict[str, float | None]]] = {
        "silu": lambda: {"swiglu_limit": limit},
        "swiglustep": lambda: {"swiglu_limit": limit},
        "swigluoai": lambda: {"swiglu_limit": limit, "swiglu_alpha": alpha, "swiglu_beta": beta},
        PACKED_HALVES: lambda: {
            "swiglu_limit": limit,
            "swiglu_alpha": first(alpha, 1.0),
            "swiglu_beta": first(beta, 0.0),
        },
        "situ": lambda: {
            "swiglu_beta": moe_config.activation_situ_beta,
            "swiglu_linear_beta": moe_config.activation_situ_linear_beta,
        },
    }
    return {
        "activation": "swigluoai" if name == PACKED_HALVES else name,
        "interleaved": name == "swigluoai",
        **constants.get(name, dict)(),
    }


def is_supported_activation(activation: Any) -> bool:
    """Whether ``fused_experts`` has the function that a ``MoEActivation`` names."""
    return activation.value in (*ACTIVATIONS, PACKED_HALVES)
