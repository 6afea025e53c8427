"""Quantising while vLLM loads, on CPU: ``quantization="mxfp4"``."""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.layers.quantization.online import mxfp4

from mxperts.formats import MXFP4
from mxperts.ops.quantize import quantize


def install() -> None:
    """vLLM's online methods look the function up in their module whenever they quantise a weight."""
    mxfp4.mxfp4_quantize = mxfp4_quantize


def mxfp4_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 [..., K/2] and scales uint8 [..., K/32] of ``x`` [..., K], as in ``mxperts quantize``."""
    weight = quantize(x, MXFP4)
    return weight.packed, weight.scales
