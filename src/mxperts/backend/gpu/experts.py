"""fused_experts on GPU: which kernels run a call."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mxperts.backend.gpu import portable
from mxperts.backend.gpu.cuda import decode, single
from mxperts.backend.gpu.paths import CUDA, TRITON, forced
from mxperts.backend.gpu.prepared import are_tiles, projections
from mxperts.errors import BackendUnavailable
from mxperts.ops.experts import ExpertsCall


def fused_experts(call: ExpertsCall, out: Tensor) -> None:
    """Write the sum over each token's experts into ``out`` [T, H]: tiles by CUDA kernels, all else by Triton."""
    tiles = call.prepared and are_tiles(call.weights)
    if (forced() is CUDA and not tiles) or (forced() is TRITON and tiles):
        held = "canonical: prepare() them first" if not tiles else "prepared for path 'cuda': unprepare() them first"
        raise BackendUnavailable(f"path {forced().name!r} cannot run this: the weights are {held}")  # type: ignore[union-attr]
    if out.numel() == 0:
        return
    if not tiles:
        portable.fused_experts(call, out)
        return
    first, second = projections(call.layout)
    k = call.top_k_index.shape[1]
    step = max(1, decode.MOST_PAIRS // k)
    for start in range(0, out.shape[0], step):
        turn = slice(start, start + step)
        part = replace(
            call,
            hidden_states=call.hidden_states[turn],
            top_k_index=call.top_k_index[turn],
            top_k_weights=call.top_k_weights[turn],
        )
        decode.fused_experts(part, out[turn], first, second)
