"""MXFP4 experts of compressed-tensors checkpoints in vLLM, with their activations as the checkpoint has them."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import (
    Mxfp4MoeBackend,
    backend_to_kernel_cls,
    make_mxfp4_moe_kernel,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_mxfp4 import (  # noqa: E501
    CompressedTensorsW4A4Mxfp4MoEMethod,
)
from vllm.platforms import current_platform

from mxperts.errors import CheckpointError
from mxperts.integrations.vllm.plugin import step
from mxperts.integrations.vllm.quark import OURS, quant_config


def install() -> None:
    register_quantization_config("compressed-tensors")(MXCompressedTensorsConfig)


class MXCompressedTensorsConfig(CompressedTensorsConfig):  # type: ignore[misc]
    """vLLM's config, but for MXFP4 experts that vLLM would run as another scheme, or not at all.

    vLLM has one method for these, which runs them by Marlin, weight-only, whatever the checkpoint says of activations;
    on a GPU with native FP4 it quantises them. At the top of a module: vLLM pickles it.
    """

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        method = super().get_quant_method(layer, prefix)
        if type(method) is not CompressedTensorsW4A4Mxfp4MoEMethod:
            return method
        inputs = self.get_scheme_dict(layer, f"{prefix}.0.{layer.ckpt_gate_proj_name}")["input_activations"]
        asked, by_marlin = layer.moe_config.moe_backend, method.mxfp4_backend is Mxfp4MoeBackend.MARLIN
        wrong = by_marlin and not method.use_cutlass_mxfp4 and inputs is not None
        if asked == "emulation" or (asked in OURS and (wrong or current_platform.is_cpu())):
            with step(f"reading the scheme of {prefix}"):
                return MXCompressedTensorsMoEMethod(layer.moe_config, _activation(inputs))
        return method


def _activation(inputs: Any) -> str | None:
    """The format of inputs, as vLLM calls it.

    Raises:
        CheckpointError: it is not MXFP4.
    """
    if inputs is None:
        return None
    if not CompressedTensorsConfig._is_mxfp4(inputs) or not inputs.dynamic:
        raise CheckpointError(f"MXFP4 experts need inputs in MXFP4, dynamic, or unquantised, not {inputs}")
    return "mxfp4"


class MXCompressedTensorsMoEMethod(CompressedTensorsW4A4Mxfp4MoEMethod):  # type: ignore[misc]
    """vLLM's parameters and loaders, run by ``MXExperts``.

    Args:
        moe: the layer, as vLLM describes it.
        activation: what inputs are quantised to: "mxfp4" or None.
    """

    def __init__(self, moe: Any, activation: str | None) -> None:
        super().__init__(moe)
        self.activation = activation
        self.use_cutlass_mxfp4 = False
        self.mxfp4_backend = Mxfp4MoeBackend.EMULATION
        self.experts_cls = backend_to_kernel_cls(self.mxfp4_backend)[0]

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        return quant_config(layer, "mxfp4", self.activation)

    def process_weights_after_loading(self, layer: Any) -> None:
        for name in ("w13_weight", "w2_weight"):
            layer.register_parameter(name, getattr(layer, f"{name}_packed"))
            delattr(layer, f"{name}_packed")
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self.moe_kernel = make_mxfp4_moe_kernel(
            moe_quant_config=self.moe_quant_config,
            moe_config=self.moe,
            mxfp4_backend=self.mxfp4_backend,
            experts_cls=self.experts_cls,
            routing_tables=layer._expert_routing_tables(),
        )
        self.moe_kernel.fused_experts.process_weights_after_loading(layer)
