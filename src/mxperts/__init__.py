"""Run, quantise, evaluate and serve MX mixture-of-experts models on hardware without native MX."""

from mxperts.errors import ArgumentError, BackendUnavailable, CheckpointError, FormatError, MxpertsError
from mxperts.formats import (
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    BlockFormat,
    Scheme,
    format,
)
from mxperts.ops.dispatch import backends, explain
from mxperts.ops.quantize import dequantize, fake_quantize, quantize
from mxperts.tensor import MXTensor

__version__ = "0.1.0"

__all__ = [
    "MXFP4",
    "MXFP6_E2M3",
    "MXFP6_E3M2",
    "MXFP8_E4M3",
    "MXFP8_E5M2",
    "MXINT8",
    "ArgumentError",
    "BackendUnavailable",
    "BlockFormat",
    "CheckpointError",
    "FormatError",
    "MXTensor",
    "MxpertsError",
    "Scheme",
    "backends",
    "dequantize",
    "explain",
    "fake_quantize",
    "format",
    "quantize",
]
