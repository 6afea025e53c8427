"""The reference backend: plain PyTorch, written from the specification; it defines every result."""

from mxperts.backend.reference.experts import fused_experts, prepare, unprepare
from mxperts.backend.reference.linear import mx_linear
from mxperts.backend.reference.quantize import dequantize, fake_quantize, quantize

__all__ = ["dequantize", "fake_quantize", "fused_experts", "mx_linear", "prepare", "quantize", "unprepare"]
