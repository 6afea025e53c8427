"""The reference backend: plain PyTorch, written from the specification; it defines every result."""

import torch

from mxperts.backend.reference.experts import fused_experts, prepare, sum_slots, unprepare
from mxperts.backend.reference.linear import mx_linear
from mxperts.backend.reference.quantize import dequantize, fake_quantize, quantize
from mxperts.ops.dispatch import Problem


def describe(problem: Problem | None) -> str:
    """How it runs any problem."""
    return "exact products, sums in float64"


SUMS = torch.float64
"""In what each token's experts are summed up."""

__all__ = [
    "SUMS",
    "dequantize",
    "describe",
    "fake_quantize",
    "fused_experts",
    "mx_linear",
    "prepare",
    "quantize",
    "sum_slots",
    "unprepare",
]
