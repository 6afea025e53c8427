"""Run, quantise and evaluate MX mixture-of-experts models on hardware without native MX."""

from typing import TYPE_CHECKING, Any

from mxperts import routing
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
from mxperts.nn import MXExperts, MXLinear
from mxperts.ops.dispatch import backends, explain
from mxperts.ops.experts import fused_experts
from mxperts.ops.linear import mx_linear
from mxperts.ops.prepare import PreparedExperts, prepare
from mxperts.ops.quantize import dequantize, fake_quantize, quantize
from mxperts.tensor import MXTensor

if TYPE_CHECKING:
    from mxperts.integrations.transformers import install, load

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
    "MXExperts",
    "MXLinear",
    "MXTensor",
    "MxpertsError",
    "PreparedExperts",
    "Scheme",
    "backends",
    "dequantize",
    "explain",
    "fake_quantize",
    "format",
    "fused_experts",
    "install",
    "load",
    "mx_linear",
    "prepare",
    "quantize",
    "routing",
]


def __getattr__(name: str) -> Any:
    # Transformers takes seconds to import, and numbers alone do not need it.
    if name in ("install", "load"):
        from mxperts.integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
