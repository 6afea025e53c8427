"""The quantisation config object that Transformers carries around for a model that mxperts runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from mxperts.checkpoint import parse
from mxperts.checkpoint.layout import ModelScheme
from mxperts.errors import CheckpointError

QUANT_METHOD = "mxperts"
"""The name of our quantiser in Transformers' registry; checkpoints keep their own ``quant_method``."""


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
        if config_dict.get("quant_method") == QUANT_METHOD:
            config_dict, backend = config_dict["config"], config_dict["backend"]
        scheme = parse(dict(config_dict))
        if scheme is None:
            raise CheckpointError(f"not an MX quantization_config: quant_method {config_dict.get('quant_method')!r}")
        config = cls(scheme, backend)
        return (config, kwargs) if return_unused_kwargs else config

    @staticmethod
    def wrap(config: Mapping[str, Any], backend: str) -> dict[str, Any]:
        """A ``quantization_config`` that Transformers hands to us whatever ``quant_method`` it names."""
        return {"quant_method": QUANT_METHOD, "config": dict(config), "backend": backend}

    def to_dict(self) -> dict[str, Any]:
        """The checkpoint's own ``quantization_config``, as it was read."""
        return dict(self.scheme.config)
