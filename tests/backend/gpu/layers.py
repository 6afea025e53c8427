"""The layers of the covering set, on a GPU or in Triton's interpreter, which takes its time for every token."""

from __future__ import annotations

from typing import Any

import covering
from torch import Tensor

import mxperts as mx


def to(device: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(to(device, v) for v in value)
    return value.to(device) if isinstance(value, Tensor | mx.MXTensor) else value


class Layer(covering.Layer):
    """A layer with few tokens."""

    token_counts = (1, 2, 3, 5, 7, 24)
    halves_differ = False

    def portable(self, device: str) -> Tensor:
        """By the Triton kernels."""
        return self.on("portable", device)

    def on(self, backend: str, device: str, *, prepare: bool = False) -> Tensor:
        """On a device, the weights prepared or as they are."""
        ids, arguments = self.arguments()
        x, gate_up, down, ids, routing = to(device, (self.x, self.gate_up, self.down, ids, self.routing))
        weights: Any = (gate_up, down)
        if prepare:
            prepared = mx.prepare(gate_up, down, interleaved=self.interleaved, dtype=self.dtype, backend=backend)
            weights = (prepared, None)
        arguments = {name: to(device, value) for name, value in arguments.items()}
        return mx.fused_experts(x, *weights, ids, routing, **arguments, backend=backend).cpu()
