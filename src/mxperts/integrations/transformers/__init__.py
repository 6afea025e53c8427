"""MX checkpoints in Transformers: packed experts and linear layers behind the stock model classes."""

from mxperts.integrations.transformers.config import MXConfig
from mxperts.integrations.transformers.experts import is_experts, mx_experts
from mxperts.integrations.transformers.loading import install, load

__all__ = ["MXConfig", "install", "is_experts", "load", "mx_experts"]
