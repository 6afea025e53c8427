"""AMD Quark's checkpoints in vLLM: the schemes that vLLM's own config refuses."""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig, FusedMoEQuantDesc
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend, backend_to_kernel_cls
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.model_executor.layers.quantization.quark.quark_moe import QuarkMoEMethod, QuarkOCP_MX_MoEMethod
from vllm.platforms import current_platform

from mxperts.errors import ArgumentError
from mxperts.formats import FP8_STATIC, Scheme
from mxperts.integrations.vllm.keys import ACTIVATIONS, FP8, PACKED, WEIGHTS, scheme_of_keys
from mxperts.integrations.vllm.linear import MXQuarkLinear
from mxperts.integrations.vllm.plugin import step

RUN_BY_VLLM = frozenset(
    Scheme(name)
    for name in (
        *("w_mxfp4", "w_mxfp4_a_mxfp4", "w_mxfp4_a_mxfp6_e3m2", "w_mxfp4_a_mxfp6_e2m3", "w_mxfp4_a_fp8"),
        *("w_mxfp6_e3m2_a_mxfp6_e3m2", "w_mxfp6_e2m3_a_mxfp6_e2m3"),
    )
)
"""The schemes that ``QuarkOCP_MX_MoEMethod`` takes; it chooses who runs them."""
OURS = ("auto", "emulation")
"""Values of ``moe_backend`` that leave the choice, or choose vLLM's emulation, in whose place mxperts stands."""


def install() -> None:
    register_quantization_config("quark")(MXQuarkConfig)


class MXQuarkConfig(QuarkConfig):  # type: ignore[misc]
    """vLLM's config of Quark checkpoints, but for experts in schemes that it refuses, and fp8 linear layers on CPU.

    At the top of a module: vLLM pickles it for its processes.
    """

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        weight_key, activation_key, method = self.get_quant_method_target(prefix, type(layer))
        if method is not QuarkOCP_MX_MoEMethod:
            return super().get_quant_method(layer, prefix)
        with step(f"reading the scheme of {prefix}"):
            scheme = scheme_of_keys(weight_key, activation_key)
            if scheme in RUN_BY_VLLM or weight_key not in PACKED:
                return super().get_quant_method(layer, prefix)
            return MXQuarkMoEMethod(layer.moe_config, weight_key, activation_key)

    def _get_scheme_cls_from_config(self, config: dict[str, Any]) -> Any:
        """Linear layers: on CPU, MX weights with fp8 inputs are ours too."""
        weight, inputs = (self._unwrap_single_quant_config(config.get(name)) for name in ("weight", "input_tensors"))
        if current_platform.is_cpu() and not config.get("output_tensors") and not config.get("bias"):
            match = self._is_w_ocp_mx_a_x(weight, inputs, allow_static_fp8=True)
            if match and match.weight_quant_key in PACKED and match.activation_quant_key in FP8:
                return match.weight_quant_key, match.activation_quant_key, MXQuarkLinear
        return super()._get_scheme_cls_from_config(config)

    def init_scheme(self, scheme_cls: Any, weight_quant_key: Any, activation_quant_key: Any, **rest: Any) -> Any:
        if scheme_cls is MXQuarkLinear:
            return MXQuarkLinear(weight_quant_key, activation_quant_key)
        return super().init_scheme(scheme_cls, weight_quant_key, activation_quant_key, **rest)


class MXQuarkMoEMethod(QuarkOCP_MX_MoEMethod):  # type: ignore[misc]
    """Experts of a Quark checkpoint in any scheme: vLLM's parameters and loaders, and always ``MXExperts``.

    Raises:
        ArgumentError: ``moe_backend`` names a kernel of vLLM's, which has none for the scheme.
    """

    supported_activation_quant_keys: ClassVar = list(ACTIVATIONS)

    def __init__(self, moe: Any, weight_key: Any, activation_key: Any) -> None:
        QuarkMoEMethod.__init__(self, moe, weight_key, activation_key)  # not the parent's, which refuses schemes
        scheme = scheme_of_keys(weight_key, activation_key)
        if moe.moe_backend not in OURS:
            raise ArgumentError(
                f"moe_backend={moe.moe_backend!r} cannot run {scheme}: expected {' or '.join(OURS)}, which is mxperts"
            )
        self.weight_dtype = WEIGHTS[weight_key]
        self.input_dtype = "fp8" if activation_key in FP8 else ACTIVATIONS[activation_key]
        self.static_input_scales = scheme.activation == FP8_STATIC
        self.ocp_mx_scheme = scheme.name
        self.mxfp4_backend = Mxfp4MoeBackend.EMULATION
        self.experts_cls = backend_to_kernel_cls(self.mxfp4_backend)[0]
        self.moe_kernel = None

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        return quant_config(layer, self.weight_dtype, self.input_dtype)


def quant_config(layer: Any, weight: str, activation: str | None) -> Any:
    """What vLLM's kernels are told of experts whose parameters have vLLM's usual names.

    Args:
        layer: the experts; the names of constants and biases that it has not stand for None.
        weight, activation: the formats, as vLLM calls them.
    """

    def describe(dtype: str | None, scale: str, bias: str = "") -> FusedMoEQuantDesc:
        return FusedMoEQuantDesc(dtype, scale=getattr(layer, scale, None), bias=getattr(layer, bias, None))

    return FusedMoEQuantConfig(
        _a1=describe(activation, "w13_input_scale"),
        _a2=describe(activation, "w2_input_scale"),
        _w1=describe(weight, "w13_weight_scale", "w13_bias"),
        _w2=describe(weight, "w2_weight_scale", "w2_bias"),
        gemm1_alpha=getattr(layer, "swiglu_alpha", None),
        gemm1_beta=getattr(layer, "swiglu_beta", None),
        gemm1_clamp_limit=getattr(layer, "swiglu_limit", None),
    )
