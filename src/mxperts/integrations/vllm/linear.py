"""MX linear layers in vLLM on CPU, where it has no kernel for them: ``mx.mx_linear`` on packed weights."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import MxFp4LinearKernel, MxFp6LinearKernel, register_linear_kernel
from vllm.model_executor.layers.quantization.quark.schemes import QuarkOCP_MX
from vllm.model_executor.layers.quantization.quark.schemes.quark_scheme import QuarkScheme
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Static
from vllm.model_executor.parameter import PerTensorScaleParameter
from vllm.platforms import PlatformEnum

from mxperts.formats import FP8_STATIC
from mxperts.integrations.vllm.keys import ACTIVATIONS, FP8, PACKED, WEIGHTS, scheme_of_keys
from mxperts.integrations.vllm.options import configured_backend
from mxperts.integrations.vllm.plugin import step
from mxperts.nn.parameters import frozen
from mxperts.ops.linear import mx_linear
from mxperts.tensor import MXTensor


def install() -> None:
    """vLLM asks the kernels that are registered for a platform, in order; for CPUs there are no others."""
    register_linear_kernel(MXFP4Linear, PlatformEnum.CPU, "mxfp4")
    register_linear_kernel(MXFP6Linear, PlatformEnum.CPU, "mxfp6")


class _MXLinear:
    """What both kernels have in common; mixed into vLLM's abstract class of each.

    A layer has ``weight`` uint8 [N, P], ``weight_scale`` uint8 [N, K/32], and with static fp8 ``input_scale`` [].
    """

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        with step("reading the configuration of a linear layer"):
            self.backend = configured_backend()
        weight_key = getattr(config, "weight_quant_key", kMxfp4Static)
        self.scheme = scheme_of_keys(weight_key, config.activation_quant_key)

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        if config.activation_quant_key not in ACTIVATIONS:
            return False, f"mxperts has no inputs in {config.activation_quant_key}"
        return True, None

    @classmethod
    def _supports_quant_scheme(cls, weight_key: Any, activation_key: Any) -> bool:
        return weight_key in WEIGHTS and activation_key in ACTIVATIONS

    def process_weights_after_loading(self, layer: Any) -> None:
        for name in ("weight", "weight_scale"):  # vLLM's own parameters have done their work once they are loaded
            setattr(layer, name, frozen(getattr(layer, name).data))

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``mx_linear`` of ``x`` [..., K]: [..., N]."""
        fmt = self.scheme.weight
        assert fmt is not None, "vLLM runs linear layers without a weight format itself"
        return mx_linear(
            x,
            MXTensor.from_packed(layer.weight, layer.weight_scale, fmt),
            bias,
            activation=self.scheme.activation,
            input_scale=layer.input_scale if self.scheme.activation == FP8_STATIC else None,
            backend=self.backend,
        )


class MXFP4Linear(_MXLinear, MxFp4LinearKernel):  # type: ignore[misc]
    """Linear layers with MXFP4 weights."""


class MXFP6Linear(_MXLinear, MxFp6LinearKernel):  # type: ignore[misc]
    """Linear layers with MXFP6 weights of either kind."""


class MXQuarkLinear(QuarkOCP_MX):  # type: ignore[misc]
    """A linear layer of a Quark checkpoint with MX weights and fp8 inputs: vLLM's parameters, and a scale if static."""

    supported_activation_quant_keys: ClassVar = list(FP8)
    supported_weight_quant_keys: ClassVar = list(PACKED)

    def __init__(self, weight_key: Any, activation_key: Any) -> None:
        QuarkScheme.__init__(self, weight_key, activation_key)  # not the parent's, which does not know fp8
        fmt = scheme_of_keys(weight_key, activation_key).weight
        assert fmt is not None
        self.weight_dtype = WEIGHTS[weight_key]
        self.is_unpacked, self.scale_block_rows = False, 1
        self.packed_factor = Fraction(fmt.pack_elements, fmt.pack_bytes)

    @property
    def static(self) -> bool:
        return FP8[self.activation_quant_key] == FP8_STATIC

    def create_weights(self, layer: Any, output_partition_sizes: list[int], *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, output_partition_sizes, *args, **kwargs)
        if self.static:  # one for each of the layers that vLLM has merged into this one
            unset = torch.full((len(output_partition_sizes),), torch.nan)
            scale = PerTensorScaleParameter(data=unset, weight_loader=kwargs["weight_loader"])
            layer.register_parameter("input_scale", scale)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.static:
            layer.input_scale = frozen(layer.input_scale.data.max())  # as vLLM takes it
        super().process_weights_after_loading(layer)
