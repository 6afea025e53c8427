"""The experts of a layer with dense weights on a GPU: one Triton kernel a projection, as vLLM does it."""

from __future__ import annotations

from mxperts.benchmark.contenders.grouped.contenders import DequantizeFirstGrouped, GroupedDense

__all__ = ["DequantizeFirstGrouped", "GroupedDense"]
