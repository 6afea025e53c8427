"""The CPU backend: kernels that Numba compiles on first use, for packed weights from memory to register."""

from mxperts.backend.cpu.experts import fused_experts, mx_linear
from mxperts.backend.cpu.jit import threading_layer
from mxperts.backend.cpu.paths import available, choose
from mxperts.backend.cpu.prepared import prepare, unprepare
from mxperts.backend.cpu.quantize import dequantize, fake_quantize, quantize
from mxperts.ops.dispatch import Problem


def describe(problem: Problem | None) -> str:
    """The instructions that a problem takes; for None those that this machine has, and the thread pool."""
    if problem is None:
        return f"paths here: {available()}; threads by {threading_layer()}"
    if problem.op not in ("mx_linear", "fused_experts"):
        return "exact, in integer arithmetic"
    path = choose(problem.weight, problem.activation, "auto")
    return f"path {path.name}: {path.summary}, sums in float32"


__all__ = ["dequantize", "describe", "fake_quantize", "fused_experts", "mx_linear", "prepare", "quantize", "unprepare"]
