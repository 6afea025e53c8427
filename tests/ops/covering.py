"""Layers that together have everything a backend must run, and what their results may be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import bounds
import numpy as np
import torch
from torch import Tensor

import mxperts as mx
from mxperts.formats import BLOCK_FORMATS
from mxperts.ops.activation import ACTIVATIONS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = [f.name for f in BLOCK_FORMATS]
ACTIVATION_FORMATS = [None, *FORMATS, "fp8_static", "fp8_per_expert", "fp8_dynamic"]
FEW_BITS = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxint8")
CONSTANTS: dict[str, tuple[dict[str, float], ...]] = {
    "silu": ({}, {"limit": 2.5}),
    "swigluoai": ({}, {"limit": 1.5, "alpha": 1.25, "beta": 0.0}),
    "situ": ({"beta": 0.75}, {"beta": 3.0, "linear_beta": 2.0}),
    "swiglustep": ({}, {"limit": 1.25}),
}
SHAPES = [(100, 72), (33, 40), (1, 33), (64, 1), (128, 64), (40, 200), (65, 96)]
E = 5
PAIRS = list(itertools.product(FORMATS, ACTIVATION_FORMATS))


class Layer:
    """A layer and its tokens, the ``i``-th of a covering set: every choice meets every other.

    Args:
        integers: weights, tokens, biases and scales that are small integers times powers of two, so that float32 sums
            are exact; the functions are those whose results are integers too, or are rounded to few bits.

    Attributes:
        token_counts: that the layers of a set have in turn.
        halves_differ: whether the choices of layer ``i + 60`` are others than those of layer ``i``.
    """

    token_counts = (1, 2, 5, 7, 13, 27, 40, 200)
    halves_differ = True

    def __init__(self, i: int, fmt: str, activation_format: str | None, *, integers: bool) -> None:
        g = torch.Generator().manual_seed(i)
        self.g, self.fmt, self.integers = g, fmt, integers
        self.activation_format = "fp8_static" if activation_format == "fp8_per_expert" else activation_format
        ten, half = i // 10, i // 60 if self.halves_differ else 0
        self.dtype = DTYPES[(2 * i + 2 * ten + half) % 3]
        self.name = list(ACTIVATIONS)[(5 * i + 3 * ten) % 11]
        if integers and activation_format not in FEW_BITS:
            self.name = ("relu2", "relu2_no_mul")[(i + ten) % 2]
        gated = ACTIVATIONS[self.name].gated
        self.hidden, self.inner = SHAPES[(5 * i + ten) % 7]
        tokens = self.token_counts[(i + ten) % len(self.token_counts)]
        self.interleaved = gated and (i + 4 * ten + 4 * half) % 5 < 2
        self.on_input = (3 * i + ten + half) % 4 == 1
        k = 1 if self.on_input else 1 + i // 2 % 4
        rows = self.inner * (2 if gated else 1)
        self.gate_up, self.down = self.weight(rows, self.hidden), self.weight(self.hidden, self.inner)
        self.x = self.numbers(tokens, self.hidden).to(self.dtype)
        if integers:
            self.x[:, 0] = 7.0  # fp8_dynamic's scale is 2^-6
        self.bias: Any = (
            (self.numbers(E, rows).double(), self.numbers(E, self.hidden).bfloat16())
            if (i // 3 + ten + half) % 2
            else (None, None)
        )
        self.ids = torch.stack([torch.randperm(E, generator=g)[:k] for _ in range(tokens)])
        self.ids[torch.rand(tokens, k, generator=g) < 0.1] = -1
        power = torch.randint(-2, 2, (tokens, k), generator=g)
        self.routing = torch.exp2(power.float()) if integers else torch.rand(tokens, k, generator=g) * 2 - 0.5
        choices = CONSTANTS.get(self.name, ({},))
        self.constants = choices[ten % len(choices)]
        self.scales: Any = None
        if self.activation_format == "fp8_static":
            scale = torch.exp2(torch.randint(-6, -3, (2, E), generator=g).float()) * (1 if integers else 1.3)
            self.scales = scale if activation_format == "fp8_per_expert" else scale[:, :1].expand(2, E)
        self.mapped = (i + half) % 3 == 2

    def numbers(self, *shape: int) -> Tensor:
        if self.integers:
            return torch.randint(-3, 4, shape, generator=self.g).float()
        return torch.randn(*shape, generator=self.g)

    def weight(self, rows: int, k: int) -> mx.MXTensor:
        if self.integers:
            values = torch.randint(-1, 2, (E, rows, k), generator=self.g) / 8
            weight = mx.quantize(values, self.fmt, backend="reference")
            assert torch.equal(mx.dequantize(weight, torch.float32), values)
            return weight
        return mx.quantize(self.numbers(E, rows, k) * k**-0.5, self.fmt, backend="reference")

    def arguments(self, tokens: slice | Tensor = slice(None)) -> tuple[Tensor, dict[str, Any]]:
        """``top_k_index`` and the keyword arguments of ``fused_experts`` for some of the tokens."""
        ids, expert_map = self.ids[tokens], None
        if self.mapped:  # expert e is 2 e + 1 of all
            expert_map = torch.full((2 * E,), -1)
            expert_map[1::2] = torch.arange(E)
            ids = torch.where(ids < 0, 4, 2 * ids + 1)
        scales = self.scales
        if scales is not None:
            per_expert = bool((scales != scales[:, :1]).any())
            scales = tuple(scales) if per_expert else tuple(scales[:, 0])
        return ids, {
            "activation": self.name,
            "activation_format": self.activation_format,
            "gate_up_bias": self.bias[0],
            "down_bias": self.bias[1],
            "interleaved": self.interleaved,
            "input_scales": scales,
            "expert_map": expert_map,
            "apply_router_weight_on_input": self.on_input,
            **{f"swiglu_{name}": value for name, value in self.constants.items()},
        }

    def run(self, backend: str, tokens: slice | Tensor = slice(None), **changes: Any) -> Tensor:
        ids, arguments = self.arguments(tokens)
        return mx.fused_experts(
            self.x[tokens],
            self.gate_up,
            self.down,
            ids,
            self.routing[tokens],
            **{**arguments, "backend": backend, **changes},
        )

    def bounds(
        self, paths: Sequence[str] = (), *, weighted_parts: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the results, on any of these paths of the CPU backend; see ``bounds.experts``."""
        return bounds.experts(
            self.x,
            self.gate_up,
            self.down,
            self.ids,
            self.routing,
            paths=paths,
            activation=self.name,
            constants=self.constants,
            activation_format=self.activation_format,
            gate_up_bias=self.bias[0],
            down_bias=self.bias[1],
            interleaved=self.interleaved,
            input_scales=None if self.scales is None else self.scales.tolist(),
            router_weight_on_input=self.on_input,
            weighted_parts=weighted_parts,
        )
