"""The quantisation config object that Transformers carries around for a model that mxperts runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from mxperts.checkpoint import parse
from mxperts.checkpoint.layout import ModelScheme
from mxperts.checkpoint.rotated import QUANT_METHOD
from mxperts.errors import CheckpointError

_WRAPPED = "quantization_config"
"""Where a wrapped config holds the checkpoint's own."""


class MXConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What a model's modules are quantised to, and which backend runs them.

    Args:
        scheme: the scheme of every module.
        backend: "auto" or a backend's name.
    """

    def __init__(self, scheme: ModelScheme, backend: str = "auto") -> None:
        self.quant_method = QUANT_METHOD
        self.scheme = scheme
        self.backend = backend

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read a checkpoint's ``quantization_config``, or one that ``wrap`` wrapped.

        Raises:
            CheckpointError: it is not an MX config, or says something that is not supported.
        """
        backend = "auto"
        if _WRAPPED in config_dict:
            config_dict, backend = config_dict[_WRAPPED], config_dict["backend"]
        scheme = parse(dict(config_dict))
        if scheme is None:
            raise CheckpointError(f"not an MX quantization_config: quant_method {config_dict.get('quant_method')!r}")
        config = cls(scheme, backend)
        return (config, kwargs) if return_unused_kwargs else config

    @staticmethod
    def wrap(config: Mapping[str, Any], backend: str) -> dict[str, Any]:
        """A ``quantization_config`` that Transformers hands to us whatever ``quant_method`` it names."""
        return {"quant_method": QUANT_METHOD, _WRAPPED: dict(config), "backend": backend}

    def to_dict(self) -> dict[str, Any]:
        """The checkpoint's own ``quantization_config``, as it was read."""
        return dict(self.scheme.config)
