"""The experts that vLLM's fused mixture-of-experts kernel calls, on packed weights in their backend's own layout."""

from __future__ import annotations

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.experts import ocp_mx_emulation_moe
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.platforms import current_platform

from mxperts.formats import FP8_STATIC
from mxperts.integrations import hooks
from mxperts.integrations.vllm.call import activation_arguments, is_supported_activation, scheme_of
from mxperts.integrations.vllm.options import configured_backend
from mxperts.integrations.vllm.plugin import PROGRAM, step
from mxperts.nn.parameters import frozen
from mxperts.ops.dispatch import explain
from mxperts.ops.experts import fused_experts
from mxperts.ops.prepare import PreparedExperts, prepare
from mxperts.tensor import MXTensor

logger = init_logger(f"vllm.{__name__}")


def install() -> None:
    """vLLM looks the class up in its module whenever it chooses its emulation."""
    ocp_mx_emulation_moe.OCP_MXQuantizationEmulationTritonExperts = MXExperts


class MXExperts(mk.FusedMoEExpertsModular):  # type: ignore[misc]
    """vLLM's experts in any MX scheme: ``mx.fused_experts`` with weights that were prepared when they were loaded.

    Args:
        moe_config: the layer, as vLLM describes it.
        quant_config: formats, scales and biases; the scales of the weights are handed over to the prepared weights.

    Attributes:
        scheme: formats of weights and inputs.
        prepared: the weights; None until they are loaded.
    """

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)
        with step("reading the configuration of experts"):
            self.backend = configured_backend()
            self.scheme = scheme_of(quant_config)
        self.arguments = activation_arguments(moe_config, quant_config)
        self.prepared: PreparedExperts | None = None

    @staticmethod
    def is_supported_config(
        cls: type[MXExperts], moe_config: Any, weight_key: Any, activation_key: Any, activation_format: Any
    ) -> tuple[bool, str | None]:
        """Whether this class can run the layer, and if not, why. The keys are those of whatever asks: not relied on."""
        if moe_config.moe_parallel_config.enable_eplb:
            return False, "mxperts lays weights out once, and EPLB would move them"
        supported: tuple[bool, str | None] = mk.FusedMoEExpertsModular.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
        return supported

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return bool(current_platform.is_cpu() or current_platform.is_cuda_alike())

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return is_supported_activation(activation)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return not (
            moe_parallel_config.use_fi_nvl_two_sided_kernels or moe_parallel_config.use_fi_nvl_one_sided_kernels
        )

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return bool(current_platform.is_cpu())  # on a GPU results depend on the number of tokens in the last digits

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    def workspace_shapes(self, M: int, N: int, K: int, *rest: Any) -> tuple[tuple[int, ...], ...]:
        """No workspaces, and an output of [M, K]."""
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()  # ``apply`` weights and sums

    def process_weights_after_loading(self, layer: Any) -> None:
        """Bring the weights to the layout of their backend. The layer keeps parameters of their shapes without memory.

        Raises:
            IntegrationError: the backend cannot run here, or the weights do not fit together.
        """
        fmt, dtype = self.scheme.weight, self.moe_config.in_dtype
        with step(f"preparing the experts of {getattr(layer, 'layer_name', 'a layer')}"):
            assert fmt is not None, "vLLM has experts without a weight format run elsewhere"
            gate_up_proj, down_proj = (
                MXTensor.from_packed(getattr(layer, name).data, getattr(layer, f"{name}_scale").data, fmt)
                for name in ("w13_weight", "w2_weight")
            )
            self.prepared = prepare(
                gate_up_proj,
                down_proj,
                interleaved=self.arguments["interleaved"],
                activation_format=self.scheme.activation,
                dtype=dtype,
                backend=self.backend,
            )
            choice = explain(
                device=gate_up_proj.device,
                dtype=dtype,
                weight=fmt,
                activation=self.scheme.activation,
                backend=self.backend,
            )
        replaced = "; ".join(hook.replaced for hook in hooks.active(PROGRAM))
        logger.info_once("mxperts stands in the place of: %s (mxperts doctor says why)", replaced)
        logger.info_once("mxperts runs experts in %s by backend %s", self.scheme.name, choice)
        for name in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"):
            # Of these, vLLM only asks the shape. Whoever asks for values is told by PyTorch that there are none, and
            # whoever would load others misses the loader, which vLLM's replace_parameter would take along.
            setattr(layer, name, frozen(torch.empty_like(getattr(layer, name), device="meta")))
        self.quant_config._w1.scale = self.quant_config._w2.scale = None

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Fill ``output`` [T, H]. torch.compile traces this: one operator, no state."""
        if apply_router_weight_on_input:  # vLLM has multiplied the input by it
            topk_weights = torch.ones_like(topk_weights)
        assert self.prepared is not None, "vLLM runs a layer whose weights were not processed"
        fused_experts(
            hidden_states,
            self.prepared,
            None,
            topk_ids,
            topk_weights,
            activation_format=self.scheme.activation,
            gate_up_bias=self.w1_bias,
            down_bias=self.w2_bias,
            input_scales=(self.a1_scale, self.a2_scale) if self.scheme.activation == FP8_STATIC else None,
            expert_map=expert_map,
            out=output,
            **self.arguments,
        )
