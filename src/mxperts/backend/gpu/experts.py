"""fused_experts on GPU: which kernels run a call."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from mxperts.backend.gpu import portable
from mxperts.backend.gpu.cuda import folded, grouped, single
from mxperts.backend.gpu.paths import CUDA, TRITON, forced, is_batch_invariant
from mxperts.backend.gpu.prepared import are_tiles, projections
from mxperts.errors import BackendUnavailable
from mxperts.ops.experts import ExpertsCall


def fused_experts(call: ExpertsCall, out: Tensor) -> None:
    """Write the sum over each token's experts into ``out`` [T, H]: tiles by CUDA kernels, all else by Triton."""
    tiles, path = call.prepared and are_tiles(call.weights), forced()
    if path is CUDA and not tiles:
        raise BackendUnavailable("path 'cuda' cannot run this: its weights are to be prepared first, by prepare()")
    if path is TRITON and tiles:
        raise BackendUnavailable("path 'triton' cannot run this: its weights are prepared for 'cuda'; unprepare() them")
    if out.numel() == 0:
        return
    if tiles:
        choose_kernel(call).fused_experts(call, out, *projections(call.layout))
    else:
        portable.fused_experts(call, out)


def choose_kernel(call: ExpertsCall) -> ModuleType:
    """The module whose kernels are the fastest for so many tokens, or the one for any number of them."""
    if is_batch_invariant():
        return grouped
    return single if single.takes(call) else folded if folded.takes(call) else grouped
