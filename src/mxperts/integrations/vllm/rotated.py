"""Checkpoints with rotated weights in vLLM: refused, before anything is loaded, in words that say what to do."""

from __future__ import annotations

from typing import Any, NoReturn

from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from mxperts.checkpoint.rotated import QUANT_METHOD
from mxperts.errors import CheckpointError


def install() -> None:
    register_quantization_config(QUANT_METHOD)(MXRotatedConfig)


class MXRotatedConfig(QuantizationConfig):  # type: ignore[misc]
    """The config of a layout that vLLM does not know and is not to know: its layers do not rotate their inputs."""

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Called by vLLM with every model's ``quantization_config`` while it checks its arguments.

        Raises:
            CheckpointError: the config is that of rotated weights.
        """
        if hf_quant_cfg.get("quant_method") == QUANT_METHOD:
            _refuse(hf_quant_cfg)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NoReturn:
        _refuse(config)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[Any]:
        return []

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: Any, prefix: str) -> None:
        return None


def _refuse(config: dict[str, Any]) -> NoReturn:
    raise CheckpointError(
        f"the weights of this checkpoint are rotated by {config.get('rotation')!r}, and vLLM does not rotate inputs: "
        "serve it with `mxperts serve`, or quantise the checkpoint that it came from without a rotation"
    )
