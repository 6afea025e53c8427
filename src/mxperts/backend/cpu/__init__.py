"""The CPU backend: kernels that Numba compiles on first use, for packed weights from memory to register."""

import torch

from mxperts.backend.cpu.experts import fused_experts, mx_linear
from mxperts.backend.cpu.jit import threading_layer
from mxperts.backend.cpu.paths import available, choose
from mxperts.backend.cpu.prepared import prepare, unprepare
from mxperts.backend.cpu.quantize import dequantize, fake_quantize, quantize
from mxperts.backend.cpu.slots import sum_slots
from mxperts.ops.dispatch import Problem


def describe(problem: Problem | None) -> str:
    """The instructions that a problem takes; for None those that this machine has, and the thread pool."""
    if problem is None:
        return f"paths here: {available()}; threads by {threading_layer()}"
    if problem.op not in ("mx_linear", "fused_experts"):
        return "exact, in integer arithmetic"
    path = choose(problem.weight, problem.activation, "auto")
    return f"path {path.name}: {path.summary}, sums in float32"


SUMS = torch.float32
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
