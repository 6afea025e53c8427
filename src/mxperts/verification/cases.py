"""What is compared: inputs, what a backend makes of them, and the exact answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mxperts.formats import FP8_STATIC, PRESETS, BlockFormat, Recipe, Role, Scheme, all_schemes
from mxperts.ops.experts import fused_experts
from mxperts.ops.linear import mx_linear
from mxperts.ops.prepare import prepare
from mxperts.ops.quantize import dequantize, fake_quantize, quantize
from mxperts.packing import unpack
from mxperts.tensor import MXTensor
from mxperts.verification import definition, layers
from mxperts.verification.definition import BFLOAT16, BLOCK, FLOAT16, FLOAT32, Bits, Float, canonical
from mxperts.verification.numbers import Family, families

FLOATS = (BFLOAT16, FLOAT16, FLOAT32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case(ABC):
    """One operation on one tensor, or one layer.

    Attributes:
        format: name of the format, or of the weights' format.
        preset: whose recipe, or "".
        activation: what inputs are quantised to, or "".
    """

    format: str
    preset: str = ""
    activation: str = ""

    @property
    @abstractmethod
    def operation(self) -> str:
        """What is run, for people."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the golden files, without what each part of the answer appends."""

    @property
    def work(self) -> Hashable:
        """Cases of which this is equal have the same inputs and the same answer."""
        return self.name

    @abstractmethod
    def run(self, backend: str, device: str) -> Mapping[str, Bits]:
        """What a backend makes of the inputs, part by part."""

    @abstractmethod
    def answer(self) -> Mapping[str, Bits]:
        """The same, exactly."""

    @abstractmethod
    def inputs(self) -> dict[str, Bits]:
        """The inputs by the names of their golden files."""

    def answer_files(self) -> dict[str, Bits]:
        """The answer by the names of its golden files."""
        return {f"{self.name}.{part}": data for part, data in self.answer().items()}

    @abstractmethod
    def where(self, part: str, index: Sequence[int]) -> str:
        """Where a number of the answer stands, and the input it comes from."""

    def shown(self, part: str, pattern: int) -> str:
        """A number of the answer."""
        return f"0x{pattern:02x}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantize(Case):
    """``quantize`` of weights, or ``fake_quantize`` of activations."""

    block: BlockFormat
    recipe: Recipe
    role: Role
    family: Family

    @property
    def operation(self) -> str:
        return "quantize" if self.role is Role.WEIGHT else "fake_quantize"

    @property
    def name(self) -> str:
        return f"{self.format}/{self.operation}/{self.preset}/{self.family.name}"

    @property
    def work(self) -> Hashable:
        return self.format, self.operation, self.recipe, self.family.name

    def run(self, backend: str, device: str) -> Mapping[str, Bits]:
        x = tensor(self.family.patterns, self.family.dtype, device)
        if self.role is Role.ACTIVATION:
            values = fake_quantize(x, self.block, preset=self.preset, backend=backend)
            return {"values": canonical(patterns(values, self.family.dtype), self.family.dtype)}
        t = quantize(x, self.block, preset=self.preset, backend=backend)
        return {"codes": unpack(t.packed, self.block).cpu().numpy(), "scales": t.scales.cpu().numpy()}

    def answer(self) -> Mapping[str, Bits]:
        x, dtype = self.family.patterns, self.family.dtype
        codes, scales = definition.quantize(x, dtype, self.block, self.recipe)
        if self.role is Role.WEIGHT:
            return {"codes": codes, "scales": scales}
        return {"values": definition.dequantize(codes, scales, self.block, dtype)[:, : x.shape[1]]}

    def inputs(self) -> dict[str, Bits]:
        return {f"{self.format}/inputs/{self.family.name}": self.family.patterns}

    def where(self, part: str, index: Sequence[int]) -> str:
        x, dtype = self.family.patterns[index[0]], self.family.dtype
        block = index[1] if part == "scales" else index[1] // BLOCK
        inside = x[block * BLOCK : (block + 1) * BLOCK].astype(np.int64) & (dtype.sign - 1)
        within = f"a block whose largest magnitude is {number(int(inside.max()), dtype)}"
        if part == "scales":
            return f"{self.family.name} row {index[0]}, scale {block} of {within}"
        given = number(int(x[index[1]]), dtype) if index[1] < len(x) else "padding"
        return f"{self.family.name} row {index[0]}, value {index[1]}: {given} in {within}"

    def shown(self, part: str, pattern: int) -> str:
        return number(pattern, self.family.dtype) if part == "values" else super().shown(part, pattern)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dequantize(Case):
    """``dequantize`` of every code under every scale."""

    block: BlockFormat
    dtype: Float

    @property
    def operation(self) -> str:
        return "dequantize"

    @property
    def name(self) -> str:
        return f"{self.format}/dequantize/{self.dtype.name}"

    @cached_property
    def _codes(self) -> Bits:
        count = 1 << self.block.element.bits
        return np.tile(np.arange(max(count, BLOCK)) % count, (256, 1)).astype(np.uint8)

    @cached_property
    def _scales(self) -> Bits:
        return np.repeat(np.arange(256, dtype=np.uint8)[:, None], self._codes.shape[1] // BLOCK, axis=1)

    def run(self, backend: str, device: str) -> Mapping[str, Bits]:
        t = MXTensor(
            torch.from_numpy(definition.pack(self._codes, self.block)).to(device),
            torch.from_numpy(self._scales).to(device),
            self.block,
            self._codes.shape[1],
        )
        values = dequantize(t, self.dtype.torch, backend=backend)
        return {"values": canonical(patterns(values, self.dtype), self.dtype)}

    def answer(self) -> Mapping[str, Bits]:
        return {"values": definition.dequantize(self._codes, self._scales, self.block, self.dtype)}

    def inputs(self) -> dict[str, Bits]:
        return {f"{self.format}/inputs/codes": self._codes, f"{self.format}/inputs/scales": self._scales}

    def where(self, part: str, index: Sequence[int]) -> str:
        return f"code 0x{self._codes[tuple(index)]:02x} under scale 0x{index[0]:02x}"

    def shown(self, part: str, pattern: int) -> str:
        return number(pattern, self.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing(Case):
    """Codes to bytes and back: every code at every place of a group, in a row that is not whole blocks too."""

    block: BlockFormat

    @property
    def operation(self) -> str:
        return "packing"

    @property
    def name(self) -> str:
        return f"{self.format}/packing"

    @cached_property
    def _codes(self) -> Bits:
        count = 1 << self.block.element.bits
        return ((np.arange(count)[:, None] + 7 * np.arange(2 * BLOCK)) % count).astype(np.uint8)

    def run(self, backend: str, device: str) -> Mapping[str, Bits]:
        codes = torch.from_numpy(self._codes).to(device)
        scales = torch.zeros(len(codes), 2, dtype=torch.uint8, device=device)
        t = MXTensor.from_codes(codes, scales, self.block)
        tail = MXTensor.from_codes(codes[:, :-5], scales, self.block)
        found = {"packed": t.packed, "codes": t.codes(), "tail": tail.packed}
        return {part: data.cpu().numpy() for part, data in found.items()}

    def answer(self) -> Mapping[str, Bits]:
        tail = np.pad(self._codes[:, :-5], ((0, 0), (0, 5)))
        pack = definition.pack
        return {"packed": pack(self._codes, self.block), "codes": self._codes, "tail": pack(tail, self.block)}

    def inputs(self) -> dict[str, Bits]:
        return {f"{self.name}.codes": self._codes}

    def where(self, part: str, index: Sequence[int]) -> str:
        return f"{part} row {index[0]}, byte {index[1]}"


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


def cases(formats: Sequence[BlockFormat], presets: Sequence[str]) -> Iterator[Case]:
    """Everything that is compared, for some formats and presets."""
    for fmt in formats:
        for family in families(fmt):
            for preset in presets:
                for role in Role:
                    chosen = PRESETS[preset].recipe(fmt, role)
                    yield Quantize(format=fmt.name, preset=preset, block=fmt, recipe=chosen, role=role, family=family)
        for dtype in FLOATS:
            yield Dequantize(format=fmt.name, block=fmt, dtype=dtype)
        yield Packing(format=fmt.name, block=fmt)
        for scheme in all_schemes():
            if scheme.weight == fmt:
                yield from _layers(scheme)


def _layers(scheme: Scheme) -> Iterator[Case]:
    labels = {"format": str(scheme.weight), "activation": str(scheme.activation or "none")}
    yield Linear(**labels, layer=layers.Linear(scheme=scheme, dtype=BFLOAT16))
    for dtype in FLOATS if scheme.activation is None else (BFLOAT16,):
        layer = layers.Experts(scheme=scheme, dtype=dtype)
        for prepared in (False, True):
            for tokens in layers.TOKENS:
                yield Experts(**labels, layer=layer, tokens=tokens, prepared=prepared)


def tensor(bits: Bits, dtype: Float, device: str) -> Tensor:
    """Patterns as a tensor."""
    signed = bits.view(f"<i{bits.itemsize}")
    return torch.from_numpy(signed).to(device).view(dtype.torch)


def mx_tensor(weight: layers.Weights, scheme: Scheme, device: str) -> MXTensor:
    """Codes and scales as an MXTensor."""
    assert scheme.weight is not None, scheme
    packed = torch.from_numpy(definition.pack(weight.codes, scheme.weight)).to(device)
    return MXTensor(packed, torch.from_numpy(weight.scales).to(device), scheme.weight, weight.k)


def patterns(values: Tensor, dtype: Float) -> Bits:
    """A tensor's bits."""
    integers = {2: torch.int16, 4: torch.int32}[values.element_size()]
    bits: Bits = values.contiguous().view(integers).cpu().numpy().view(dtype.bits)
    return bits


def unsigned_zeros(values: Tensor, dtype: Float) -> Bits:
    """A tensor's bits, every NaN the same, and -0 as 0."""
    bits = canonical(patterns(values, dtype), dtype)
    return np.where(bits == dtype.sign, 0, bits).astype(dtype.bits)


def number(pattern: int, dtype: Float) -> str:
    """A pattern and what it stands for."""
    magnitude = pattern & (dtype.sign - 1)
    sign = "-" if pattern & dtype.sign else ""
    if magnitude >= dtype.inf:
        meaning = f"{sign}Inf" if magnitude == dtype.inf else "NaN"
    else:
        meaning = f"{sign}{float(dtype.value(magnitude)):.9g}"
    return f"0x{pattern:0{2 * dtype.bits.itemsize}x} ({meaning})"  # type: ignore[union-attr]
