"""Cases of ``mx_linear`` and ``fused_experts``."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxperts.formats import FP8_STATIC, Scheme
from mxperts.ops.experts import fused_experts
from mxperts.ops.linear import mx_linear
from mxperts.ops.prepare import prepare
from mxperts.tensor import MXTensor
from mxperts.verification import definition, layers
from mxperts.verification.case import Case, number, patterns, tensor
from mxperts.verification.definition import BLOCK, Bits, Float, canonical


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear(Case):
    """``mx_linear`` that gives back every weight."""

    layer: layers.Linear

    @property
    def operation(self) -> str:
        return "mx_linear"

    @property
    def name(self) -> str:
        return f"{self.layer.scheme}/mx_linear/{self.layer.dtype.name}"

    def run(self, backend: str, device: str) -> Mapping[str, Bits]:
        y = mx_linear(
            tensor(self.layer.hidden_states, self.layer.dtype, device),
            mx_tensor(self.layer.weight, self.layer.scheme, device),
            activation=self.layer.scheme.activation,
            input_scale=layers.INPUT_SCALES[0] if self.layer.scheme.activation == FP8_STATIC else None,
            backend=backend,
        )
        return {"values": unsigned_zeros(y, self.layer.dtype)}

    def answer(self) -> Mapping[str, Bits]:
        return {"values": self.layer.answer()}

    def inputs(self) -> dict[str, Bits]:
        name, weight = f"{self.layer.scheme}/mx_linear/inputs", self.layer.weight
        return {
            f"{name}/hidden_states.{self.layer.dtype.name}": self.layer.hidden_states,
            f"{name}/codes": weight.codes,
            f"{name}/scales": weight.scales,
        }

    def where(self, part: str, index: Sequence[int]) -> str:
        row, column = index
        block = self.layer.weight.scales[column, row // BLOCK]
        return (
            f"{self.layer.scheme}: 7 times code 0x{self.layer.weight.codes[column, row]:02x} under scale 0x{block:02x}"
        )

    def shown(self, part: str, pattern: int) -> str:
        return number(pattern, self.layer.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Experts(Case):
    """``fused_experts``, its weights as they are or prepared."""

    layer: layers.Experts
    tokens: int
    prepared: bool

    @property
    def operation(self) -> str:
        return "fused_experts, prepared" if self.prepared else "fused_experts"

    @property
    def name(self) -> str:
        return f"{self.layer.scheme}/fused_experts/{self.layer.dtype.name}.{self.tokens}"

    @property
    def work(self) -> Hashable:
        return self.name, self.prepared

    def run(self, backend: str, device: str) -> Mapping[str, Bits]:
        scheme, layer = self.layer.scheme, self.layer
        gate_up, down = mx_tensor(layer.gate_up, scheme, device), mx_tensor(layer.down, scheme, device)
        weights: tuple[Any, Any] = gate_up, down
        if self.prepared:
            made = prepare(gate_up, down, activation_format=scheme.activation, dtype=layer.dtype.torch, backend=backend)
            weights = made, None
        ids, routing = layer.routing(self.tokens)
        y = fused_experts(
            tensor(layer.hidden_states(self.tokens), layer.dtype, device),
            *weights,
            torch.from_numpy(ids).to(device),
            torch.from_numpy(routing).to(device),
            activation=layers.FUNCTION,
            activation_format=scheme.activation,
            input_scales=layers.INPUT_SCALES if scheme.activation == FP8_STATIC else None,
            backend=backend,
        )
        return {"values": unsigned_zeros(y, layer.dtype)}

    def answer(self) -> Mapping[str, Bits]:
        return {"values": self.layer.answer(self.tokens)}

    def inputs(self) -> dict[str, Bits]:
        name, layer = f"{self.layer.scheme}/fused_experts/inputs", self.layer
        ids, routing = layer.routing(self.tokens)
        return {
            f"{name}/gate_up.codes": layer.gate_up.codes,
            f"{name}/gate_up.scales": layer.gate_up.scales,
            f"{name}/down.codes": layer.down.codes,
            f"{name}/down.scales": layer.down.scales,
            f"{name}/hidden_states.{layer.dtype.name}.{self.tokens}": layer.hidden_states(self.tokens),
            f"{name}/top_k_index.{self.tokens}": ids,
            f"{name}/top_k_weights.{self.tokens}": routing,
        }

    def where(self, part: str, index: Sequence[int]) -> str:
        ids = self.layer.routing(self.tokens)[0][index[0]].tolist()
        return f"{self.layer.scheme}: token {index[0]} of {self.tokens} in experts {ids}, value {index[1]}"

    def shown(self, part: str, pattern: int) -> str:
        return number(pattern, self.layer.dtype)


def mx_tensor(weight: layers.Weights, scheme: Scheme, device: str) -> MXTensor:
    """Codes and scales as an MXTensor."""
    assert scheme.weight is not None, scheme
    packed = torch.from_numpy(definition.pack(weight.codes, scheme.weight)).to(device)
    return MXTensor(packed, torch.from_numpy(weight.scales).to(device), scheme.weight, weight.k)


def unsigned_zeros(values: Tensor, dtype: Float) -> Bits:
    """A tensor's bits, every NaN the same, and -0 as 0."""
    bits = canonical(patterns(values, dtype), dtype)
    return np.where(bits == dtype.sign, 0, bits).astype(dtype.bits)
