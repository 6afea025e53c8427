"""gpt-oss in vLLM: a weight-only checkpoint is run as one."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config, GptOssMxfp4MoEMethod

from mxperts.integrations.vllm.quark import quant_config


def install() -> None:
    register_quantization_config("gpt_oss_mxfp4")(MXGptOssConfig)


class MXGptOssConfig(GptOssMxfp4Config):  # type: ignore[misc]
    """vLLM's config of gpt-oss, with ``MXGptOssMoEMethod``. At the top of a module: vLLM pickles it."""

    def _make_moe_method(self, moe: Any) -> Any:
        return MXGptOssMoEMethod(moe)


class MXGptOssMoEMethod(GptOssMxfp4MoEMethod):  # type: ignore[misc]
    """vLLM's method, but that its emulation, in whose place mxperts stands, leaves activations unquantised.

    vLLM 0.32 and 0.33 describe gpt-oss as W4A4 there (``make_mxfp4_moe_quant_config``), though it is W4A16.
    """

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        if self.mxfp4_backend is Mxfp4MoeBackend.EMULATION:
            return quant_config(layer, "mxfp4", None)
        return super().get_fused_moe_quant_config(layer)
