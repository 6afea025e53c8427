"""Modules that hold packed weights: drop-in replacements for dense layers."""

from mxperts.nn.experts import MXExperts
from mxperts.nn.linear import MXLinear

__all__ = ["MXExperts", "MXLinear"]
