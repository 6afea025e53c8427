"""The reference backend: plain PyTorch, written from the specification; it defines every result."""

from mxperts.backend.reference.quantize import dequantize, fake_quantize, quantize

__all__ = ["dequantize", "fake_quantize", "quantize"]
