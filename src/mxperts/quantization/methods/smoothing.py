"""Evening out the channels of a layer's input, so that one power-of-two scale fits all 32 of a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mxperts.errors import ArgumentError
from mxperts.formats import MXFP4

LARGEST = 2.0**8
"""Scales are between this and its inverse."""


def channel_scales(amax_inputs: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Scales by which a layer's input channels are to be divided and its weights' columns multiplied.

    A channel's scale is the square root of the largest magnitude of its inputs over that of its weights, so that
    neither side is evened out at the other's cost. Only ratios inside a block of 32 matter, as what all 32 have in
    common goes into the shared scale: their geometric mean is made 1. Being powers of two they change nothing but
    exponents: folding them into a norm or another projection is exact.

    Args:
        amax_inputs: largest magnitude of every input channel, [K].
        weights: of all layers that read this input, each [N, K].

    Returns:
        Powers of two, float32 [K]; 1 for channels without inputs or without weights.

    Raises:
        ArgumentError: there are no weights, shapes do not fit together, or a value is NaN or Inf.

    Source: Xiao et al., SmoothQuant, arXiv 2211.10438, with alpha = 1/2.
    """
    k = amax_inputs.shape[-1] if amax_inputs.ndim == 1 else -1
    if not weights or any(w.ndim != 2 or w.shape[1] != k for w in weights):
        raise ArgumentError(
            f"amax_inputs must be [K] and weights one or more [N, K]; they are {tuple(amax_inputs.shape)} and "
            f"{[tuple(w.shape) for w in weights]}"
        )
    inputs = amax_inputs.to(torch.float32).abs()
    columns = torch.stack([w.abs().amax(0).to(torch.float32) for w in weights]).amax(0)
    if not bool((inputs.isfinite() & columns.isfinite()).all()):
        raise ArgumentError("the inputs' largest magnitudes or the weights hold NaN or Inf")
    alive = (inputs > 0) & (columns > 0)
    wanted = torch.where(alive, (inputs.log2() - columns.log2()) / 2, 0.0).nan_to_num()
    size = MXFP4.block_size
    padding = -k % size
    blocks, counted = (torch.nn.functional.pad(t, (0, padding)).unflatten(0, (-1, size)) for t in (wanted, alive * 1.0))
    mean = blocks.sum(-1, keepdim=True) / counted.sum(-1, keepdim=True).clamp(min=1)
    exponents = ((blocks - mean) * counted).round().flatten()[:k]
    return torch.exp2(exponents).clamp(1 / LARGEST, LARGEST)
