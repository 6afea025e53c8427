"""The GPU backend: Triton for everything on any GPU, CUDA compiled at run time for prepared weights on NVIDIA's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxperts.backend.gpu.cuda import fold, folded
from mxperts.backend.gpu.experts import fused_experts
from mxperts.backend.gpu.paths import CUDA, choose, refuses
from mxperts.backend.gpu.portable import mx_linear, sum_slots
from mxperts.backend.gpu.prepared import are_tiles, prepare, unprepare
from mxperts.backend.gpu.quantize import dequantize, fake_quantize, quantize
from mxperts.ops.dispatch import Problem


def describe(problem: Problem | None) -> str:
    """How a problem runs; for None, what there is besides Triton."""
    if problem is None:
        return "paths here: cuda, triton"
    if problem.op != "fused_experts":
        return "Triton kernels" + (", sums in float32" if problem.op == "mx_linear" else ", exact")
    path = choose(problem.device, problem.rotation)
    refused = refuses(problem.device, problem.rotation)
    why = "" if path is CUDA else f"; not path cuda: {refused or 'another was asked for'}"
    unprepared = ", once they are prepared" if path is CUDA else ""
    fp8 = f"; {folded.summary()}" if path is CUDA and folded.suits(problem) else ""
    return f"path {path.name}: {path.summary}{unprepared}{fp8}{why}"


def report(weights: Sequence[Tensor]) -> str:
    """How many inputs of prepared weights were computed in bf16 although products are fp8's."""
    if not are_tiles(weights) or len(weights) < 3:
        return ""
    computed, outside = fold.counted(weights[2])
    return f"so far {outside} of {computed} inputs in fp8's products were computed in bf16, as fp8 has not all of them"


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
    "report",
    "sum_slots",
    "unprepare",
]
